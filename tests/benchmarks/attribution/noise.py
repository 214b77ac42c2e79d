"""Flipped labels found again: the audit beside loss, TRAK, gradient norm and chance.

    python -m tests.benchmarks.attribution.noise [--data FOLDER] [--output FOLDER] [--share 0.1] [--seeds 1 2 3]

The base network of ``jobs/configs/cifar10.yaml`` is trained on the first half of the training rows, whose labels are
right. Of 20,000 rows of the second half a share of the labels is replaced by another class at random; the run and the
audit see these alone. Every method scores all 20,000 rows, and the area under its ROC curve is printed. The
audit's order is by the label's probability; it was chosen, over the margin, on seed 0.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

from fisher_ray import attribution, pipeline
from fisher_ray.config import Config
from fisher_ray.data import load_batches, open_source
from fisher_ray.stages.workbench import base_network
from fisher_ray.storage import Storage
from fisher_ray.store import open_features
from tests.benchmarks.attribution import trak

FIRST, NUM_ROWS = 25_000, 20_000
TRAK_DIM = 2048


def flip(data: Path, place: Path, share: float, seed: int) -> np.ndarray:
    """Write the rows with flipped labels as a Parquet file, and return which ones are."""
    table = pa.concat_tables([pq.read_table(path) for path in sorted(data.glob("train-*.parquet"))])
    table = table.slice(FIRST, NUM_ROWS)
    labels, rng = table["label"].to_numpy().copy(), np.random.default_rng(seed)
    flipped = np.zeros(NUM_ROWS, bool)
    flipped[rng.choice(NUM_ROWS, round(share * NUM_ROWS), replace=False)] = True
    labels[flipped] = (labels[flipped] + rng.integers(1, 10, flipped.sum())) % 10
    position = table.schema.get_field_index("label")
    table = table.set_column(position, "label", pa.array(labels, table.schema.field("label").type))
    pq.write_table(table, place)
    return flipped


def batches(config: Config) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the rows' inputs and labels."""
    source = open_source(config.data.shallow, root=config.data.root, transform=config.data.transform, key="shallow")
    for batch in load_batches(source, range(len(source)), 256, num_classes=10):
        yield batch.inputs, batch.labels


def trak_columns(config: Config, seed: int) -> dict[str, np.ndarray]:
    """Return TRAK's self-influence and the gradient's norm of every row."""
    model = base_network(config, Storage(config.output))
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    rows, left = trak.features(model, batches(config), trak.Projection(num_parameters, TRAK_DIM, seed))
    own = ((rows.double() @ trak.inverse_gram(rows)) * rows.double()).sum(1)
    norms = rows.double().norm(dim=1) * left
    return {"TRAK, self-influence": (own * left).numpy(), "norm of the projected gradient": norms.numpy()}


def measure(data: Path, output: Path, share: float, seed: int) -> dict[str, dict[str, float]]:
    """Return each method's area under the curve and average precision."""
    output.mkdir(parents=True, exist_ok=True)
    noisy = output / f"noisy-{seed}.parquet"
    flipped = flip(data, noisy, share, seed)
    place = output / f"run-{seed}"
    overrides = [f"data.root={data}", f"data.shallow.path={noisy}", "data.shallow.rows=null", "linear.views=1"]
    overrides += ["trained_on=null", f"output={place}", f"seed={seed}"]
    config = Config.from_yaml("jobs/configs/cifar10.yaml", overrides)
    pipeline.run(config, until="linear")
    start = time.perf_counter()
    attribution.audit(str(place))
    seconds = time.perf_counter() - start
    rows = open_features(f"{place}/audit/rows.zarr")
    columns = {name: rows.read(name, 0, rows.num_rows).astype(float) for name in rows.arrays}
    start = time.perf_counter()
    peers = trak_columns(config.located(), seed)
    trak_s = time.perf_counter() - start
    suspicion = {
        "audit: probability of the label": -columns["probability"],
        "its margin": -columns["margin"],
        "self-influence under the Fisher": columns["self_influence"],
        "leverage": columns["leverage"],
        "loss of the network": columns["loss"],
        **peers,
        "chance": np.random.default_rng(seed).random(NUM_ROWS),
    }
    found = {
        name: {"auc": float(roc_auc_score(flipped, value)), "ap": float(average_precision_score(flipped, value))}
        for name, value in suspicion.items()
    }
    print(f"seed {seed}: audit {seconds:.0f} s, TRAK {trak_s:.0f} s", flush=True)
    for name, value in found.items():
        print(f"  {name:40} AUC {value['auc']:.4f}  AP {value['ap']:.4f}", flush=True)
    return found


def main() -> None:
    """Measure, and print a line for each method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/cifar10"))
    parser.add_argument("--output", type=Path, default=Path("runs/noise"))
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    options = parser.parse_args()
    torch.set_num_threads(2)
    found = [measure(options.data.resolve(), options.output, options.share, seed) for seed in options.seeds]
    for name in found[0]:
        values = np.array([item[name]["auc"] for item in found])
        half = 1.96 * values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
        print(f"{name:40} AUC {values.mean():.3f} ± {half:.3f}")
    (options.output / "noise.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
