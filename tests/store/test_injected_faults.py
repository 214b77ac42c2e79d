"""Whatever is changed in a sealed store, ``verify`` names it, and nothing else."""

from __future__ import annotations

import json
import os
import random

import pytest

from fisher_ray.store import verify
from fisher_ray.store.documents import pack, unpack
from tests.store.conftest import Store, write_store

NUM_FAULTS = int(os.environ.get("FISHER_RAY_FAULTS", "300"))
KINDS = ("flip", "truncate", "extend", "delete", "swap", "edit manifest", "edit manifest and its checksum", "add")


def inflict(store: Store, whole: dict[str, bytes], kind: str, chance: random.Random) -> set[str]:
    """Change the store, and return the names of the files that are wrong now."""
    names = sorted(whole)
    chunks = [name for name in names if "/c/" in name]
    name = chance.choice(names)
    raw = whole[name]
    if kind == "flip":
        place, bit = chance.randrange(len(raw)), 1 << chance.randrange(8)
        raw = raw[:place] + bytes([raw[place] ^ bit]) + raw[place + 1 :]
    elif kind == "truncate":
        raw = raw[: chance.randrange(len(raw))]
    elif kind == "extend":
        raw += chance.randbytes(chance.randrange(1, 9))
    elif kind == "delete":
        store.path(name).unlink()
        return {name}
    elif kind == "swap":
        array = chance.choice(["features", "index", "logits"])  # of which no two chunks are the same
        one, other = chance.sample([chunk for chunk in chunks if chunk.startswith(f"{array}/")], 2)
        store.path(one).write_bytes(whole[other])
        store.path(other).write_bytes(whole[one])
        return {one, other}
    elif kind == "add":
        name = chance.choice(["features/c/9/0/0", "notes.txt", "manifest/unit-000009.json", "labels/c/7"])
        store.path(name).parent.mkdir(parents=True, exist_ok=True)
        store.path(name).write_bytes(b"x")
        return {name}
    else:
        name = chance.choice([name for name in names if name.startswith("manifest/")])
        content = unpack(whole[name])
        assert content is not None
        entry = chance.choice([item for items in content["arrays"].values() for item in items])
        where = chance.choice(["crc32c", "size", "start", "skipped"])
        if where == "skipped":
            content["skipped"] = {str(content["start"]): "torn"}
        elif where == "start":
            content["start"] += 1
        else:
            entry[where] += 1
        raw = pack(content) if "checksum" in kind else whole[name].replace(b'"attempt": 1', b'"attempt": 2')
        if "checksum" not in kind:
            assert json.loads(raw)["content"]["attempt"] == 2
    store.path(name).write_bytes(raw)
    return {name}


@pytest.mark.parametrize("codec", ["none", "zstd sharded", "blosc"])
def test_every_injected_fault_is_named_and_no_other(tmp_path, codec):
    write_store(str(tmp_path / "s"), codec)
    store, chance = Store(str(tmp_path / "s")), random.Random(codec)
    whole = store.files
    for number in range(NUM_FAULTS // 3):
        kind = KINDS[number % len(KINDS)]
        wrong = inflict(store, whole, kind, chance)
        found = {problem.partition(": ")[0] for problem in verify(store.url)}
        assert wrong <= found, (kind, wrong, found)
        if not any(name.startswith("manifest/") for name in wrong):
            assert found == wrong, (kind, wrong, found)
        for name in set(store.files) - set(whole):
            store.path(name).unlink()
        for name in wrong & set(whole):
            store.path(name).write_bytes(whole[name])
    assert verify(store.url) == []
