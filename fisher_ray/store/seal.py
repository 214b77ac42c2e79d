"""Which units of a feature store are whole, and the seal that says that all of them are."""

from __future__ import annotations

import re
from typing import Any

from fisher_ray.errors import StoreError
from fisher_ray.storage import Storage
from fisher_ray.store.chunks import checksum, entry
from fisher_ray.store.documents import each, fingerprint, pack, read_layouts, read_root, unpack
from fisher_ray.store.layout import ATTRIBUTE, MANIFESTS, ROOT, SCHEMA, SEAL, Layout, manifest_name, unit_rows
from fisher_ray.store.schema import Manifest, fault_of
from fisher_ray.store.zarr_group import metadata_files


def finished_units(url: str) -> set[int]:
    """Return the units whose manifest is whole and of this store, and whose chunks are there with the sizes it gives.

    Raises:
        StorageError: if storage does not answer.
    """
    return set(finished_manifests(Storage(url)))


def finished_manifests(storage: Storage) -> dict[int, dict[str, Any]]:
    """Return the manifests of :func:`finished_units`, by unit in order. Errors as there."""
    sizes = storage.sizes()
    if ROOT not in sizes:
        return {}
    store = checksum(storage.read_bytes(ROOT))
    manifests = read_manifests(storage, manifest_units(sizes))
    mine = {unit: content for unit, content in manifests.items() if content.get("store") == store}
    return {unit: content for unit, content in mine.items() if not missing_chunks(content, sizes)}


def seal(url: str, num_units: int) -> None:
    """Write ``seal.json`` with the totals, after every manifest and the presence of every chunk are checked.

    What killed writers left is cleared away; one that is late finds its beginning gone, and begins again.

    Raises:
        StoreError: naming what is missing, or if the store has another number of units.
        StorageError: if it cannot be written.
    """
    storage = Storage(url)
    own, attributes, root = read_root(storage)
    planned = -(-own["num_rows"] // own["unit_rows"])
    if num_units != planned:
        raise StoreError(f"{url} has {planned} units of {own['unit_rows']} rows, not {num_units}")
    sizes = storage.sizes()
    manifests = read_manifests(storage, manifest_units(sizes) & set(range(num_units)))
    if absent := [unit for unit in range(num_units) if unit not in manifests]:
        raise StoreError(f"{url}: units {_some(absent)} are not finished. Write them, then seal.")
    layouts, store = read_layouts(own), checksum(root)
    for unit, content in manifests.items():
        _check_manifest(url, unit, unit_rows(unit, own["unit_rows"], own["num_rows"]), layouts, content, store)
        if missing := missing_chunks(content, sizes):
            raise StoreError(f"{url}: chunks {_some(missing)} are missing. Write unit {unit} again, then seal.")
    storage.remove_partials()
    metadata = metadata_files(layouts.values(), {**attributes, ATTRIBUTE: own}) | {ROOT: root}
    for name, raw in metadata.items():
        if name != ROOT and (name not in sizes or storage.read_bytes(name) != raw):
            storage.write_bytes(name, raw)  # it was damaged meanwhile, and is not to be certified
    totals: dict[str, Any] = {
        "kind": "features",
        "num_units": num_units,
        **totals_of(manifests),
        "files": [entry(name, raw) for name, raw in sorted(metadata.items())],
        "units": [unit_fingerprint(manifests[unit]) for unit in range(num_units)],
    }
    storage.write_bytes(SEAL, pack(totals))


def manifest_units(names: Any) -> set[int]:
    """Return the units that have a file where a manifest belongs, out of the store's file names."""
    found = (re.fullmatch(rf"{MANIFESTS}/unit-(\d{{6,}})\.json", name) for name in names)
    return {int(match[1]) for match in found if match and match[0] == manifest_name(int(match[1]))}


def read_manifests(storage: Storage, units: set[int]) -> dict[int, dict[str, Any]]:
    """Return the contents of the whole manifests among ``units``; damaged or vanished ones are left out."""

    def read(unit: int) -> dict[str, Any] | None:
        try:
            content = unpack(storage.read_bytes(manifest_name(unit)))
        except FileNotFoundError:
            return None
        whole = content is not None and fault_of(Manifest, content) is None and content["unit"] == unit
        return content if whole else None

    order = sorted(units)
    contents = each(storage, read, order)
    return {unit: content for unit, content in zip(order, contents, strict=True) if content is not None}


def chunk_entries(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a manifest's chunks: key, size, crc32c."""
    return [item for chunks in content["arrays"].values() for item in chunks]


def totals_of(manifests: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Return what a seal says of all manifests of a store together."""
    contents = manifests.values()
    return {
        "schema": SCHEMA,
        "num_rows": sum(content["stop"] - content["start"] for content in contents),
        "num_bytes": sum(item["size"] for content in contents for item in chunk_entries(content)),
        "skipped": {row: reason for content in contents for row, reason in content["skipped"].items()},
    }


def missing_chunks(content: dict[str, Any], sizes: dict[str, int]) -> list[str]:
    """Return the chunks of a manifest that are not there with their size."""
    return [item["key"] for item in chunk_entries(content) if sizes.get(item["key"]) != item["size"]]


def unit_fingerprint(content: dict[str, Any]) -> int:
    """Return a checksum of all that a manifest says but the attempt, which may differ without harm."""
    return fingerprint({name: value for name, value in content.items() if name != "attempt"})


def _check_manifest(
    url: str, unit: int, rows: range, layouts: dict[str, Layout], content: dict[str, Any], store: int
) -> None:
    wanted = [layout.key(file) for layout in layouts.values() for file in layout.files(rows.start, rows.stop)]
    keys = [item["key"] for item in chunk_entries(content)]
    mine = (content["start"], content["stop"], content.get("store")) == (rows.start, rows.stop, store)
    if not mine or sorted(keys) != sorted(wanted):
        raise StoreError(f"{url}: {manifest_name(unit)} is not of this store. Write unit {unit} again.")


def _some(items: list[Any]) -> str:
    shown = ", ".join(map(str, items[:10]))
    return shown if len(items) <= 10 else f"{shown} and {len(items) - 10} more"
