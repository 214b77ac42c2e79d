"""The state of a training, kept in the run folder: one safetensors file, replaced as a whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from fisher_ray.errors import StoreError
from fisher_ray.storage import Storage

_KEY = "training"

Tensors = dict[str, Tensor]
Course = TypeVar("Course")


def save_state(
    storage: Storage, name: str, parts: Mapping[str, Tensors], course: Mapping[str, Any], fingerprint: str
) -> None:
    """Write all that a training's next step depends on.

    Args:
        storage: of the run folder.
        name: of the file.
        parts: tensors by part and name; a part's name has no dot.
        course: plain values.
        fingerprint: of all that the state depends on.
    """
    tensors = {f"{part}.{key}": value.contiguous() for part, values in parts.items() for key, value in values.items()}
    metadata = {_KEY: json.dumps({"fingerprint": fingerprint, "course": dict(course)})}
    storage.write_bytes(name, safetensors.torch.save(tensors, metadata))


def load_state(
    storage: Storage, name: str, fingerprint: str, to_course: Callable[[dict[str, Any]], Course]
) -> tuple[Course, dict[str, Tensors]] | None:
    """Return what :func:`save_state` wrote, without parts that are empty; None if there is none, or another training's.

    Args:
        storage: of the run folder.
        name: of the file.
        fingerprint: of all that the state depends on.
        to_course: makes the course of its plain values.

    Raises:
        StoreError: if it is damaged.
    """
    try:
        raw = storage.read_bytes(name)
    except FileNotFoundError:
        return None
    try:
        found = json.loads(json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"][_KEY])
        if found["fingerprint"] != fingerprint:
            return None
        tensors, course = safetensors.torch.load(raw), to_course(found["course"])
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise StoreError(
            f"{storage.url}/{name} is damaged: {error}. Remove it to train from the beginning, then run again."
        ) from error
    parts: dict[str, Tensors] = {}
    for full, value in tensors.items():
        part, _, key = full.partition(".")
        parts.setdefault(part, {})[key] = value
    return course, parts
