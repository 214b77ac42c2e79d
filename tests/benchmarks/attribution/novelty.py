"""Pictures of another kind told apart: by the norms of their features, and by the network's own certainty.

    python -m tests.benchmarks.attribution.novelty RUN [--rows 2000]

RUN is a finished run on CIFAR-10. Its test pictures are mixed with ones of another kind: handwritten digits of
scikit-learn, enlarged to the same size; noise, fine and coarse; the test pictures themselves with shuffled pixels;
parts of two photographs of scikit-learn. The area under the ROC curve is printed of telling the kinds apart, for
``novelty``, for ``Σ_c p_c s_cᵀ (F + δ)⁻¹ s_c`` (``norm``), for one less the largest softmax probability (Hendrycks &
Gimpel, 2017), and for the largest cosine to any training sample (one less it). Nothing is fitted to either kind.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from sklearn.metrics import roc_auc_score

from fisher_ray import attribution
from fisher_ray.config import Config
from fisher_ray.data import open_source
from fisher_ray.journal import read_run
from fisher_ray.storage import Storage

SIZE = 32


def digits(number: int) -> Iterator[tuple[str, Image.Image]]:
    """Yield handwritten digits, enlarged."""
    images, labels = load_digits(return_X_y=True)
    for image, label in zip(images[:number], labels[:number], strict=True):
        picture = Image.fromarray((image.reshape(8, 8) * 255 / 16).astype(np.uint8)).convert("RGB")
        yield str(label), picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def noise(number: int, side: int) -> Iterator[tuple[str, Image.Image]]:
    """Yield noise of ``side`` independent pixels a side, enlarged."""
    rng = np.random.default_rng(side)
    for pixels in rng.integers(0, 256, (number, side, side, 3), dtype=np.uint8):
        yield "noise", Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def shuffled(number: int, config: Config) -> Iterator[tuple[str, Image.Image]]:
    """Yield the run's own test pictures with their pixels in a random order."""
    rng = np.random.default_rng(0)
    source = open_source(config.data.test, root=config.data.root, transform=None, key="data.test")
    for raw in source.raw_rows(0, number):
        pixels = np.asarray(source.decode(raw)[0].convert("RGB"))
        order = rng.permutation(SIZE * SIZE)
        yield "shuffled", Image.fromarray(pixels.reshape(-1, 3)[order].reshape(SIZE, SIZE, 3))


def patches(number: int) -> Iterator[tuple[str, Image.Image]]:
    """Yield random parts of two photographs, reduced by two."""
    rng, photographs = np.random.default_rng(0), load_sample_images().images
    for place in range(number):
        pixels = photographs[place % len(photographs)]
        y, x = (int(rng.integers(0, length - 2 * SIZE)) for length in pixels.shape[:2])
        yield "patch", Image.fromarray(pixels[y : y + 2 * SIZE, x : x + 2 * SIZE]).resize((SIZE, SIZE))


def write_pictures(folder: Path, pictures: Iterator[tuple[str, Image.Image]]) -> None:
    """Write pictures, a folder for each class."""
    for row, (label, picture) in enumerate(pictures):
        place = folder / label
        place.mkdir(exist_ok=True, parents=True)
        picture.save(place / f"{row:05d}.png")


def columns(place: str) -> dict[str, np.ndarray]:
    """Return how novel each query looks, by method."""
    queries = pq.read_table(f"{place}/queries").to_pydict()
    top = pq.read_table(f"{place}/top", filters=[("end", "=", "highest"), ("place", "=", 0)]).to_pydict()
    nearest = dict(zip(top["query"], top["score"], strict=True))
    return {
        "novelty, from both norms": np.asarray(queries["novelty"]),
        "whitened norm": np.asarray(queries["norm"]),
        "1 - largest softmax probability": 1 - np.asarray(queries["probability"]),
        "1 - largest cosine to a training sample": 1 - np.asarray([nearest[row] for row in queries["row"]]),
    }


def main() -> None:
    """Score both kinds, and print a line for each method and other kind."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--rows", type=int, default=1797)
    options = parser.parse_args()
    given = {"by": "cosine", "top": 1, "fresh": True}
    known = attribution.score(options.run, "test", rows=(0, options.rows), name="novelty-known", **given)
    config = Config.from_dict(read_run(Storage(options.run))["config"])
    kinds = {
        "digits": digits(options.rows),
        "noise": noise(options.rows, SIZE),
        "blobs": noise(options.rows, 4),
        "shuffled": shuffled(options.rows, config),
        "patches": patches(options.rows),
    }
    for kind, pictures in kinds.items():
        with tempfile.TemporaryDirectory() as folder:
            write_pictures(Path(folder), pictures)
            source = {"format": "images", "path": folder}
            novel = attribution.score(options.run, source, name=f"novelty-{kind}", **given)
            print_areas(kind, [columns(item["place"]) for item in (known, novel)])


def print_areas(kind: str, found: list[dict[str, np.ndarray]]) -> None:
    """Print a line for each method, with the bootstrap's 95 % interval."""
    for name in found[0]:
        values = np.concatenate([item[name] for item in found])
        kinds = np.repeat([0, 1], [len(item[name]) for item in found])
        rng = np.random.default_rng(0)
        again = [roc_auc_score(kinds[rows], values[rows]) for rows in rng.integers(0, len(kinds), (200, len(kinds)))]
        low, high = np.percentile(again, [2.5, 97.5])
        print(f"{kind:9} {name:42} AUROC {roc_auc_score(kinds, values):.3f} [{low:.3f}, {high:.3f}]", flush=True)


if __name__ == "__main__":
    main()
