"""What was found, as tables: the best rows of each query, and the queries themselves."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fisher_ray.stages.attribution.best import ENDS, Arrays
from fisher_ray.stages.attribution.novelty import novelty
from fisher_ray.stages.attribution.search import Asked, blocks_of, norms_of, query_store
from fisher_ray.stages.examples import draw_picture, is_picture
from fisher_ray.stages.workbench import Workbench
from fisher_ray.store import FeatureStore

NUM_SHOWN, NUM_NEAR = 12, 5
"""Queries on the page, and training samples beside each, at either end."""
PICTURES = "pictures"
"""Of the page, in the folder of the scores."""


def block_name(start: int) -> str:
    """Return the file name of the queries from row ``start`` on."""
    return f"{start:012d}.parquet"


def list_best(
    bench: Workbench, found: Arrays, *, request: dict[str, Any], folder: str, start: int, stop: int
) -> dict[str, Any]:
    """Write ``top/START.parquet`` and ``queries/START.parquet`` of the queries ``[start, stop)``.

    Returns:
        ``num_queries``; ``shown``: of the first few their row, label, what the network takes them for, ``norm`` and
        ``novelty``, and of either end the first rows; ``pairs`` of cosines, or None.
    """
    asked = Asked(request, folder, start, stop)
    queries = _describe(query_store(bench, asked.config, folder), bench, range(start, stop), found.get("moments"))
    _write(bench, f"{folder}/queries/{block_name(start)}", queries)
    _write(bench, f"{folder}/top/{block_name(start)}", _flat(queries["row"], found))
    shown = [_shown(queries, found, place) for place in range(min(NUM_SHOWN, len(queries["row"])))]
    pairs = found["pairs"].tolist() if "pairs" in found else None
    return {"num_queries": len(queries["row"]), "shown": shown, "pairs": pairs}


def _describe(store: FeatureStore, bench: Workbench, rows: range, moments: np.ndarray | None) -> dict[str, np.ndarray]:
    names = ("row", "label", "taken", "probability", "norm", *(() if moments is None else ("novelty",)))
    parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for block in blocks_of(bench, store, "kernel", rows):
        probability, taken = block["logits"].double().softmax(dim=1).max(dim=1)
        norms = norms_of(bench, store, block)
        made = [block["index"], block["labels"], taken, probability, norms[:, 0]]
        made += [] if moments is None else [novelty(norms, moments)]
        for part, values in zip(parts.values(), made, strict=True):
            part.append(values.numpy())
    return {name: np.concatenate(values) for name, values in parts.items()}


def _flat(query_rows: np.ndarray, found: Arrays) -> dict[str, Any]:
    """Return one line for every query, end and place, without those that are not there."""
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("query", "end", "place", "row", "label", "score")}
    for end in ENDS:
        rows = found[f"{end}-rows"]
        there = rows >= 0
        columns["query"].append(np.broadcast_to(query_rows[:, None], rows.shape)[there])
        columns["end"].append(np.full(int(there.sum()), end))
        columns["place"].append(np.broadcast_to(np.arange(rows.shape[1]), rows.shape)[there])
        for name, key in (("row", "rows"), ("label", "labels"), ("score", "scores")):
            columns[name].append(found[f"{end}-{key}"][there])
    return {name: np.concatenate(values) for name, values in columns.items()}


def _shown(queries: dict[str, np.ndarray], found: Arrays, place: int) -> dict[str, Any]:
    item: dict[str, Any] = {name: values[place].item() for name, values in queries.items()}
    for end in ENDS:
        rows = found[f"{end}-rows"][place][:NUM_NEAR]
        labels, scores = (found[f"{end}-{key}"][place] for key in ("labels", "scores"))
        item[end] = [
            {"row": int(row), "label": int(label), "score": float(score)}
            for row, label, score in zip(rows, labels, scores, strict=False)
            if row >= 0
        ]
    return item


def _write(bench: Workbench, name: str, columns: dict[str, Any]) -> None:
    bench.storage.write_bytes(name, to_parquet(columns))


def to_parquet(columns: dict[str, Any]) -> bytes:
    """Return a table of columns as a Parquet file."""
    raw = io.BytesIO()
    pq.write_table(pa.table(columns), raw)
    return raw.getvalue()


def draw_shown(bench: Workbench, *, shown: list[list[Any]], folder: str) -> dict[str, Any]:
    """Write the pictures of some samples, as ``PICTURES/SPLIT-ROW.png`` in the folder.

    Args:
        bench: of the run.
        shown: split and row of each.
        folder: in the run folder.

    Returns:
        ``drawn``: whether samples are pictures.
    """
    if not is_picture(bench.facts.input_shape):
        return {"drawn": False}
    for split, row in shown:
        draw_picture(bench, split, row, f"{folder}/{PICTURES}/{split}-{row}.png")
    return {"drawn": True}
