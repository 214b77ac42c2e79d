"""How a command ends: one paragraph on stderr, and the exit code that says whose move is next."""

from __future__ import annotations

import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import typer

from fisher_ray.errors import FisherRayError, StoppedError


@contextmanager
def error_exits(debug: bool = False) -> Iterator[None]:
    """Run a command's body so that every failure ends as ``error: ...`` and an exit code.

    SIGTERM interrupts the body as Ctrl-C does, so that it can let its workers go.

    Args:
        debug: print the traceback too.

    Raises:
        typer.Exit: with the error's ``exit_code``; 4 for Ctrl-C and SIGTERM; 1 for anything unforeseen.
    """
    with _sigterm_as_interrupt():
        try:
            yield
        except KeyboardInterrupt:
            _interrupted(debug)
        except SystemExit as error:
            # Connecting to Ray replaces the handler above by one that calls sys.exit(SIGTERM).
            if error.code != signal.SIGTERM:
                raise
            _interrupted(debug)
        except FisherRayError as error:
            _end(str(error), error.exit_code, debug)
        except Exception as error:  # noqa: BLE001 - the last frame that can still turn it into a message
            hint = "" if debug else " Run again with --debug for the traceback."
            _end(f"unexpected {type(error).__name__}: {error}.{hint}", FisherRayError.exit_code, debug)


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers, or is interrupted by them
        return
    before = signal.signal(signal.SIGTERM, _raise_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _raise_interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _interrupted(debug: bool) -> NoReturn:
    _end("interrupted before the end. Run the same command again to resume.", StoppedError.exit_code, debug)


def _end(message: str, code: int, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    raise typer.Exit(code)
