"""How the models do on each class: a figure of what is taken for what, and a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.patches import Rectangle

from fisher_ray.report.comparison import LABELS, percent
from fisher_ray.report.drawing import ACCENT, INCHES, INK, STYLE, Drawing, finish, plain, start

MOST_DRAWN = 20
"""Classes whose confusions are drawn."""
MOST_LISTED = 50
"""Classes that the table has; of more, those that the shallow model gets wrong most often."""


def class_names(num_classes: int, names: Sequence[str] | None) -> list[str]:
    """Return what the classes are called: their names where the samples' source has them, else their numbers."""
    found = [str(number) for number in range(num_classes)]
    texts = (name.encode(errors="replace").decode() for name in names or ())  # folders may have names that are no text
    given = ["".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in text) for text in texts]
    return [*given, *found[len(given) :]][:num_classes]


def class_rows(
    confusion: Mapping[str, Any], shallow: str, names: Sequence[str]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the table's head and rows.

    Args:
        confusion: by model, samples by class and by what they are taken for, ``(C, C)``.
        shallow: the model whose confusions are told.
        names: of the classes.
    """
    matrices = {name: np.asarray(matrix) for name, matrix in confusion.items()}
    totals = matrices[shallow].sum(axis=1)
    shares = {name: np.diag(matrix) / np.maximum(totals, 1) for name, matrix in matrices.items()}
    order = np.arange(len(totals))
    if len(totals) > MOST_LISTED:
        order = np.argsort(np.where(totals > 0, shares[shallow], 2.0), kind="stable")[:MOST_LISTED]
    head = ("class", "samples", *(LABELS[name] for name in matrices), "most often taken for")
    rows = []
    for number in order.tolist():
        if totals[number]:
            wrong = matrices[shallow][number].copy()
            wrong[number] = 0
            most = int(wrong.argmax())
            taken = f"{names[most]} ({percent(wrong[most] / totals[number])})" if wrong[most] else ""
            cells = (percent(share[number]) for share in shares.values())
            rows.append((names[number], f"{totals[number]:,}", *cells, taken))
    return head, rows


@mpl.rc_context(STYLE)
def confusions(matrix: Sequence[Sequence[int]], names: Sequence[str], label: str) -> Drawing:
    """Draw which share of each class is taken for which, the darker the more.

    Args:
        matrix: samples by class and by what they are taken for, ``(C, C)``.
        names: of the classes.
        label: what the model is called.
    """
    counts = np.asarray(matrix)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure, axes = start(INCHES * 0.95)
    for (row, column), share in np.ndenumerate(shares):
        if share > 0:
            corner, alpha = (column - 0.5, row - 0.5), 0.5 * float(share) ** 0.5  # which leaves numbers readable
            axes.add_patch(Rectangle(corner, 1, 1, color=ACCENT, alpha=alpha, linewidth=0))
        if len(counts) <= 10 and counts[row, column]:
            axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", fontsize=7)
    places, shown = range(len(counts)), [plain(name if len(name) <= 12 else f"{name[:11]}…") for name in names]
    axes.set_xticks(places, shown, rotation=90 if max(map(len, shown)) > 2 else 0)
    axes.set_yticks(places, shown)
    axes.tick_params(length=0, labelsize=8)
    axes.set(xlim=(-0.5, len(counts) - 0.5), ylim=(len(counts) - 0.5, -0.5), xlabel="taken for", ylabel="class")
    for spine in axes.spines.values():
        spine.set(visible=True, color=INK, linewidth=0.5)
    pairs = [(shares[i, j], i, j) for i, j in np.ndindex(*shares.shape) if i != j and shares[i, j] > 0]
    text = "; ".join(f"{names[i]} for {names[j]} {percent(share)}" for share, i, j in sorted(pairs, reverse=True)[:5])
    caption = f"What the {label} takes each class for: test samples, the darker the larger their share."
    return finish(figure, "confusions", caption, f"Confusion matrix of the {label}. Most often: {text or 'none'}.")
