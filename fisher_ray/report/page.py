"""One self-contained HTML page about a run."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from fisher_ray.report.comparison import LABELS, compare, conditions, percent, seconds, shallow_key
from fisher_ray.report.examples import picture_grid
from fisher_ray.report.table import COLUMNS
from fisher_ray.storage import Storage

if TYPE_CHECKING:  # matplotlib, which a table in the terminal does without, is imported where figures are drawn
    from fisher_ray.report.drawing import Drawing

MOST_SKIPPED = 100
"""Skipped rows that are listed; beyond them, only their number is."""

_STAGES = {"trained_on": "training on", "converged": "training on to convergence"}
"""Stages that are called otherwise than their key."""

_METRIC = {
    "dim": ("coordinates", ",d"),
    "trace": ("trace of the Fisher in them", ".4g"),
    "captured": ("share of the trace that the eigenvalues capture", ".1%"),
    "effective_dim": ("effective dimension, \u03a3 \u03bb / (\u03bb + \u03b4)", ",.1f"),
    "condition": ("condition number, damped", ".3g"),
}
"""Of a metric's summary, what is listed, how it is called and written."""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""What the page may load: nothing from elsewhere, and no script."""

_CSS = """
:root { color-scheme: light dark; --font: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  --page: #ffffff; --ink: #1c2127; --soft: #59636e; --line: #d5dae0;
  --bar: #98a5b3; --accent: #0969a8; --tint: #f3f6f9; }
@media (prefers-color-scheme: dark) { :root {
  --page: #14181d; --ink: #e4e8ec; --soft: #9aa5b1; --line: #38414b;
  --bar: #5f6f7f; --accent: #5bb4f5; --tint: #1c2229; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1.5rem 1rem 4rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 var(--font); overflow-wrap: break-word; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
a { color: var(--accent); }
p { margin: .5rem 0; max-width: 46rem; } .soft, caption, figcaption { color: var(--soft); font-size: .9rem; }
.verdict { border-left: .25rem solid var(--accent); background: var(--tint); padding: .75rem 1rem; }
.wide { overflow-x: auto; margin-top: 1.25rem; } .csv { margin: .25rem 0 0; font-size: .9rem; }
table { border-collapse: collapse; } caption { text-align: left; padding-bottom: .4rem; }
th, td { text-align: left; padding: .4rem 1.2rem .4rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; } tbody th { font-weight: 400; } td { font-variant-numeric: tabular-nums; }
.numbers td, .numbers thead th:not(:first-child) { text-align: right; white-space: nowrap; }
.chosen th, .chosen td { font-weight: 600; color: var(--accent); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.5rem 2.5rem; }
figure { margin: 0; max-width: 34rem; } figure svg { display: block; width: 100%; height: auto; }
figcaption { margin-top: .3rem; } pre { background: var(--tint); padding: 1rem; overflow-x: auto; font-size: .85rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: 1.25rem 2rem; }
.strip { display: flex; gap: .6rem; align-items: flex-start; } .strip div { min-width: 0; text-align: center; }
.strip img { display: block; image-rendering: pixelated; object-fit: contain; background: var(--tint); }
.asked { width: 6rem; height: 6rem; margin-right: .5rem; } .near { width: 3.75rem; height: 3.75rem; margin: auto; }
.pairs { grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); }
.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 10rem), 1fr)); }
.ends p { margin: 0 0 .2rem; text-align: left; } .ends .strip { flex-wrap: wrap; margin-bottom: .6rem; }
.strip span { color: var(--soft); font-size: .8rem; line-height: 1.25; }
summary { cursor: pointer; font-weight: 600; margin-top: 1rem; }
@media (max-width: 32rem) { th, td { padding-right: .6rem; font-size: .9rem; } }
"""


def write_report(storage: Storage, results: Mapping[str, Any], details: Mapping[str, Any]) -> None:
    """Write the page, its figures as ``report/figures/*.svg`` and ``.png``, and then ``report/results.json``.

    Args:
        storage: the run folder.
        results: the content of ``results.json``; accuracies may be None.
        details: what only the page shows; every key may be missing or empty: ``metric`` (what
            :meth:`fisher_ray.metric.LowRankMetric.summary` returns), ``path`` (of ``penalty``, ``accuracy``),
            ``seconds`` by stage, ``config`` (text), ``layers`` (of ``name``, ``coordinates``, ``shape``), ``skipped``
            (of ``split``, ``row``, ``reason``), ``num_halvings``, ``intervals`` by model, ``verdict``, ``environment``,
            ``confusion`` (by model, ``(C, C)``), ``class_names``, ``workers`` (of ``worker``, ``units``, ``rows``,
            ``seconds``, ``retries``), ``examples`` and ``searched`` (of
            :func:`fisher_ray.stages.examples.show_examples`), ``pictures`` (of theirs, PNG by ``SPLIT-ROW``).

    Raises:
        ValueError: if a result is NaN or infinite, which JSON cannot hold.
        StorageError: if the folder cannot be written.
    """
    from fisher_ray.report.drawing import write_drawings

    document = json.dumps(results, indent=2, allow_nan=False) + "\n"
    page, drawings = render_page(results, details)
    write_drawings(storage, "report/figures", drawings)
    storage.write_bytes("report/report.html", page.encode())
    storage.write_bytes("report/results.json", document.encode())


def render_page(results: Mapping[str, Any], details: Mapping[str, Any]) -> tuple[str, list[Drawing]]:
    """Return the page, and the figures on it; see :func:`write_report`."""
    drawings, (by_class, confusions) = _figures(results, details), _classes(results, details)
    verdict = f'<p class="verdict">{escape(details["verdict"])}</p>' if details.get("verdict") else ""
    parts = [
        _comparison(results, details),
        figure_section(drawings),
        by_class,
        _examples(results, details),
        _run(results, details),
        _skipped(details.get("skipped") or []),
        _background(details),
    ]
    lead = f'<p class="soft">{escape(conditions(results))}.</p>{verdict}'
    return document("What the run found", lead, parts), [*drawings, *confusions]


def document(title: str, lead: str, parts: Iterable[str]) -> str:
    """Return a page that needs nothing else.

    Args:
        title: its heading.
        lead: markup below it.
        parts: sections, as markup; empty ones are left out.
    """
    name = title[0].lower() + title[1:]
    whole = [
        "<!DOCTYPE html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>fisher_ray: {escape(name)}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        f"<style>{_CSS}</style></head><body><main>",
        f"<header><h1>{escape(title)}</h1>{lead}</header>",
        *parts,
        "</main></body></html>\n",
    ]
    return "\n".join(part for part in whole if part)


def _comparison(results: Mapping[str, Any], details: Mapping[str, Any]) -> str:
    rows = compare(results, details.get("intervals"))
    caption = "Accuracy, difference to the base network in percentage points, and 95 % interval"
    chosen = [position for position, row in enumerate(rows) if row.key == shallow_key(results)]
    markup = table(COLUMNS, [row.cells() for row in rows], caption, kind="numbers", chosen=chosen)
    return f"<section><h2>Comparison</h2>{markup}</section>"


def _figures(results: Mapping[str, Any], details: Mapping[str, Any]) -> list[Drawing]:
    from fisher_ray.report import figures

    drawn = []
    rows = compare(results, details.get("intervals"))
    if any(row.accuracy is not None for row in rows):
        drawn.append(figures.accuracy_bars(rows))
    if details.get("path"):
        drawn.append(figures.penalty_path(details["path"]))
    metric = details.get("metric") or {}
    if metric.get("parts"):
        drawn.append(figures.spectrum(metric["parts"]))
    if len(metric.get("layers") or []) > 1:
        drawn.append(figures.layer_spectra(metric["layers"]))
    if stages := _stages(results, details):
        drawn.append(figures.timeline(stages))
    return drawn


def _classes(results: Mapping[str, Any], details: Mapping[str, Any]) -> tuple[str, list[Drawing]]:
    from fisher_ray.report import classes

    confusion, shallow = details.get("confusion") or {}, shallow_key(results)
    if shallow not in confusion:
        return "", []
    names = classes.class_names(len(confusion[shallow]), details.get("class_names"))
    head, rows = classes.class_rows(confusion, shallow, names)
    few = f", the {len(rows)} that are wrong most often" if len(names) > classes.MOST_LISTED else ""
    caption = f"Accuracy on the test samples by class{few}, and what the last model errs in"
    few_enough = len(names) <= classes.MOST_DRAWN
    drawn = [classes.confusions(confusion[shallow], names, LABELS[shallow])] if few_enough else []
    markup = f"{figure_grid(drawn)}{table(head, rows, caption, kind='numbers')}"
    return f"<section><h2>Classes</h2>{markup}</section>", drawn


def _examples(results: Mapping[str, Any], details: Mapping[str, Any]) -> str:
    from fisher_ray.report.classes import class_names

    examples = details.get("examples") or []
    known = {item[key] for item in examples for key in ("label", "taken")}
    known |= {near["label"] for item in examples for near in item["nearest"]}
    names = class_names(max(known, default=0) + 1, details.get("class_names"))
    return picture_grid(examples, details.get("pictures") or {}, names, details.get("searched") or 0)


def figure_section(drawings: Sequence[Drawing]) -> str:
    """Return a section of figures with their captions; nothing if there are none."""
    return f"<section><h2>Figures</h2>{figure_grid(drawings)}</section>" if drawings else ""


def figure_grid(drawings: Sequence[Drawing]) -> str:
    """Return figures with their captions, side by side where there is room."""
    body = "".join(f"<figure>{d.markup}<figcaption>{escape(d.caption)}</figcaption></figure>" for d in drawings)
    return f'<div class="figures">{body}</div>' if drawings else ""


def _run(results: Mapping[str, Any], details: Mapping[str, Any]) -> str:
    rates = results.get("samples_per_second") or {}
    rows = [
        (name, seconds(value), f"{rates[name]:,.0f}" if rates.get(name) is not None else "")
        for name, value in _stages(results, details).items()
    ]
    model = "GradNet" if shallow_key(results) == "gradnet" else "linear model"
    parts = [f"<p>The {model} has {results['num_features']:,} features a sample.</p>"]
    if details.get("num_halvings"):
        parts.append(f"<p>Micro-batches cut for want of memory: {details['num_halvings']:,}.</p>")
    if rows:
        parts.append(table(("stage", "wall time", "samples per second"), rows, "Stages", kind="numbers"))
    if workers := details.get("workers"):
        head = ("worker", "units", "rows", "seconds at work", "rows per second", "of them tried again")
        parts.append(table(head, map(_at_work, workers), "Workers, over all stages that have units", kind="numbers"))
    metric = details.get("metric") or {}
    if metric:
        told = [(text, f"{metric[key]:{shape}}") for key, (text, shape) in _METRIC.items()]
        parts.append(table(("what", "value"), told, "The Fisher metric", kind="numbers"))
    if trained := details.get("gradnet"):
        parts.append(table(("what", "value"), _told(trained), "GradNet", kind="numbers"))
    known = {layer["name"]: layer for layer in metric.get("layers") or []}
    layers = []
    for layer in details.get("layers") or []:
        found = known.get(layer["name"], {})
        shares = (f"{100 * found['trace'] / metric['trace']:.1f} %", f"{100 * found['kept']:.1f} %") if found else ()
        layers.append((layer["name"], _shape(layer["shape"]), f"{layer['coordinates']:,}", *shares))
    if layers:
        columns = ("layer", "shape", "coordinates", *(("share of the trace", "kept of the gradient") if known else ()))
        parts.append(table(columns, layers, "Layers whose gradients are used", kind="numbers"))
    return f"<section><h2>The run</h2>{''.join(parts)}</section>"


def _at_work(worker: Mapping[str, Any]) -> tuple[str, ...]:
    rate = worker["rows"] / max(worker["seconds"], 1e-9)
    units, rows, retries = (f"{worker[key]:,}" for key in ("units", "rows", "retries"))
    return str(worker["worker"]), units, rows, seconds(worker["seconds"]), f"{rate:,.0f}", retries


def _told(trained: Mapping[str, Any]) -> list[tuple[str, str]]:
    shares = {
        "accuracy on the validation rows, by all labels": trained["validation"],
        "of the base network": trained["base"],
        "by the stored gradients alone": trained["stored_validation"],
    }
    return [
        ("parameters", f"{trained['num_parameters']:,}"),
        ("units of its blocks", ", ".join(map(str, trained["widths"]))),
        ("steps after which it was kept", f"{trained['step']:,}"),
        *((text, percent(share)) for text, share in shares.items() if share is not None),
    ]


def _skipped(skipped: Sequence[Mapping[str, Any]]) -> str:
    if not skipped:
        return ""
    rows = [(item["split"], item["row"], item["reason"]) for item in skipped[:MOST_SKIPPED]]
    more = f"<p>And {len(skipped) - MOST_SKIPPED:,} more.</p>" if len(skipped) > MOST_SKIPPED else ""
    caption = f"{len(skipped):,} {'row' if len(skipped) == 1 else 'rows'} left out, with the reason"
    return f"<section><h2>Skipped rows</h2>{table(('split', 'row', 'reason'), rows, caption)}{more}</section>"


def _background(details: Mapping[str, Any]) -> str:
    parts = []
    if details.get("config"):
        parts.append(
            f'<details><summary>Configuration</summary><pre tabindex="0">{escape(details["config"])}</pre></details>'
        )
    if environment := details.get("environment"):
        markup = table(("what", "value"), environment.items(), "Versions and machines")
        parts.append(f"<details><summary>Environment</summary>{markup}</details>")
    return f"<section><h2>How to repeat it</h2>{''.join(parts)}</section>" if parts else ""


def _stages(results: Mapping[str, Any], details: Mapping[str, Any]) -> dict[str, float]:
    stages = details.get("seconds") or results.get("seconds") or {}
    return {_STAGES.get(name, name): value for name, value in stages.items() if value is not None}


def _shape(shape: Any) -> str:
    return " × ".join(map(str, shape)) if isinstance(shape, list | tuple) else str(shape)


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    caption: str,
    *,
    kind: str = "",
    chosen: Sequence[int] = (),
) -> str:
    """Mark up a table whose first column names the rows, and a link to it as CSV; every text is escaped."""
    rows = [*rows]
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    body = []
    for position, (name, *values) in enumerate(rows):
        cells = "".join(f"<td>{escape(str(value))}</td>" for value in values)
        mark = ' class="chosen"' if position in chosen else ""
        body.append(f'<tr{mark}><th scope="row">{escape(str(name))}</th>{cells}</tr>')
    text = f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"
    region = f'<div class="wide" role="region" aria-label="{escape(caption)}" tabindex="0">'
    return f'{region}<table class="{kind}">{text}</table></div>{_download(columns, rows, caption)}'


def _download(columns: Sequence[str], rows: Sequence[Sequence[Any]], caption: str) -> str:
    """Mark up a link to the table as CSV, which is part of the page."""
    buffer = io.StringIO()
    csv.writer(buffer).writerows([columns, *rows])
    name = re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")[:40]
    return (
        f'<p class="csv"><a download="{name}.csv" href="data:text/csv;charset=utf-8,{quote(buffer.getvalue())}" '
        f'aria-label="Download as CSV: {escape(caption)}">CSV</a></p>'
    )
