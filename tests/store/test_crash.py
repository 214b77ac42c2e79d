import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import google_crc32c
import numpy as np
import pytest

from fisher_ray.errors import StorageError
from fisher_ray.records import Unit
from fisher_ray.store import ArraySpec, StoreWriter, create_store, finished_units, open_features, seal, verify
from tests.store.conftest import make_spec

WRITER = """
import sys, numpy as np
from fisher_ray.records import Unit
from fisher_ray.store import StoreWriter
print("ready", flush=True)
values = np.ones((512, 4096), np.float32)
while True:
    for unit in range(4):
        StoreWriter(sys.argv[1]).write_unit(Unit(unit, unit * 512, unit * 512 + 512), {"x": values})
"""

NUM_KILLS = int(os.environ.get("FISHER_RAY_KILLS", "4"))
"""Each starts a process of its own; 50 take a minute."""
NOBODY = 65534
"""A user without rights."""


def test_a_killed_writer_leaves_no_torn_chunk(tmp_path):
    url = tmp_path / "s"
    spec = make_spec(num_rows=2048, unit_rows=512, chunk_rows=256)
    spec = replace(spec, arrays={"x": ArraySpec((4096,), "float16", ("sample", "rank"))})
    for round_ in range(NUM_KILLS):
        delay_s = 0.05 * (round_ * 0.618 % 1)  # another moment of the writing each time
        create_store(str(url), spec)
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(url)], stdout=subprocess.PIPE, text=True)
        with writer:
            assert writer.stdout.readline() == "ready\n"
            deadline = time.monotonic() + 60
            while not list(url.glob("x/c/*/*")):
                assert time.monotonic() < deadline
            time.sleep(delay_s)
            os.kill(writer.pid, signal.SIGKILL)
        for path in url.glob("x/c/*/0"):
            raw = path.read_bytes()
            assert len(raw) == 256 * 4096 * 2 + 4
            assert google_crc32c.value(raw[:-4]) == int.from_bytes(raw[-4:], "little")
        assert verify(str(url)) == ["seal.json: missing, the store is not sealed: its writers did not end"]
    for unit in range(4):
        values = np.ones((512, 4096), np.float32)
        StoreWriter(str(url)).write_unit(Unit(unit, unit * 512, unit * 512 + 512), {"x": values}, attempt=2, skipped={})
    create_store(str(url), spec)
    seal(str(url), 4)
    assert verify(str(url)) == []
    assert not list(url.rglob("*.partial"))


def test_a_full_disk_keeps_finished_units_readable(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    place = tmp_path / "tiny"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        url = str(place / "s")
        arrays = {"x": ArraySpec((8192,), "float32", ("sample", "rank"))}
        create_store(url, make_spec(num_rows=48, arrays=arrays))
        write_big = {"x": np.ones((8, 8192), np.float32)}
        StoreWriter(url).write_unit(Unit(0, 0, 8), write_big)
        StoreWriter(url).write_unit(Unit(1, 8, 16), write_big)
        StoreWriter(url).write_unit(Unit(2, 16, 24), write_big)
        with pytest.raises(StorageError, match="No space left"):
            StoreWriter(url).write_unit(Unit(3, 24, 32), write_big)
        assert finished_units(url) == {0, 1, 2}
        np.testing.assert_array_equal(open_features(url, allow_partial=True).read("x", 0, 8), write_big["x"])
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_rights_that_are_lost_in_the_middle_keep_finished_units_readable():
    if os.geteuid() != 0:
        pytest.skip("becoming another user needs root, whom rights do not bind")
    with tempfile.TemporaryDirectory() as name:
        place, rows = Path(name), {"x": np.ones((8, 4), np.float32)}
        os.chown(place, NOBODY, NOBODY)
        url = str(place / "s")
        os.seteuid(NOBODY)
        try:
            create_store(url, make_spec(num_rows=24, arrays={"x": ArraySpec((4,), "float32", ("sample", "rank"))}))
            StoreWriter(url).write_unit(Unit(0, 0, 8), rows)
            (place / "s" / "x" / "c").chmod(0o555)
            with pytest.raises(StorageError, match=r"Permission denied.*Give this user the right to write there"):
                StoreWriter(url).write_unit(Unit(1, 8, 16), rows)
            assert finished_units(url) == {0}
            (place / "s" / "x" / "c").chmod(0o755)
            StoreWriter(url).write_unit(Unit(1, 8, 16), rows)
            StoreWriter(url).write_unit(Unit(2, 16, 24), rows)
            seal(url, 3)
            assert verify(url) == []
        finally:
            os.seteuid(0)
