"""Which labels look wrong: what the linear model says of each training row when it was fitted without it."""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisher_ray.linear import RidgeSystem
from fisher_ray.records import Receipt, Unit
from fisher_ray.stages.attribution.listing import to_parquet
from fisher_ray.stages.attribution.ridge import RIDGE, load_ridge, row_weights
from fisher_ray.stages.attribution.search import stored_rows
from fisher_ray.stages.attribution.vectors import label_scores
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


def audit_spec(store: FeatureStore, unit_rows: int, attributes: dict[str, Any], has_scores: bool) -> StoreSpec:
    """Describe the store of all rows, whose chunks are those of the training rows ``store``.

    Args:
        store: of the training features.
        unit_rows: of the run.
        attributes: JSON values.
        has_scores: whether the features are of known classes, so that there is a self-influence.
    """
    names = [name for name in COLUMNS if has_scores or name != "self_influence"]
    arrays = {name: ArraySpec((), COLUMNS[name], ("sample",)) for name in names}
    return StoreSpec(store.num_rows, unit_rows, store.chunk_rows, "none", arrays, attributes)


def audit_rows(bench: Workbench, unit: Unit, attempt: int, *, folder: str, temperature: float) -> tuple[Receipt, None]:
    """Write a unit of the audit's :data:`ROWS`."""
    log, writer = UnitLog(), bench.store_writer(f"{folder}/{ROWS}")
    parts: list[dict[str, np.ndarray]] = []
    with stored_rows(bench, bench.train_store, "ridge", unit, log) as blocks:
        system = bench.keep("ridge", f"{folder}/{RIDGE}", load_ridge)
        for block in blocks:
            for rows in torch.split(torch.arange(len(block["labels"])), SOLVED_ROWS):
                part = {name: value[rows] for name, value in block.items()}
                parts.append(_judged(bench, system, part, temperature, "self_influence" in writer.layouts))
    joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]} if parts else writer.no_rows()
    gone = {*range(unit.start, unit.stop)}.difference(joined["index"].tolist())
    reasons = dict.fromkeys(gone, "skipped in the features")
    num_bytes = writer.write_unit(unit, joined, attempt=attempt, skipped=reasons)
    return log.receipt(unit, attempt, num_bytes), None


def _judged(
    bench: Workbench, system: RidgeSystem, block: dict[str, Tensor], temperature: float, has_scores: bool
) -> dict[str, np.ndarray]:
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
    if has_scores:
        num_features = bench.metric.rank * (bench.facts.num_classes if bench.config.scores.labels == "all" else 1)
        features = block["x"][:, :num_features]
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
