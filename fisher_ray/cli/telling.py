"""How a command tells of its progress, and of what has come of it, as its options ask."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from fisher_ray.records import Progress


@contextmanager
def telling(quiet: bool, as_json: bool, debug: bool) -> Iterator[Progress]:
    """Configure logging, and yield what hears of the progress."""
    from fisher_ray.progress import JsonProgress, configure_logging, new_console, show_progress
    from fisher_ray.records import SilentProgress

    console = new_console()
    configure_logging(console, debug)
    if quiet:
        yield SilentProgress()
    elif as_json:
        yield JsonProgress(sys.stdout)
    else:
        with show_progress(console) as progress:
            yield progress


def tell_done(
    as_json: bool, place: str, results: Any, *, said: str, table: Callable[[], Any] | None = None, **more: Any
) -> None:
    """Print what has come of a command.

    Args:
        as_json: as one line of JSON: ``place``, ``results`` and ``more``.
        place: where it is.
        results: plain values.
        said: what it is called where ``place`` is told.
        table: makes what is printed before, for readers.
        more: for the line of JSON.
    """
    from rich.console import Console

    from fisher_ray.progress import JsonProgress

    if as_json:
        JsonProgress(sys.stdout).tell("done", **more, place=place, results=results)
        return
    if table is not None:
        Console().print(table())
    typer.echo(f"{said}: {place}")
