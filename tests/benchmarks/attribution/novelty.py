"""Pictures of another kind told apart: by the norms of their features, and by the network's own certainty.

    python -m tests.benchmarks.attribution.novelty RUN [--rows 2000]

RUN is a finished run on CIFAR-10. Its test pictures are mixed with handwritten digits of scikit-learn, enlarged to the
same size; the area under the ROC curve is printed of telling the digits from the test pictures, for ``novelty``, for
``Σ_c p_c s_cᵀ (F + δ)⁻¹ s_c`` (``norm``), for one less the largest softmax probability (Hendrycks & Gimpel, 2017), and
for the largest cosine to any training sample (one less it). Nothing is fitted to either kind.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

from fisher_ray import attribution

SIZE = 32


def write_digits(folder: Path, number: int) -> None:
    """Write digits as pictures, a folder for each class."""
    images, labels = load_digits(return_X_y=True)
    for row, (image, label) in enumerate(zip(images[:number], labels[:number], strict=True)):
        place = folder / str(label)
        place.mkdir(exist_ok=True, parents=True)
        picture = Image.fromarray((image.reshape(8, 8) * 255 / 16).astype(np.uint8))
        picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(place / f"{row:05d}.png")


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
    """Score both kinds, and print a line for each method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--rows", type=int, default=1797)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_digits(Path(folder), options.rows)
        given = {"by": "cosine", "top": 1, "fresh": True}
        known = attribution.score(options.run, "test", rows=(0, options.rows), name="novelty-known", **given)
        novel = attribution.score(options.run, {"format": "images", "path": folder}, name="novelty-novel", **given)
        found = [columns(item["place"]) for item in (known, novel)]
    for name in found[0]:
        values = np.concatenate([item[name] for item in found])
        kinds = np.repeat([0, 1], [len(item[name]) for item in found])
        rng = np.random.default_rng(0)
        again = [roc_auc_score(kinds[rows], values[rows]) for rows in rng.integers(0, len(kinds), (200, len(kinds)))]
        low, high = np.percentile(again, [2.5, 97.5])
        print(f"{name:42} AUROC {roc_auc_score(kinds, values):.3f} [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main()
