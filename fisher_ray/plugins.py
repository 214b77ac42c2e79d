"""Import of what a configuration names as ``module:name``: the one place where the user's own code is loaded."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from typing import Any

from fisher_ray.errors import ConfigError, FisherRayError


def load_reference(reference: str, key: str) -> Any:
    """Return the object that ``module:name`` names; the module's code runs.

    Modules are found as Python finds them, and in the working directory, which is put first on ``sys.path`` if it is
    not there.

    Args:
        reference: ``module:name``, both possibly dotted.
        key: the configuration key it came from, for messages.

    Raises:
        ConfigError: if the form is wrong, the module cannot be imported, or it has no such name.
    """
    module_name, colon, name = reference.partition(":")
    if not colon or not all(part.isidentifier() for part in f"{module_name}.{name}".split(".")):
        raise ConfigError(f"{key}: {reference!r} is not of the form module:name. Write it as package.module:function.")
    module = _import(module_name, reference, key)
    try:
        return functools.reduce(getattr, name.split("."), module)
    except AttributeError:
        raise ConfigError(
            f"{key}: {reference!r}: {module_name!r} ({getattr(module, '__file__', 'built in')}) has no {name!r}. "
            "Correct the name, or define it there."
        ) from None


def _import(module_name: str, reference: str, key: str) -> Any:
    folder = os.getcwd()
    if not {"", folder} & set(sys.path):
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(module_name)
    except FisherRayError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{key}: {reference!r}: importing {module_name!r} failed: {type(error).__name__}: {error}. "
            f"Modules are looked for in the working directory ({folder}), on PYTHONPATH and among installed packages."
        ) from error
