"""A run's results for TensorBoard."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from tensorboardX import SummaryWriter  # type: ignore[import-untyped]

from fisher_ray.errors import StorageError
from fisher_ray.storage import Storage


def write_tensorboard(folder: str, storage: Storage) -> Path:
    """Write what a finished run found as TensorBoard's events: numbers, eigenvalues, figures and the configuration.

    What was written of the same run before is replaced.

    Args:
        folder: of the events, local; each run has a folder of its own in it, named by the run's.
        storage: the run's folder, with its report.

    Returns:
        The run's folder of events.

    Raises:
        StorageError: if the run's folder cannot be read, or the events not be written.
    """
    place = Path(folder) / run_name(storage.url)
    try:
        return _write(place, storage)
    except OSError as error:
        raise StorageError(
            f"cannot write {place}: {error.strerror}. Correct 'tensorboard', or leave it out."
        ) from error


def _write(place: Path, storage: Storage) -> Path:
    for old in place.glob("events.out.tfevents.*"):
        old.unlink()
    results, run = (json.loads(storage.read_bytes(name)) for name in ("report/results.json", "run.json"))
    with SummaryWriter(str(place)) as writer:
        for tag, value in _scalars(results):
            writer.add_scalar(tag, value, 0)
        metric = run["stages"].get("metric", {}).get("result", {})
        values = sorted((value for part in metric.get("parts", []) for value in part["eigvals"]), reverse=True)
        for number, value in enumerate(values):
            writer.add_scalar("metric/eigenvalue", value, number)
        for name in sorted(storage.sizes()):
            if name.startswith("report/figures/") and name.endswith(".png"):
                with Image.open(io.BytesIO(storage.read_bytes(name))) as picture:
                    array = np.asarray(picture.convert("RGB"))
                writer.add_image(f"figures/{Path(name).stem}", array, 0, dataformats="HWC")
        text = yaml.safe_dump(run["config"], sort_keys=False)
        writer.add_text("configuration", "".join(f"    {line}\n" for line in text.splitlines()), 0)
    return place


def run_name(url: str) -> str:
    """Return what TensorBoard calls the run: its path, from the working directory on where it lies below that."""
    path = Path(url.partition("://")[2] if "://" in url else url)
    if path.is_absolute():
        path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path.relative_to("/")
    return path.as_posix()


def _scalars(results: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for group in ("accuracy", "seconds", "samples_per_second"):
        for name, value in results[group].items():
            if value is not None:
                yield f"{group}/{name}", value
