"""What a run found: a table for the terminal, ``report.html`` and ``results.json`` for the run folder."""

from fisher_ray.report.comparison import LABELS
from fisher_ray.report.page import write_report
from fisher_ray.report.summary import summarise
from fisher_ray.report.table import render_table

__all__ = ["LABELS", "render_table", "summarise", "write_report"]
