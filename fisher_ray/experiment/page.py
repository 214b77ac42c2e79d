"""What an experiment found, as JSON, as Markdown and as a page."""

from __future__ import annotations

import json
from html import escape

from fisher_ray.experiment.figures import accuracy_by_snapshot, time_to_accuracy
from fisher_ray.experiment.tables import Runs, caption, columns, markdown, of_views, rows
from fisher_ray.report.drawing import Drawing, write_drawings
from fisher_ray.report.page import document, figure_section, table
from fisher_ray.storage import Storage


def write_comparison(storage: Storage, runs: Runs) -> None:
    """Write ``compare.json``, ``compare.md``, ``compare.html`` and its figures as ``figures/*.svg`` and ``.png``.

    Args:
        storage: the experiment's folder.
        runs: what :func:`~fisher_ray.experiment.collecting.collect` returned; one at least.

    Raises:
        StorageError: if the folder cannot be written.
    """
    page, drawings = render_page(runs)
    write_drawings(storage, "figures", drawings)
    storage.write_bytes("compare.html", page.encode())
    storage.write_bytes("compare.md", markdown(runs).encode())
    document = {"schema": 1, "runs": list(runs)}
    storage.write_bytes("compare.json", (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())


def render_page(runs: Runs) -> tuple[str, list[Drawing]]:
    """Return the page, and the figures on it; see :func:`write_comparison`."""
    tables, drawn = [], []
    for views in sorted({run["views"] for run in runs if run["workers"] is None}):
        tables.append(table(columns(runs, views), rows(runs, views), caption(runs, views), kind="numbers"))
        drawn.append(accuracy_by_snapshot(runs, views))
        for steps in sorted({run["steps"] for run in of_views(runs, views)}):
            if (figure := time_to_accuracy(runs, views, steps)) is not None:
                drawn.append(figure)
    num_runs = sum(run["workers"] is None for run in runs)
    lead = f'<p class="soft">{escape(f"{num_runs} runs")}.</p>'
    section = f"<section><h2>Comparison</h2>{''.join(tables)}</section>"
    return document("What the experiment found", lead, [section, figure_section(drawn)]), drawn
