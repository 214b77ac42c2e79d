"""Questions to a finished run: ``score`` and ``audit``."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any

import typer

from fisher_ray.cli.exits import error_exits
from fisher_ray.cli.options import Address, Debug, Fresh, Json, Quiet
from fisher_ray.cli.telling import tell_done, telling
from fisher_ray.errors import RequestError

RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="A finished run's folder: local or s3://bucket/prefix.")
]
Queries = Annotated[
    str,
    typer.Option(
        "--queries",
        metavar="WHAT",
        help="test, shallow (the training samples themselves), or YAML as under 'data', "
        "as in '{format: images, path: photos}'.",
    ),
]
Rows = Annotated[str | None, typer.Option("--rows", metavar="FIRST:LAST", help="Of the queries; all by default.")]
By = Annotated[str, typer.Option("--by", help="kernel, cosine, class_gap, influence or ridge.")]
Top = Annotated[int, typer.Option("--top", help="Training samples listed for each query, at either end.")]
Target = Annotated[
    str, typer.Option("--target", help="Of influence and ridge: on the query's label, or on what it is taken for.")
]
Full = Annotated[bool, typer.Option("--full", help="Keep the scores of all training samples, as scores.zarr.")]
Index = Annotated[
    str | None,
    typer.Option(
        "--index",
        metavar="FACTORY",
        help="Search approximately in a FAISS index, such as IVF64,Flat; kept with the run.",
    ),
]
IndexParameters = Annotated[
    str | None, typer.Option("--index-parameters", metavar="TEXT", help="Of FAISS, such as nprobe=16.")
]
Name = Annotated[str | None, typer.Option("--name", help="Of the folder in RUN/scores.")]
Suspects = Annotated[int, typer.Option("--top", help="Training samples listed, the most suspected first.")]
RuntimeOverrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a key of 'runtime', as in runtime.num_workers=2."),
]


def score(
    run: RunArgument,
    queries: Queries = "test",
    rows: Rows = None,
    by: By = "kernel",
    top: Top = 10,
    target: Target = "label",
    full: Full = False,
    index: Index = None,
    index_parameters: IndexParameters = None,
    name: Name = None,
    overrides: RuntimeOverrides = None,
    address: Address = None,
    fresh: Fresh = False,
    debug: Debug = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Score every training sample for some queries, by similarity or by influence.

    Which training samples is a query like, and which ones do the models owe their answer
    to? Lists the best at both ends, as Parquet and as a page with pictures.
    """
    with error_exits(debug):
        from fisher_ray import attribution
        from fisher_ray.report import attribution as pages

        asked: dict[str, Any] = {"by": by, "rows": _span(rows), "top": top, "target": target, "full": full}
        asked |= {
            "index": index,
            "index_parameters": index_parameters,
            "name": name,
            "address": address,
            "overrides": overrides or (),
            "fresh": fresh,
        }
        with telling(quiet, as_json, debug) as progress:
            found = attribution.score(run, _source(queries), **asked, progress=progress)
        _tell(as_json, found, lambda: pages.render_scores(found, by, found["class_names"]))


def audit(
    run: RunArgument,
    top: Suspects = 1000,
    overrides: RuntimeOverrides = None,
    address: Address = None,
    fresh: Fresh = False,
    debug: Debug = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """List the training samples whose labels look wrong.

    Each is judged by the linear model fitted to all the others, in closed form.
    """
    with error_exits(debug):
        from fisher_ray import attribution
        from fisher_ray.report import attribution as pages

        given: dict[str, Any] = {"address": address, "overrides": overrides or (), "fresh": fresh}
        with telling(quiet, as_json, debug) as progress:
            found = attribution.audit(run, top=top, **given, progress=progress)
        _tell(as_json, found, lambda: pages.render_suspects(found, found["class_names"]))


def _tell(as_json: bool, found: dict[str, Any], table: Callable[[], Any]) -> None:
    place = found["place"] if as_json else f"{found['place']}/report.html"
    tell_done(as_json, place, found, said="report", table=table)


def _span(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]+):([0-9]+)", text)
    if found is None:
        raise RequestError(f"--rows {text!r} is not FIRST:LAST, as in 0:100.")
    return int(found[1]), int(found[2])


def _source(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RequestError(f"--queries {text!r} is not YAML: {error}") from None
