"""Test pictures that the shallow model is most and least certain of, with the training pictures nearest to them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fisher_ray.data import load_batches
from fisher_ray.stages.attribution.best import Best
from fisher_ray.stages.attribution.vectors import feature_rows, unit_length
from fisher_ray.stages.shallow import load_weights, store_rows
from fisher_ray.stages.workbench import Workbench
from fisher_ray.store import FeatureStore, load_arrays, open_features

NUM_SHOWN, NUM_NEAREST = 6, 3
"""Test pictures of each kind, and training pictures beside each."""
SEARCHED_ROWS = 50_000
"""Training rows that the nearest are looked for among; more would be a pass of its own."""
MOST_PIXELS = 96
"""Height and width of a picture as it is kept; larger ones are made smaller."""


def show_examples(bench: Workbench) -> dict[str, Any]:
    """Choose test samples, find the training samples nearest to them, and write ``report/pictures/SPLIT-ROW.png``.

    Near is a large cosine of the features, which is the Fisher kernel of the two samples in the metric, normalised.

    Returns:
        ``examples``: of each its ``kind`` (``wrong``: the most certain of the wrong ones, ``least`` and ``most``
        certain of all), ``row``, ``label``, ``taken`` (for what), ``probability`` of that, and ``nearest``: of each
        ``row``, ``label`` and ``cosine``. There are none if samples are no pictures of one or three channels.
        ``searched``: how many training rows they are the nearest of.
    """
    if not is_picture(bench.facts.input_shape):
        return {"examples": [], "searched": 0}
    found, _ = load_arrays(bench.url("linear/predictions.zarr"))
    weights = load_weights(bench.url("linear/weights.zarr"))
    scores = torch.from_numpy(found["fisher_linear"]).double() / weights.temperature
    examples = choose(scores, torch.from_numpy(found["labels"]), torch.from_numpy(found["index"]))
    train = bench.train_store
    searched = range(min(train.num_rows, SEARCHED_ROWS))
    test = open_features(bench.url("features/test.zarr"))
    shown = [block["x"] for item in examples for block in _rows(test, range(item["row"], item["row"] + 1))]
    for item, nearest in zip(examples, _nearest(train, searched, torch.cat(shown)), strict=True):
        item["nearest"] = nearest
    bench.storage.remove("report/pictures")  # of the report before
    drawn = {("test", item["row"]) for item in examples}
    drawn |= {("shallow", near["row"]) for item in examples for near in item["nearest"]}
    for split, row in sorted(drawn):
        draw_picture(bench, split, row, picture_name(split, row))
    return {"examples": examples, "searched": len(searched)}


def choose(scores: Tensor, labels: Tensor, index: Tensor) -> list[dict[str, Any]]:
    """Return the samples to be shown, each once.

    Args:
        scores: whose softmax the probabilities are, float64 ``(N, C)``.
        labels: ``(N,)``.
        index: of the samples, ``(N,)``.
    """
    best, taken = scores.max(dim=1)
    others = scores.scatter(1, taken.unsqueeze(1), -torch.inf).logsumexp(dim=1)
    odds = best - others  # their logarithm, which tells apart what is 1 as a probability
    order = torch.argsort(odds, descending=True, stable=True).tolist()
    wrong = [place for place in order if taken[place] != labels[place]]
    chosen: dict[int, str] = {}
    for kind, places in (("wrong", wrong), ("least", order[::-1]), ("most", order)):
        new = [place for place in places if place not in chosen]
        chosen |= dict.fromkeys(new[:NUM_SHOWN], kind)
    return [
        {
            "kind": kind,
            "row": int(index[place]),
            "label": int(labels[place]),
            "taken": int(taken[place]),
            "probability": float(odds[place].sigmoid()),
        }
        for place, kind in chosen.items()
    ]


def _rows(store: FeatureStore, rows: range) -> Iterator[dict[str, Tensor]]:
    """Yield blocks of a store's rows, their features ``x`` of length one, ``(B, F)``."""
    for block in store_rows(store, "all", rows, seed=0, validation=0.0, use_hidden=False):
        yield {**block, "x": unit_length(feature_rows(block).float())}


def _nearest(store: FeatureStore, rows: range, queries: Tensor) -> list[list[dict[str, Any]]]:
    """Return the rows nearest to each of the queries ``(Q, F)``, the nearest first; none to one that is zero."""
    best = Best(len(queries), NUM_NEAREST)
    for block in _rows(store, rows):
        best.add(queries @ block["x"].mT, block["index"], block["labels"])
    found = best.to_arrays()
    columns = (found[f"highest-{name}"].tolist() for name in ("rows", "labels", "scores"))
    return [
        [{"row": r, "label": label, "cosine": value} for r, label, value in zip(*near, strict=True) if r >= 0]
        if query.any()
        else []
        for query, *near in zip(queries, *columns, strict=True)
    ]


def is_picture(shape: tuple[int, ...]) -> bool:
    """Return whether samples of a shape are pictures, of one or three channels."""
    return len(shape) == 3 and shape[0] in (1, 3)


def draw_picture(bench: Workbench, split: str, row: int, name: str) -> None:
    """Write a sample as the network is given it, its values stretched from black to white, as a PNG file."""
    batches = load_batches(bench.source(split), range(row, row + 1), 1, num_classes=None)
    inputs = next(batches).inputs[0].double()
    batches.close()
    low, high = inputs.min(), inputs.max()
    pixels = ((inputs - low) / (high - low).clamp_min(torch.finfo(inputs.dtype).tiny) * 255).round().byte()
    array = pixels.permute(1, 2, 0).numpy() if len(pixels) == 3 else pixels[0].numpy()
    picture = Image.fromarray(np.ascontiguousarray(array))
    picture.thumbnail((MOST_PIXELS, MOST_PIXELS))
    raw = io.BytesIO()
    picture.save(raw, "PNG")
    bench.storage.write_bytes(name, raw.getvalue())


def picture_name(split: str, row: int) -> str:
    """Return where in the run folder a sample's picture is."""
    return f"report/pictures/{split}-{row}.png"
