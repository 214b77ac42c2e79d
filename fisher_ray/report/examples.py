"""Test pictures with the training pictures that are nearest to them."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fisher_ray.report.comparison import percent

KINDS = {"wrong": "Most certain, and wrong", "least": "Least certain", "most": "Most certain"}
"""Kinds of examples, in the page's order, and what they are called."""


def picture_grid(
    examples: Sequence[Mapping[str, Any]], pictures: Mapping[str, bytes], names: Sequence[str], searched: int
) -> str:
    """Return the section's markup; nothing if there are no examples.

    Args:
        examples: as :func:`fisher_ray.stages.examples.show_examples` returns them.
        pictures: PNG by ``SPLIT-ROW``.
        names: of the classes.
        searched: how many training rows the nearest were looked for among.
    """
    if not examples:
        return ""
    parts = [
        "<p>Left the test picture, beside it the training pictures whose Fisher features are nearest to its own, with "
        f"the cosine of the two, among {searched:,} training rows. Pictures are as the network gets them, stretched "
        "from black to white.</p>"
    ]
    for kind, title in KINDS.items():
        if cards := [_card(item, pictures, names) for item in examples if item["kind"] == kind]:
            parts.append(f'<h3>{title}</h3><div class="cards">{"".join(cards)}</div>')
    return f"<section><h2>Pictures</h2>{''.join(parts)}</section>"


def _card(item: Mapping[str, Any], pictures: Mapping[str, bytes], names: Sequence[str]) -> str:
    own, taken = names[item["label"]], names[item["taken"]]
    verdict = f"{own}, taken for {taken}"
    shown = picture(pictures[f"test-{item['row']}"], f"test row {item['row']}: {verdict}", "asked")
    near = []
    for one in item["nearest"]:
        row, name = one["row"], names[one["label"]]
        shown_near = picture(pictures[f"shallow-{row}"], f"training row {row}: {name}", "near")
        near.append(f"<div>{shown_near}<span>{escape(name)}<br>{one['cosine']:.2f}</span></div>")
    text = f"Test row {item['row']:,}: {verdict} with {percent(item['probability'])}."
    strip = shown + "".join(near)
    return f'<figure class="card"><div class="strip">{strip}</div><figcaption>{escape(text)}</figcaption></figure>'


def picture(raw: bytes, text: str, kind: str) -> str:
    """Mark up a picture, with what it shows in words."""
    source = f"data:image/png;base64,{b64encode(raw).decode()}"
    return f'<img class="{kind}" src="{source}" alt="{escape(text)}">'
