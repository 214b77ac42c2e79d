"""Documents and chunks changed at random: a typed error or the true values, in little memory, always soon."""

from __future__ import annotations

import json
import os
import random
import tracemalloc

import numpy as np
import pytest

from fisher_ray.errors import FisherRayError
from fisher_ray.store import describe, finished_units, load_arrays, open_features, save_arrays, verify
from fisher_ray.store.documents import pack
from tests.store.conftest import make_rows, snapshot, write_store

NUM_DOCUMENTS = int(os.environ.get("FISHER_RAY_FUZZ", "300"))
"""Changed documents; a tenth as many chunks."""
MAX_BYTES = 100 * 10**6
EXTREMES = [
    0,
    -1,
    1,
    7,
    2**31,
    2**40,
    2**62,
    10**30,
    0.5,
    -0.0,
    1e308,
    True,
    None,
    "",
    "x" * 5000,
    "../x",
    "/etc/passwd",
]
EXTREMES += [[], {}, [[]], [2**40] * 8, ["features"], {"features": {}}, "9" * 40, "float64", "object", "zstd"]


def leaves(value, path=()):
    """Every place in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in items:
        yield from leaves(below, (*path, key))


def changed(content, chance):
    """A JSON value with something replaced, removed, doubled or exchanged."""
    content = json.loads(json.dumps(content))
    places = [path for path in leaves(content) if path]
    for _ in range(chance.choice([1, 1, 1, 2, 5])):
        *above, last = chance.choice(places)
        holder = content
        try:
            for key in above:
                holder = holder[key]
            how = chance.randrange(4)
            if how == 0:
                del holder[last]
            elif how == 1 and isinstance(holder, list):
                holder.append(holder[last])
            elif how == 2 and isinstance(holder, dict):
                holder[chance.choice(["extra", "features", "", "..", "shape"])] = holder[last]
            else:
                holder[last] = chance.choice(EXTREMES)
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took the place away
    return json.loads(json.dumps(content))  # whose keys are words, also where a list has become an object


def damaged(raw, chance, *, document):
    """Bytes changed blindly, or a document changed in its meaning, with its own checksum made right half the time."""
    if document and chance.random() < 0.8:
        whole = json.loads(raw)
        if set(whole) == {"content", "crc32c"} and chance.random() < 0.8:
            return pack(changed(whole["content"], chance))
        return json.dumps(changed(whole, chance)).encode()
    data = bytearray(raw)
    for _ in range(chance.choice([1, 1, 3, 20])):
        how, place = chance.randrange(4), chance.randrange(len(data) + 1)
        if how == 0 and place < len(data):
            data[place] ^= 1 << chance.randrange(8)
        elif how == 1:
            del data[place : place + chance.randrange(1, 50)]
        elif how == 2:
            data[place:place] = chance.randbytes(chance.randrange(1, 50))
        else:
            data[place : place + 8] = data[: chance.randrange(1, 30)]
    return bytes(data)


def use_features(url):
    """All that reads a feature store; returns the values, if it opens."""
    finished_units(url)
    verify(url)
    describe(url)
    values = {}
    for partial in (True, False):
        store = open_features(url, allow_partial=partial)
        values = {name: store.read(name, 0, store.num_rows) for name in store.arrays}
        list(store.iter_chunks(list(store.arrays)))
        len(store.iter_batches(3, list(store.arrays), shuffle=True))
    return values, store.skipped


def attempt(act, url):
    """What comes of it, and how many bytes were held at once."""
    tracemalloc.start()
    try:
        return act(url), tracemalloc.get_traced_memory()[1]
    except FisherRayError:
        return None, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("codec", ["none", "zstd sharded", "blosc"])
def test_changed_documents_and_chunks_of_a_feature_store(tmp_path, codec):
    url, chance, survived = str(tmp_path / "s"), random.Random(codec), 0
    write_store(url, codec)
    whole, expected = snapshot(url), make_rows()
    documents = sorted(name for name in whole if name.endswith(".json"))
    chunks = sorted(set(whole) - set(documents))
    for number in range(NUM_DOCUMENTS // 3 + NUM_DOCUMENTS // 30):
        document = number < NUM_DOCUMENTS // 3
        name = chance.choice(documents if document else chunks)
        raw = damaged(whole[name], chance, document=document)
        path = tmp_path / "s" / name
        path.write_bytes(raw)
        if chance.random() < 0.3:
            (tmp_path / "s/seal.json").unlink(missing_ok=True)
        found, num_bytes = attempt(use_features, url)
        assert num_bytes < MAX_BYTES, (name, raw)
        if found is not None:
            survived += 1
            values, skipped = found
            readable = set(values) == set(expected) and not skipped and values["features"].shape == (21, 3, 5)
            if readable and name != "zarr.json":  # which says what the numbers mean, and without a seal is believed
                for key, rows in expected.items():
                    assert np.array_equal(values[key], rows), (name, raw)
        path.write_bytes(whole[name])
        (tmp_path / "s/seal.json").write_bytes(whole["seal.json"])
    assert verify(url) == []
    assert survived < NUM_DOCUMENTS // 2  # most are noticed; who does not read a manifest does not mind it


def test_changed_documents_and_chunks_of_a_group_of_arrays(tmp_path):
    url, chance = str(tmp_path / "s"), random.Random(1)
    arrays = {"eigvals": np.linspace(1, 0, 7), "pairs": np.arange(12).reshape(6, 2), "bias": np.float32(0.1)}
    save_arrays(url, arrays, {"kind": "metric"})
    whole = snapshot(url)
    for _ in range(NUM_DOCUMENTS // 2):
        name = chance.choice(sorted(whole))
        raw = damaged(whole[name], chance, document=name.endswith(".json"))
        (tmp_path / "s" / name).write_bytes(raw)
        found, num_bytes = attempt(lambda url: (verify(url), describe(url), load_arrays(url))[2], url)
        assert num_bytes < MAX_BYTES, (name, raw)
        if found is not None and name != "zarr.json":
            assert found[0].keys() == arrays.keys()
            assert all(np.array_equal(found[0][key], value) for key, value in arrays.items())
        (tmp_path / "s" / name).write_bytes(whole[name])
