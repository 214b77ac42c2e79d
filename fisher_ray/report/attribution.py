"""Pages of scores and of an audit: samples beside those that they are like, or owe their answer to."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import matplotlib as mpl
import numpy as np
from rich.table import Table
from rich.text import Text

from fisher_ray.report.classes import class_names
from fisher_ray.report.comparison import percent
from fisher_ray.report.drawing import ACCENT, BAR, STYLE, Drawing, finish, start, write_drawings
from fisher_ray.report.examples import picture
from fisher_ray.report.page import document, figure_section, table
from fisher_ray.storage import Storage

Picture = Callable[[str], bytes]
"""Returns the PNG of ``SPLIT-ROW``."""

ENDS = {
    "kernel": ("Nearest", "Farthest"),
    "cosine": ("Nearest", "Farthest"),
    "class_gap": ("Nearest", "Farthest"),
    "influence": ("Most helpful", "Most harmful"),
    "ridge": ("Most helpful", "Most harmful"),
}
"""What the highest and the lowest scores are called."""
MEANING = {
    "kernel": "the dot product of Fisher features",
    "cosine": "the cosine of Fisher features",
    "class_gap": "the cosine in the coordinates in which samples of one class are more alike than those of two",
    "influence": "by how much training on the sample raises the log probability of the query's class, in nats",
    "ridge": "by how much the linear model's squared error at the query would be larger without the sample",
}
SUSPECT_COLUMNS = ("row", "label", "suggested", "probability of the label", "margin")
NUM_LISTED = 10
"""Lines in the terminal."""


def write_scores(
    storage: Storage,
    found: Mapping[str, Any],
    settings: Mapping[str, Any],
    names: Sequence[str] | None,
    picture_of: Picture,
) -> None:
    """Write ``report.html``, its figures and ``scores.json``.

    Args:
        storage: the folder of the scores.
        found: as :meth:`fisher_ray.staging.attribution.AttributionStages.score` returns it.
        settings: what was asked.
        names: of the classes.
        picture_of: reads the pictures, where there are any.
    """
    drawn = [similarities(found["pairs"])] if found["pairs"] else []
    counts = f"{found['num_queries']:,} queries, {found['num_rows']:,} training samples."
    lead = f"{counts} A score is {MEANING[settings['by']]}."
    shown = found["shown"]
    called, own = _names(shown, names), _own_names(found, shown, names)
    if found["drawn"]:
        given = (found["split"], settings["by"], called, own, picture_of)
        cards = "".join(_query_card(item, *given) for item in shown)
        body = f'<div class="cards pairs">{cards}</div>'
    else:
        rows = [line for item in shown for line in _query_lines(item, settings["by"], called, own)]
        body = table(("query", "label", "end", "training row", "its label", "score"), rows, "The first queries")
    parts = [f"<section><h2>The first queries</h2>{body}</section>", figure_section(drawn), _asked(settings, found)]
    write_drawings(storage, "figures", drawn)
    page = document("Training samples by their score", f'<p class="soft">{escape(lead)}</p>', parts)
    storage.write_bytes("report.html", page.encode())
    _write_json(storage, "scores.json", settings, found)


def write_audit(
    storage: Storage,
    found: Mapping[str, Any],
    settings: Mapping[str, Any],
    names: Sequence[str] | None,
    picture_of: Picture,
) -> None:
    """Write ``report.html`` and ``audit.json``; arguments as of :func:`write_scores`."""
    shown = found["shown"]
    called = _names(shown, names)
    share = percent(found["num_against"] / max(found["num_rows"], 1))
    lead = (
        f"Of {found['num_rows']:,} training samples, {found['num_against']:,} ({share}) are taken for another class "
        "than their label by the linear model that was fitted to all the others. Not all of these labels are wrong: "
        "those whose label has the smallest probability come first."
    )
    body = ""
    if found["drawn"]:
        body = f'<div class="cards small">{"".join(_suspect_card(item, called, picture_of) for item in shown)}</div>'
    rows = [_suspect_line(item, called) for item in shown]
    body += table(SUSPECT_COLUMNS, rows, "The most suspected labels", kind="numbers")
    parts = [f"<section><h2>The most suspected labels</h2>{body}</section>", _asked(settings, found)]
    page = document("Which labels look wrong", f"<p>{escape(lead)}</p>", parts)
    storage.write_bytes("report.html", page.encode())
    _write_json(storage, "audit.json", settings, found)


def render_scores(found: Mapping[str, Any], by: str, names: Sequence[str] | None) -> Table:
    """Return the best of the first queries as a table for the terminal."""
    called, own = _names(found["shown"], names), _own_names(found, found["shown"], names)
    made = Table(caption=Text(f"a score is {MEANING[by]}"), caption_justify="left")
    for name in ("query", "label", *(end.lower() for end in ENDS[by])):
        made.add_column(name, overflow="fold")
    for item in found["shown"][:NUM_LISTED]:
        ends = (
            "\n".join(f"{near['row']} {called[near['label']]} {near['score']:.3g}" for near in item[end][:3])
            for end in ("highest", "lowest")
        )
        made.add_row(*map(Text, (str(item["row"]), own[item["label"]], *ends)))
    return made


def render_suspects(found: Mapping[str, Any], names: Sequence[str] | None) -> Table:
    """Return the most suspected labels as a table for the terminal."""
    called = _names(found["shown"], names)
    text = f"{found['num_against']:,} of {found['num_rows']:,} training samples are taken for another class"
    made = Table(caption=Text(text), caption_justify="left")
    for name in SUSPECT_COLUMNS:
        made.add_column(name, justify="left" if name in ("label", "suggested") else "right")
    for item in found["shown"][:NUM_LISTED]:
        made.add_row(*map(Text, _suspect_line(item, called)))
    return made


@mpl.rc_context(STYLE)
def similarities(pairs: Sequence[Sequence[int]]) -> Drawing:
    """Draw how the cosines of pairs of one class, and of two, are distributed.

    Args:
        pairs: counts in equal bins of [-1, 1], ``(2, bins)``.
    """
    counts = np.asarray(pairs, dtype=float)
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    edges = np.linspace(-1, 1, counts.shape[1] + 1)
    centres = (edges[:-1] + edges[1:]) / 2
    figure, axes = start(2.8)
    for share, colour, name in zip(shares, (ACCENT, BAR), ("of one class", "of two"), strict=True):
        axes.stairs(100 * share, edges, color=colour, fill=True, alpha=0.35)
        axes.stairs(100 * share, edges, color=colour, linewidth=1.6, label=name)
    seen = np.flatnonzero(counts.sum(axis=0))
    if len(seen):
        axes.set_xlim(edges[seen[0]] - 0.02, edges[seen[-1] + 1] + 0.02)
    axes.legend(frameon=False, fontsize="small")
    axes.set(xlabel="cosine of a query and a training sample", ylabel="pairs, %")
    means = (shares * centres).sum(axis=1)
    caption = (
        f"Similarity of pairs of one class, {means[0]:.3f} on average, and of two classes, {means[1]:.3f} "
        f"({int(counts[0].sum()):,} and {int(counts[1].sum()):,} pairs)."
    )
    return finish(figure, "similarities", caption, f"Two histograms. {caption}")


def _names(shown: Sequence[Mapping[str, Any]], names: Sequence[str] | None) -> list[str]:
    known = {item[key] for item in shown for key in ("label", "taken", "suggested") if key in item}
    known |= {near["label"] for item in shown for end in ("highest", "lowest") for near in item.get(end, ())}
    return class_names(max([*known, len(names or ()) - 1], default=0) + 1, names)


def _own_names(found: Mapping[str, Any], shown: Sequence[Mapping[str, Any]], names: Sequence[str] | None) -> list[str]:
    """Return what the queries' classes are called."""
    return _names(shown, found.get("query_classes") or names)


def _query_card(
    item: Mapping[str, Any],
    split: str,
    by: str,
    names: Sequence[str],
    own_names: Sequence[str],
    picture_of: Picture,
) -> str:
    own = f"{own_names[item['label']]}, taken for {names[item['taken']]}"
    shown = picture(picture_of(f"{split}-{item['row']}"), f"query, row {item['row']}: {own}", "asked")
    strips = []
    for title, end in zip(ENDS[by], ("highest", "lowest"), strict=True):
        near = "".join(_near(one, names, picture_of) for one in item[end])
        strips.append(f'<p class="soft">{title}</p><div class="strip">{near}</div>')
    text = f"Row {item['row']:,}: {own} with {percent(item['probability'])}."
    return (
        f'<figure class="card"><div class="strip">{shown}<div class="ends">{"".join(strips)}</div></div>'
        f"<figcaption>{escape(text)}</figcaption></figure>"
    )


def _near(one: Mapping[str, Any], names: Sequence[str], picture_of: Picture) -> str:
    name = names[one["label"]]
    shown = picture(picture_of(f"shallow-{one['row']}"), f"training row {one['row']}: {name}", "near")
    return f"<div>{shown}<span>{escape(name)}<br>{one['score']:.2g}</span></div>"


def _query_lines(item: Mapping[str, Any], by: str, names: Sequence[str], own: Sequence[str]) -> list[tuple[Any, ...]]:
    return [
        (item["row"], own[item["label"]], title, near["row"], names[near["label"]], f"{near['score']:.3g}")
        for title, end in zip(ENDS[by], ("highest", "lowest"), strict=True)
        for near in item[end]
    ]


def _suspect_card(item: Mapping[str, Any], names: Sequence[str], picture_of: Picture) -> str:
    label, suggested = names[item["label"]], names[item["suggested"]]
    shown = picture(picture_of(f"shallow-{item['index']}"), f"training row {item['index']}: {label}", "asked")
    text = f"Row {item['index']:,}: {label}? Rather {suggested}."
    return f'<figure class="card"><div class="strip">{shown}</div><figcaption>{escape(text)}</figcaption></figure>'


def _suspect_line(item: Mapping[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    told = (str(item["index"]), names[item["label"]], names[item["suggested"]])
    return (*told, f"{item['probability']:.2g}", f"{item['margin']:.3f}")


def _asked(settings: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    seconds = [(name, f"{value:.1f}") for name, value in found["seconds"].items()]
    text = json.dumps(settings, indent=1)
    return (
        f"<section><h2>How to repeat it</h2>{table(('stage', 'seconds'), seconds, 'Stages', kind='numbers')}"
        f'<details><summary>What was asked</summary><pre tabindex="0">{escape(text)}</pre></details></section>'
    )


def _write_json(storage: Storage, name: str, settings: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    content = {"schema": 1, "asked": settings, **found}
    storage.write_bytes(name, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
