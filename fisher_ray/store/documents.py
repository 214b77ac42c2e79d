"""Small JSON files that carry their own checksum, so that half of one, or a changed one, is never believed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fisher_ray.errors import StoreError
from fisher_ray.storage import Storage
from fisher_ray.store.chunks import checksum
from fisher_ray.store.layout import ATTRIBUTE, ROOT, SCHEMA, SEAL, Layout
from fisher_ray.store.schema import Own, Seal, fault_of

T = TypeVar("T")
R = TypeVar("R")


def pack(content: dict[str, Any]) -> bytes:
    """Return ``content`` as JSON together with its checksum; the same bytes for the same content."""
    return _dump({"content": content, "crc32c": fingerprint(content)})


def unpack(raw: bytes) -> dict[str, Any] | None:
    """Return what :func:`pack` was given, or None if a byte is not as it wrote it."""
    try:
        content = json.loads(raw)["content"]
        return content if isinstance(content, dict) and pack(content) == raw else None
    except (ValueError, KeyError, TypeError, RecursionError):  # which packing raises too, of infinity and deep nesting
        return None


def fingerprint(content: dict[str, Any]) -> int:
    """Return the CRC-32C of ``content`` as JSON."""
    return checksum(_dump(content))


def plain(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return ``attributes`` as JSON gives them back.

    Raises:
        StoreError: if a value is not JSON, or the name is this program's own.
    """
    if ATTRIBUTE in attributes:
        raise StoreError(f"attribute {ATTRIBUTE!r} is this program's own. Give another name.")
    try:
        values: dict[str, Any] = json.loads(json.dumps(attributes, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise StoreError(f"attributes are not JSON: {error}. Give plain finite numbers, texts, lists.") from None
    return values


def check_own(own: dict[str, Any]) -> None:
    """Refuse what no reader would take.

    Raises:
        StoreError: naming the rule that this program's part of a group's attributes breaks.
    """
    if (fault := fault_of(Own, own)) is not None:
        raise StoreError(f"the store cannot be written: {fault}")


def read_root(storage: Storage) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """Return this program's part of the group's attributes, the other attributes, and the file's bytes.

    Raises:
        StoreError: if there is no group of this program and schema.
    """
    try:
        raw = storage.read_bytes(ROOT)
    except FileNotFoundError:
        raise StoreError(f"{storage.url} is not a store: it has no {ROOT}. Check the URL.") from None
    try:
        attributes = dict(json.loads(raw).get("attributes", {}))
        own = dict(attributes.pop(ATTRIBUTE))
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError):
        raise StoreError(f"{storage.url}: {ROOT} is damaged, or the group is not one of this program's") from None
    if isinstance(own.get("schema"), int) and own["schema"] != SCHEMA:
        raise StoreError(f"{storage.url} has schema {own['schema']}, this program reads {SCHEMA}. Write it again.")
    if (fault := fault_of(Own, own)) is not None:
        raise StoreError(f"{storage.url}: {ROOT} is damaged: {fault}. Restore it, or write the store again.")
    return own, attributes, raw


def read_layouts(own: dict[str, Any]) -> dict[str, Layout]:
    """Return the layouts in this program's part of the attributes, as :func:`read_root` returned them."""
    return {name: Layout.from_json(name, values) for name, values in own["arrays"].items()}


def read_seal(storage: Storage) -> dict[str, Any] | None:
    """Return the seal's content, or None without a seal.

    Raises:
        StoreError: if the seal is damaged.
    """
    try:
        raw = storage.read_bytes(SEAL)
    except FileNotFoundError:
        return None
    content = unpack(raw)
    fault = "wrong checksum" if content is None else fault_of(Seal, content)
    if fault is not None:
        raise StoreError(f"{storage.url}: {SEAL} is corrupt: {fault}. Restore it, or write the store again.")
    return content


def read_sealed(storage: Storage) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]:
    """Return :func:`read_root`'s attributes and the seal's content, which is None without a seal.

    Raises:
        StoreError: as :func:`read_root`, or if the group's attributes changed since it was sealed.
    """
    own, attributes, raw = read_root(storage)
    sealed = read_seal(storage)
    if sealed is not None and {item["key"]: item["crc32c"] for item in sealed["files"]}.get(ROOT) != checksum(raw):
        raise StoreError(f"{storage.url}: {ROOT} changed since it was sealed. Restore it, or write the store again.")
    if sealed is not None and sealed["kind"] != own["kind"]:
        raise StoreError(
            f"{storage.url}: {SEAL} is that of {sealed['kind']}, not {own['kind']}. Write the store again."
        )
    return own, attributes, sealed


def each(storage: Storage, act: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Return ``act`` of every item, in order: several wait for the network at once, or one for the disk."""
    with ThreadPoolExecutor(8 if storage.remote else 2) as threads:
        return list(threads.map(act, items))


def _dump(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()
