"""From a split's configuration to its source."""

from __future__ import annotations

import glob
import os
from typing import Any

from fisher_ray.config import SourceConfig
from fisher_ray.data.arrays import ArraySource, load_numpy
from fisher_ray.data.arrow import ArrowSource, saved_files
from fisher_ray.data.folders import FolderSource
from fisher_ray.data.map_style import MapStyleSource
from fisher_ray.data.parquet import ParquetSource
from fisher_ray.data.pictures import Columns
from fisher_ray.data.ranges import find_objects, is_url
from fisher_ray.data.source import Source, Transform
from fisher_ray.data.tars import TarSource
from fisher_ray.errors import ConfigError, FisherRayError
from fisher_ray.plugins import load_reference


def open_source(config: SourceConfig, *, root: str, transform: str | None, key: str) -> Source:
    """Open one split: footers and headers are read, no samples.

    Args:
        config: the split's section.
        root: ``data.root``, joined to relative paths.
        transform: ``data.transform``.
        key: the section's name, such as ``data.shallow``, for messages.

    Raises:
        ConfigError: if a file, function or row is not there.
        DataError: if columns or arrays are wrong.
        StorageError: if a file cannot be read.
    """
    function = _load_function(transform, "data.transform") if transform is not None else None
    if config.format == "torch":
        name = str(config.factory)
        return MapStyleSource(name, _make(name, config.kwargs, key), config.rows, key, function)
    path, columns = str(config.path), Columns(config.image_column, config.label_column)
    place = _join(root, path)
    if config.format == "parquet":
        return ParquetSource(_find(root, path, key), columns, config.rows, key, function)
    if config.format == "images":
        return FolderSource(place, config.classes, config.rows, key, function)
    if config.format == "zarr":
        return _open_zarr(place, config, key, function)
    if is_url(place):
        instead = {"numpy": "zarr"}.get(config.format, "parquet")
        raise ConfigError(
            f"{key}.path: {place} is a URL; format {config.format} reads local files. Mount or copy it on every node, "
            f"or use format {instead}."
        )
    if config.format == "arrow":
        paths = saved_files(place, key) if os.path.isdir(place) else _find(root, path, key)
        return ArrowSource(paths, columns, config.rows, key, function)
    if config.format == "webdataset":
        return TarSource(_find(root, path, key, ".tar"), config.rows, key, function)
    return ArraySource(place, load_numpy(place, key), config.rows, key, function)


def _open_zarr(url: str, config: SourceConfig, key: str, transform: Transform | None) -> Source:
    from fisher_ray.store import open_arrays  # Zarr takes a while to import, and few splits need it

    if "://" not in url and not os.path.isdir(url):
        raise ConfigError(f"{key}.path: there is no folder {url}. Correct the path, or data.root.")
    return ArraySource(url, open_arrays(url), config.rows, key, transform)


def _load_function(reference: str, key: str) -> Any:
    function = load_reference(reference, key)
    if not callable(function):
        raise ConfigError(f"{key}: {reference!r} is {type(function).__name__}, not a function. Name a function.")
    return function


def _make(reference: str, kwargs: dict[str, Any], key: str) -> Any:
    factory = _load_function(reference, f"{key}.factory")
    try:
        return factory(**kwargs)
    except FisherRayError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{key}.factory: {reference!r} called with {kwargs} raised {type(error).__name__}: {error}. "
            f"Correct {key}.kwargs, or the function."
        ) from error


def _join(root: str, path: str) -> str:
    return path if is_url(path) else os.path.join(root, path)


def _find(root: str, path: str, key: str, suffix: str = ".parquet") -> list[str]:
    """Return the files that ``path``, a file or a pattern, names under ``root``, sorted."""
    place = _join(root, path)
    if is_url(place):
        if not (found := find_objects(place)):
            raise ConfigError(f"{key}.path: no object matches {place}. Correct the path or pattern, or data.root.")
        return found
    if os.path.isdir(place):
        raise ConfigError(f"{key}.path: {place} is a folder. Give a file or a pattern, such as {place}/*{suffix}.")
    if os.path.exists(place):  # before patterns: a name may contain their characters
        return [place]
    found = sorted(glob.glob(os.path.join(glob.escape(root), path), recursive=True))
    if not found:
        raise ConfigError(f"{key}.path: no file matches {place}. Correct the path or pattern, or data.root.")
    return found
