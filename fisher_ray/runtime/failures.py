"""What Ray says of failures, put into the program's words."""

from __future__ import annotations

from typing import NoReturn

import ray.exceptions


def reason(error: BaseException) -> str:
    """Return an error's kind and first line, without Ray's wrapping."""
    cause = getattr(error, "cause", None) or error
    lines = str(cause).strip().splitlines() or [""]
    return f"{type(cause).__name__}: {lines[-1] if isinstance(cause, ray.exceptions.RayError) else lines[0]}"


def raise_cause(error: ray.exceptions.RayTaskError) -> NoReturn:
    """Raise what the worker raised, without Ray's wrapping; its traceback stays as the cause."""
    if isinstance(error.cause, Exception) and not isinstance(error.cause, ray.exceptions.RayError):
        raise error.cause from error
    raise error
