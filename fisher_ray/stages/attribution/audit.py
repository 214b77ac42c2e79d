"""Which labels look wrong: what the linear model says of each training row when it was fitted without it."""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisher_ray.config import Config
from fisher_ray.linear import RidgeSystem
from fisher_ray.records import Receipt, Unit
from fisher_ray.stages.attribution.best import Arrays
from fisher_ray.stages.attribution.listing import to_parquet
from fisher_ray.stages.attribution.ridge import RIDGE, load_ridge, row_weights
from fisher_ray.stages.attribution.search import num_features, stored_rows, write_rows
from fisher_ray.stages.attribution.vectors import has_label_scores, label_scores
from fisher_ray.stages.tasks import UnitLog
from fisher_ray.stages.workbench import Workbench
from fisher_ray.store import ArraySpec, FeatureStore, StoreSpec, open_features

ROWS, SUSPECTS = "rows.zarr", "suspects.parquet"
"""All training rows, and the most suspected ones, in the folder of the audit."""
SOLVED_ROWS = 512
"""Rows that leverages are computed of together."""
COLUMNS = {
    "index": "int64",
    "label": "int64",
    "suggested": "int64",
    "margin": "float32",
    "probability": "float32",
    "leverage": "float32",
    "loss": "float32",
    "self_influence": "float32",
}
"""Of each training row: its number, its label, and of the linear model fitted without it the class it suggests, the
score of the label less the best other one's, and the label's probability; its leverage; and of the network the loss
``−log p`` of the label, and the self-influence ``sᵀ (F + δ)⁻¹ s / N`` of the label's score."""


def audit_spec(store: FeatureStore, config: Config, num_classes: int) -> StoreSpec:
    """Describe the store of all rows, whose chunks are those of the training rows ``store``.

    Args:
        store: of the training features.
        config: of the run; without features of known classes there is no self-influence.
        num_classes: ``C``.
    """
    names = [name for name in COLUMNS if has_label_scores(config, num_classes) or name != "self_influence"]
    arrays = {name: ArraySpec((), COLUMNS[name], ("sample",)) for name in names}
    return StoreSpec(store.num_rows, config.runtime.unit_rows, store.chunk_rows, "none", arrays, {})


def audit_rows(bench: Workbench, unit: Unit, attempt: int, *, folder: str, temperature: float) -> tuple[Receipt, None]:
    """Write a unit of the audit's :data:`ROWS`."""
    log, parts = UnitLog(), list[Arrays]()
    with stored_rows(bench, bench.train_store, "ridge", unit, log) as blocks:
        system = bench.keep("ridge", f"{folder}/{RIDGE}", load_ridge)
        for block in blocks:
            for rows in torch.split(torch.arange(len(block["labels"])), SOLVED_ROWS):
                part = {name: value[rows] for name, value in block.items()}
                parts.append(_judged(bench, system, part, temperature))
    return log.receipt(unit, attempt, write_rows(bench, unit, attempt, f"{folder}/{ROWS}", parts)), None


def _judged(bench: Workbench, system: RidgeSystem, block: dict[str, Tensor], temperature: float) -> Arrays:
    labels, z = block["labels"].long(), system.standardised(block["x"])
    weights = row_weights(bench, labels)
    left_out, leverage = system.leave_one_out(z, labels, weights)
    own = left_out.gather(1, labels[:, None])[:, 0]
    others = left_out.scatter(1, labels[:, None], -torch.inf)
    found = {
        "index": block["index"],
        "label": labels,
        "suggested": left_out.argmax(1),
        "margin": own - others.max(1).values,
        "probability": (left_out / temperature).softmax(1).gather(1, labels[:, None])[:, 0],
        "leverage": leverage,
        "loss": torch.nn.functional.cross_entropy(block["logits"].double(), labels, reduction="none"),
    }
    if has_label_scores(bench.config, bench.facts.num_classes):
        features = block["x"][:, : num_features(bench.train_store)]
        scores = label_scores(features, block["logits"], labels, bench.config.scores.labels).double()
        found["self_influence"] = scores.square().sum(1) / bench.train_store.num_rows
    return {name: value.numpy().astype(COLUMNS[name]) for name, value in found.items()}


def list_suspects(bench: Workbench, *, folder: str, top: int, num_shown: int) -> dict[str, Any]:
    """Write :data:`SUSPECTS`: the rows with the smallest probabilities of their labels, these first.

    Returns:
        ``num_rows``, ``num_against``: how many rows another class is suggested for; ``shown``: the first few of these.
    """
    store = open_features(bench.url(f"{folder}/{ROWS}"))
    names = [name for name in COLUMNS if name in store.arrays]
    worst: list[tuple[float, int, dict[str, Any]]] = []  # the least suspected first, to be dropped
    num_rows = num_against = 0
    for chunk in store.iter_chunks(names):
        num_rows, num_against = num_rows + len(chunk["index"]), num_against + int((chunk["margin"] < 0).sum())
        for place in np.argsort(chunk["probability"], kind="stable")[:top].tolist():
            item = (-float(chunk["probability"][place]), -int(chunk["index"][place]))
            if len(worst) == top and item < worst[0][:2]:
                break
            line = {name: chunk[name][place].item() for name in names}
            (heapq.heappush if len(worst) < top else heapq.heapreplace)(worst, (*item, line))
    lines = [line for *_, line in sorted(worst, key=lambda item: item[:2], reverse=True)]
    against = [line for line in lines if line["suggested"] != line["label"]]
    columns = {("row" if name == "index" else name): [line[name] for line in lines] for name in names}
    bench.storage.write_bytes(f"{folder}/{SUSPECTS}", to_parquet(columns))
    return {"num_rows": num_rows, "num_against": num_against, "shown": against[:num_shown]}
