"""A whole run on storage that refuses, delays, tears, resets and goes away."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fault_proxy import KINDS, FaultProxy
from tests.integration.processes import started, wait_for
from tests.integration.runs import DEMO, QUICK, bits
from tests.s3_server import KEY, SECRET, S3Server, make_bucket, s3_environment

OVERRIDES = [word for override in QUICK for word in ("--set", override)]


@pytest.mark.slow
@pytest.mark.s3
@pytest.mark.timeout(900)
def test_a_run_on_failing_storage_ends_with_the_same_bytes(undisturbed, tmp_path):
    import s3fs

    server = S3Server()
    proxy = FaultProxy(server.endpoint, rate=1 / 3)
    try:
        url = make_bucket(server.endpoint, "faults") + "/digits"
        settings = os.environ | s3_environment(proxy.endpoint) | {"FISHER_RAY_RETRY_S": "8"}
        files = s3fs.S3FileSystem(key=KEY, secret=SECRET, endpoint_url=server.endpoint, use_listings_cache=False)
        command = [sys.executable, "-m", "fisher_ray", "train", str(DEMO), "--output", url, *OVERRIDES]
        log, codes = tmp_path / "log", []
        while 0 not in codes and len(codes) < 8:
            with (
                log.open("ab") as stream,
                started(*command, stdout=stream, stderr=stream, env=settings) as process,
            ):
                if not codes:  # in the middle of its work the server is killed, and stays away
                    wait_for(
                        lambda: process.poll() is not None or files.glob(f"{url}/features/train.zarr/manifest/*"),
                        240,
                        "the first unit's features",
                    )
                    proxy.stop()
                    codes.append(process.wait(120))
                    assert codes == [4], log.read_text()
                    proxy.start()
                else:
                    codes.append(process.wait(400))
        assert codes[-1] == 0, log.read_text()
        assert set(codes) == {0, 4}
        assert set(proxy.faults) == set(KINDS), proxy.faults
        files.get(url, str(tmp_path / "copy"), recursive=True)
    finally:
        proxy.stop()
        server.kill()

    copied, whole = bits(tmp_path / "copy"), bits(undisturbed[0])
    assert copied == {name: whole[name] for name in copied}
    assert {name.partition("/")[0] for name in copied} == {"base", "basis.zarr", "metric.zarr", "features", "linear"}
    assert "run again" in log.read_text()
    assert SECRET not in log.read_text()


@pytest.fixture
def disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def remounted(disk: Path, how: str) -> bool:
    """Whether it could be; not while a file is open for writing."""
    return not subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], capture_output=True).returncode


@pytest.mark.slow
def test_a_run_whose_disk_becomes_read_only_resumes_to_the_same_bytes(undisturbed, disk, tmp_path):
    output, settings = disk / "run", os.environ | {"FISHER_RAY_RETRY_S": "5"}
    command = [sys.executable, "-m", "fisher_ray", "train", str(DEMO), "--output", str(output), *OVERRIDES]
    log = tmp_path / "log"
    with log.open("ab") as stream, started(*command, stdout=stream, stderr=stream, env=settings) as process:
        wait_for(lambda: [*output.glob("features/train.zarr/manifest/*")], 240, "the first unit's features")
        wait_for(lambda: remounted(disk, "ro"), 30, "a moment without open files")
        assert process.wait(120) == 4, log.read_text()
    assert "Read-only file system" in log.read_text()

    assert remounted(disk, "rw")
    with log.open("ab") as stream, started(*command, stdout=stream, stderr=stream, env=settings) as process:
        assert process.wait(240) == 0, log.read_text()
    found, whole = bits(output), bits(undisturbed[0])
    assert found == {name: whole[name] for name in found}
    assert any(name.startswith("linear/") for name in found)
