"""The command of ``jobs/compare.py``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from fisher_ray.cli.commands import Overrides, warn_of_copy
from fisher_ray.cli.exits import error_exits
from fisher_ray.cli.options import Address, Debug, Quiet
from fisher_ray.errors import FisherRayError

Only = Annotated[
    list[str] | None,
    typer.Option("--only", metavar="KEY=VALUE", help="Some of the runs, as in steps=1800 or seed=0; repeatable."),
]
ExperimentOption = Annotated[Path, typer.Option("--config", metavar="PATH", help="The experiment, a YAML file.")]
Place = Annotated[str | None, typer.Option("--output", metavar="URL", help="The experiment's folder.")]


def compare(arguments: Sequence[str] | None = None) -> None:
    """Make an experiment's runs, compare them, and exit.

    Args:
        arguments: by default the process's.
    """
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(help="Make the runs of an experiment that are not finished yet, and compare what all of them found.")(
        _compare
    )
    app(args=arguments)


def _compare(
    config: ExperimentOption,
    output: Place = None,
    overrides: Overrides = None,
    only: Only = None,
    address: Address = None,
    debug: Debug = False,
    quiet: Quiet = False,
) -> None:
    with error_exits(debug):
        from fisher_ray.experiment import Experiment, collect, run_experiment, write_comparison
        from fisher_ray.progress import configure_logging, new_console
        from fisher_ray.records import SilentProgress
        from fisher_ray.storage import Storage

        experiment = Experiment.from_yaml(config)
        experiment = experiment.model_copy(update={"output": output or experiment.output})
        configure_logging(new_console(), debug)
        warn_of_copy(experiment.output)
        experiment = experiment.located()
        progress = SilentProgress() if quiet else None
        planned, told = experiment.chosen(only or []), partial(typer.echo, err=True)
        failed = run_experiment(experiment, planned, overrides or [], address, progress=progress, told=told)
        if runs := collect(experiment):
            storage = Storage(experiment.output)
            write_comparison(storage, runs)
            typer.echo(storage.read_bytes("compare.md").decode())
            typer.echo(f"comparison: {storage.url}/compare.html")
        if failed:
            first, reason = next(iter(failed.items()))
            raise FisherRayError(f"{len(failed)} of {len(planned)} runs failed; the first, {first.folder}: {reason}")
