"""The comparison in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from fisher_ray.report.comparison import compare, conditions, shallow_key

COLUMNS = ("model", "accuracy", "vs base", "95 % interval")


def render_table(results: Mapping[str, Any]) -> Table:
    """Return the comparison as a table for the terminal.

    Args:
        results: the content of ``results.json``.
    """
    table = Table(caption=Text(conditions(results)), caption_justify="left")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "model" else "right", no_wrap=name != "model")
    chosen = shallow_key(results)
    for row in compare(results):
        table.add_row(*map(Text, row.cells()), style="bold" if row.key == chosen else None)
    return table
