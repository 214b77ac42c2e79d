"""Holding a store against what its writers said: every file, every byte."""

from __future__ import annotations

import math
from typing import Any

from fisher_ray.errors import StoreError
from fisher_ray.storage import Storage
from fisher_ray.store.chunks import is_intact
from fisher_ray.store.documents import each, read_layouts, read_root, read_seal, read_sealed
from fisher_ray.store.layout import ROOT, SEAL, Layout, manifest_name
from fisher_ray.store.seal import (
    chunk_entries,
    finished_units,
    manifest_units,
    read_manifests,
    totals_of,
    unit_fingerprint,
)

FOREIGN = "foreign"
"""How a problem begins that is a file too many."""


def verify(url: str) -> list[str]:
    """Read every file of a store or group and return its problems, one line each; none if it is whole.

    Missing files, files of another size or checksum, files that no one announced, and a missing seal.

    Raises:
        StoreError: if there is no store of this program at ``url``.
        StorageError: if storage does not answer.
    """
    return [f"{name}: {what}" for name, what in find_problems(Storage(url))]


def find_problems(storage: Storage) -> list[tuple[str, str]]:
    """Return the problems that :func:`verify` tells of, as names of files and what is wrong with them."""
    sizes = storage.sizes()
    if SEAL not in sizes:
        return _verify_unsealed(storage, sizes)
    try:
        sealed = read_seal(storage)
    except StoreError:
        sealed = None
    if sealed is None:
        return [(SEAL, "wrong checksum, so nothing can be held against it")]
    problems, announced = [], {item["key"]: item for item in sealed["files"]}
    units = range(sealed.get("num_units", 0))
    manifests = read_manifests(storage, set(units))
    for unit in units:
        if manifest_name(unit) not in sizes:
            problems.append((manifest_name(unit), "missing"))
        elif unit not in manifests or unit_fingerprint(manifests[unit]) != sealed["units"][unit]:
            problems.append((manifest_name(unit), "wrong checksum, so the unit's chunks cannot be checked"))
    announced |= {item["key"]: item for content in manifests.values() for item in chunk_entries(content)}
    unchecked = {unit for unit in units if unit not in manifests}
    known = {SEAL, *map(manifest_name, units), *announced}
    if not unchecked:  # else chunks of these units would pass for foreign ones
        problems += [(name, f"{FOREIGN}, no manifest names it") for name in sizes if name not in known]
    totals = totals_of(manifests)
    if not problems and sealed["kind"] == "features" and {**sealed, **totals} != sealed:
        problems.append((SEAL, "its totals are not those of the manifests"))
    return problems + _compare(storage, announced, sizes)


def describe(url: str) -> dict[str, Any]:
    """Return what a store or group holds, in plain values; no chunk is read.

    Raises:
        StoreError: if there is no store of this program at ``url``.
        StorageError: if storage does not answer.
    """
    storage = Storage(url)
    own, attributes, sealed = read_sealed(storage)
    sizes = storage.sizes()
    found = {"url": url, "kind": own["kind"], "schema": own["schema"], "sealed": sealed is not None}
    found |= {"num_files": len(sizes), "num_bytes": sum(sizes.values())}
    if own["kind"] == "features":
        units = {"planned": -(-own["num_rows"] // own["unit_rows"]), "finished": len(finished_units(url))}
        found |= {"num_rows": own["num_rows"], "unit_rows": own["unit_rows"], "units": units}
        found["num_skipped"] = len(sealed["skipped"]) if sealed else None
    arrays = {}
    for name, layout in read_layouts(own).items():
        stored = sum(size for key, size in sizes.items() if key.startswith(f"{name}/c"))
        data = math.prod(layout.shape) * layout.stored_dtype.itemsize
        arrays[name] = {**layout.to_json(), "chunks": layout.num_chunks, "stored_bytes": stored}
        if sealed is not None and stored:
            arrays[name]["compression_ratio"] = round(data / stored, 3)
    return {**found, "arrays": arrays, "attributes": attributes}


def _verify_unsealed(storage: Storage, sizes: dict[str, int]) -> list[tuple[str, str]]:
    own, _, _ = read_root(storage)
    layouts, units = read_layouts(own), manifest_units(sizes)
    problems = [(SEAL, "missing, the store is not sealed: its writers did not end")]
    metadata = {f"{name}/{ROOT}" for name in layouts}
    problems += [(name, "missing") for name in sorted(metadata - set(sizes))]
    manifests = read_manifests(storage, units)
    problems += [(manifest_name(unit), "wrong checksum") for unit in sorted(units - set(manifests))]
    known = {ROOT, *metadata, *map(manifest_name, units)}
    strange = (name for name in sizes if name not in known and not _is_chunk(name, layouts))
    problems += [(name, f"{FOREIGN}, no array has it") for name in strange]
    announced = {item["key"]: item for content in manifests.values() for item in chunk_entries(content)}
    return problems + _compare(storage, announced, sizes)


def _is_chunk(name: str, layouts: dict[str, Layout]) -> bool:
    """Whether a file is where an array has one of its chunks."""
    parts = name.split("/")
    layout, number = layouts.get(parts[0]), parts[2] if len(parts) > 2 else "0"
    if layout is None or not number.isdecimal() or len(number) > 15:
        return False
    return int(number) < layout.num_files and layout.key(int(number)) == name


def _compare(storage: Storage, announced: dict[str, dict[str, Any]], sizes: dict[str, int]) -> list[tuple[str, str]]:
    def compare(name: str) -> str | None:
        wanted = announced[name]
        if name not in sizes:
            return "missing"
        if sizes[name] != wanted["size"]:
            return f"wrong size, {sizes[name]} bytes instead of {wanted['size']}"
        try:
            raw = storage.read_bytes(name)
        except FileNotFoundError:
            return "missing"
        return None if is_intact(wanted, raw) else "wrong checksum"

    names = sorted(announced)
    found = zip(names, each(storage, compare, names), strict=True)
    return [(name, what) for name, what in found if what is not None]
