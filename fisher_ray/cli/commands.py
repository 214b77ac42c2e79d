"""The commands. What computes is imported inside them, so that ``--help`` answers at once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fisher_ray import __version__
from fisher_ray.cli.attribution import audit, score
from fisher_ray.cli.exits import error_exits
from fisher_ray.cli.options import Address, Debug, Fresh, Json, Quiet
from fisher_ray.cli.telling import tell_done, telling
from fisher_ray.errors import RequestError, StoreError

if TYPE_CHECKING:
    from fisher_ray import store
    from fisher_ray.config import Config

Until = Literal["base", "metric", "features", "linear", "report"] | None

ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="Configuration, a YAML file.")]
ConfigOption = Annotated[Path, typer.Option("--config", metavar="PATH", help="Configuration, a YAML file.")]
UrlArgument = Annotated[str, typer.Argument(metavar="URL", help="A store: a local path or s3://bucket/prefix.")]
RunArgument = Annotated[
    str, typer.Argument(metavar="URL", help="A store or a run folder: a local path or s3://bucket/prefix.")
]
Repair = Annotated[
    bool, typer.Option("--repair", help="Remove what is damaged of a run, so that its next start writes it again.")
]
Output = Annotated[str | None, typer.Option("--output", metavar="URL", help="Run folder, instead of 'output'.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a key, as in a.b=value; repeatable.")
]
Price = Annotated[
    float | None,
    typer.Option("--price-per-gpu-hour", min=0.0, metavar="PRICE", help="Add what the run would cost at this price."),
]
_JOB_FOLDER = "/runtime_resources/working_dir_files/"
"""In the path of the copies that Ray makes of a submitted job's working directory."""

_STAGES: dict[str, tuple[Until, str]] = {
    "run": (None, "Run every stage, and print the comparison."),
    "fit-metric": ("metric", "Run up to the Fisher metric."),
    "write-features": ("features", "Run up to the feature stores."),
    "train": ("linear", "Run up to the linear model."),
    "evaluate": ("report", "Run up to the report, and print the comparison."),
}

EXAMPLES: dict[str, tuple[str, ...]] = {
    "init": ("fisher-ray init first.yaml",),
    "plan": ("fisher-ray plan digits.yaml --price-per-gpu-hour 2.50",),
    "fit-metric": ("fisher-ray fit-metric digits.yaml --output runs/other",),
    "write-features": ("fisher-ray write-features digits.yaml --set runtime.num_workers=2",),
    "train": ("fisher-ray train digits.yaml --set linear.model=logistic --quiet",),
    "evaluate": ("fisher-ray evaluate digits.yaml --set linear.model=logistic --json",),
    "run": ("fisher-ray run digits.yaml --fresh --set trained_on=null",),
    "score": (
        "fisher-ray score runs/digits --rows 0:100",
        "fisher-ray score runs/digits --by influence --rows 0:20",
    ),
    "audit": ("fisher-ray audit runs/digits --top 100",),
    "verify": ("fisher-ray verify runs/digits", "fisher-ray verify --repair runs/digits"),
    "inspect": ("fisher-ray inspect runs/digits/features/train.zarr",),
    "demo": ("fisher-ray demo --output runs/demo",),
}
"""Told by each command's help, in an order in which they can be tried."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``fisher-ray`` on ``arguments`` (by default the process's) and exit."""
    _app()(args=arguments, prog_name="fisher-ray")


def job(command: str, arguments: Sequence[str] | None = None) -> None:
    """Run one command of ``fisher-ray`` with its configuration as ``--config PATH``, and exit.

    Args:
        command: ``run``, ``fit-metric``, ``write-features``, ``train`` or ``evaluate``.
        arguments: by default the process's.
    """
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    until, text = _STAGES[command]
    app.command(help=text)(_stage_command(until, ConfigOption))
    app(args=arguments)


def _app() -> typer.Typer:
    app = typer.Typer(
        help="Fisher feature maps of PyTorch networks, as a Ray batch job, and shallow models on them.",
        epilog="Exit codes: 0 done; 2 request wrong; 3 data wrong; 4 stopped, run again to resume; 1 other.",
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    app.callback()(_root)
    for name, (until, text) in _STAGES.items():
        app.command(name, help=text, epilog=_examples(name))(_stage_command(until, ConfigArgument))
    for command in (init, plan, score, audit, verify, inspect, demo):
        app.command(epilog=_examples(command.__name__))(command)
    return app


def _examples(name: str) -> str:
    return "\n\n".join(f"Example: {line}" for line in EXAMPLES[name])


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


def _stage_command(until: Until, config_type: Any) -> Callable[..., None]:
    def command(
        config: Path,
        output: Output = None,
        overrides: Overrides = None,
        address: Address = None,
        fresh: Fresh = False,
        debug: Debug = False,
        quiet: Quiet = False,
        as_json: Json = False,
    ) -> None:
        with error_exits(debug):
            _run(_read(config, overrides, output), until, address, fresh, debug, quiet, as_json)

    command.__annotations__ = {**command.__annotations__, "config": config_type}
    return command


def demo(
    output: Output = None,
    overrides: Overrides = None,
    address: Address = None,
    fresh: Fresh = False,
    debug: Debug = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run every stage on handwritten digits.

    They come with scikit-learn; a few minutes on two cores, nothing to download.
    """
    with error_exits(debug), as_file(files("fisher_ray") / "demo.yaml") as path:
        _run(_read(path, overrides, output), None, address, fresh, debug, quiet, as_json)


def init(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The file to write.")] = Path("fisher_ray.yaml"),
    debug: Debug = False,
) -> None:
    """Write a commented configuration to begin with.

    It has every key, what it means and its default. The JSON Schema beside it lets
    editors complete and check the keys.
    """
    with error_exits(debug):
        from fisher_ray import config

        schema_path = path.with_name("fisher_ray.schema.json")
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(config.template(schema_path.name))
            schema_path.write_text(json.dumps(config.schema(), indent=1) + "\n", encoding="utf-8")
        except FileExistsError:
            raise RequestError(f"{path} is there already. Remove it, or give another name.") from None
        except OSError as error:
            raise RequestError(f"cannot write {error.filename}: {error.strerror}. Give a place that can be.") from None
        typer.echo(f"{path} written, {schema_path} beside it. Change what it has to say, then: fisher-ray plan {path}")


def plan(
    config: ConfigArgument,
    output: Output = None,
    overrides: Overrides = None,
    price: Price = None,
    debug: Debug = False,
) -> None:
    """Print what would run, and do nothing.

    Units, memory per actor, bytes, objects, and seconds, for which a few rows go through every stage here.
    """
    with error_exits(debug):
        settings = _read(config, overrides, output)
        from fisher_ray import pipeline

        typer.echo("trying every stage on a few rows ...", err=True)
        found = pipeline.plan(settings)
        if price is not None:
            each = settings.runtime.gpus_per_worker
            gpus = found["seconds"]["workers"] * (1.0 if each == "auto" else each)
            found["price"] = round(found["seconds"]["total"] / 3600 * gpus * price, 2)
            _warn_of_price(found["seconds"])
        _print_mapping(found)


def _warn_of_price(seconds: dict[str, Any]) -> None:
    if seconds["device"] != "cuda":
        typer.echo("note: the price is of seconds measured without a GPU; plan where there is one.", err=True)
    if missing := seconds["not_estimated"]:
        typer.echo(f"note: the price leaves out what cannot be known before: {', '.join(missing)}.", err=True)


def verify(url: RunArgument, repair: Repair = False, debug: Debug = False) -> None:
    """Check every byte of a store, or of all stores of a run.

    A chunk that is missing, changed or foreign is named, and the exit code is 3.
    """
    with error_exits(debug):
        from fisher_ray import upkeep

        if repair:
            return _repair(upkeep.repair(url, lambda text: typer.echo(text, err=True)))
        found = upkeep.verify(url)
        for place, problems in found.items():
            for problem in problems or ["whole"]:
                typer.echo(f"{place}: {problem}")
        if number := sum(map(len, found.values())):
            raise StoreError(
                f"{url} does not hold what was written: {number} problem(s), listed above. In a run folder, verify "
                "with --repair has what is damaged of the run written again by its next start; ask for scores or an "
                "audit again with --fresh; else restore from a copy."
            )


def _repair(found: dict[str, store.Repair]) -> None:
    for place, done in found.items():
        for problem in done.problems:
            typer.echo(f"{place}: {problem}")
        for name in done.foreign:
            typer.echo(f"{place}: {name} is left alone. Remove it if it is not needed.")
        if done.needed:
            units = ", ".join(map(str, done.units or []))
            what = "all of it" if done.units is None else f"units {units}" if units else "the seal"
            typer.echo(f"{place}: {what} will be written again. Start the run again.")
    if not found:
        typer.echo("nothing to repair")


def inspect(url: UrlArgument, debug: Debug = False) -> None:
    """Print what a store holds."""
    with error_exits(debug):
        from fisher_ray import store

        found = store.describe(url)
        if found.get("attributes", {}).get("kind") == "metric":
            from fisher_ray.metric import LowRankMetric

            for key in ("bases", "parts", "layers"):  # told below
                found["attributes"].pop(key, None)
            found["metric"] = _shortened(LowRankMetric.load(url).summary())
        if found["kind"] == "features" and found["sealed"]:
            found["glance"] = store.glance(store.open_features(url))
        _print_mapping(found)


def _shortened(summary: dict[str, Any]) -> dict[str, Any]:
    """Leave the first and last of many eigenvalues."""
    from fisher_ray.store import bars

    for entry in [*summary["parts"], *summary["layers"]]:
        entry["spectrum"] = bars(list(entry["eigvals"]))
        values = [float(f"{value:.4g}") for value in entry["eigvals"]]
        entry["num_eigvals"] = len(values)
        entry["eigvals"] = values if len(values) <= 6 else [*values[:5], "…", values[-1]]
    return summary


def _read(path: Path, overrides: list[str] | None, output: str | None) -> Config:
    from fisher_ray.config import Config

    # JSON is YAML, and quotes what YAML would read as something else than text
    replaced = [] if output is None else [f"output={json.dumps(output)}"]
    return Config.from_yaml(path, [*(overrides or ()), *replaced])


def _run(
    config: Config, until: Until, address: str | None, fresh: bool, debug: bool, quiet: bool, as_json: bool
) -> None:
    from fisher_ray import pipeline, report

    warn_of_copy(config.output)
    with telling(quiet, as_json, debug) as progress:
        results = pipeline.run(config, address=address, fresh=fresh, until=until, progress=progress)
    said, ended = until or "report", until in (None, "report")
    place = config.output.rstrip("/") + ("/report/report.html" if ended else "")
    table = partial(report.render_table, results) if ended else None
    tell_done(as_json, place, results, said=said, table=table, until=said)


def warn_of_copy(output: str) -> None:
    """Say so if what is written to ``output`` would go with the job."""
    from fisher_ray.progress import new_console

    if _JOB_FOLDER in os.getcwd() and not output.startswith("/") and "://" not in output:
        new_console().print(
            f"note: output {output!r} is relative, and a job's working directory is a copy that Ray removes some time "
            "after the job. To keep the run folder, give --output an absolute path or an s3:// URL.",
            soft_wrap=True,
        )


def _print_mapping(values: dict[str, Any]) -> None:
    import yaml

    typer.echo(yaml.safe_dump(values, sort_keys=False, allow_unicode=True).rstrip())
