import errno
import os
import pickle
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fisher_ray.errors import ConfigError, StorageError
from fisher_ray.storage import Storage
from tests.s3_server import SECRET, S3Server, s3_server, s3_url, set_environment

__all__ = ["s3_server", "s3_url"]


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def storage(request, tmp_path) -> Storage:
    return Storage(str(tmp_path / "place") if request.param == "local" else request.getfixturevalue("s3_url"))


@pytest.fixture
def tiny_disk(tmp_path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    place = tmp_path / "tiny"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_what_is_written_is_read_whole_and_in_ranges(storage):
    storage.write_bytes("a/b.bin", b"0123456789")
    assert storage.read_bytes("a/b.bin") == b"0123456789"
    assert storage.read_bytes("a/b.bin", 2, 5) == b"234"
    assert storage.read_bytes("a/b.bin", -3) == b"789"
    assert storage.read_array("a/b.bin").tobytes() == b"0123456789"
    assert storage.size("a/b.bin") == 10
    storage.write_bytes("a/b.bin", memoryview(b"new"))
    assert storage.read_bytes("a/b.bin") == b"new"


def test_an_empty_file_is_a_file(storage):
    storage.write_bytes("empty", b"")
    assert storage.exists("empty")
    assert storage.read_bytes("empty") == b""
    assert storage.read_array("empty").shape == (0,)


def test_folders_are_listed_and_removed_by_their_whole_name(storage):
    for name in ("ab/2", "ab/1", "abc/1", "top"):
        storage.write_bytes(name, b"x")
    assert storage.list() == ["ab/1", "ab/2", "abc/1", "top"]
    assert storage.list("ab") == storage.list("ab/") == ["ab/1", "ab/2"]
    assert storage.sizes("abc") == {"abc/1": 1}
    storage.remove("ab")
    storage.remove("ab")
    assert storage.list() == ["abc/1", "top"]
    storage.remove("")
    assert storage.list() == []


def test_what_is_not_there_stays_a_file_not_found(storage):
    storage.write_bytes("folder/file", b"x")
    for name in ("gone", "folder"):
        assert not storage.exists(name)
        for read in (storage.read_bytes, storage.read_array, storage.size):
            with pytest.raises(FileNotFoundError):
                read(name)
    assert not storage.exists("folder/file/below")
    assert storage.list("gone") == []


def test_a_storage_travels_to_other_processes(storage):
    storage.write_bytes("a", b"x")
    assert pickle.loads(pickle.dumps(storage)).read_bytes("a") == b"x"


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "a/../../b"])
def test_names_that_lead_out_of_the_folder_are_refused(storage, name):
    for act in (storage.read_bytes, storage.remove, lambda name: storage.write_bytes(name, b"")):
        with pytest.raises(StorageError, match="leads out"):
            act(name)


@pytest.mark.parametrize("url", ["", "s3://", "gs://bucket/x", "s3://AKIA:hush@bucket/x"])
def test_urls_that_cannot_be_used_are_refused_without_their_secrets(url):
    with pytest.raises(ConfigError) as caught:
        Storage(url)
    assert "hush" not in str(caught.value)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    storage = Storage(str(tmp_path))
    storage.write_bytes("a", b"old")

    def fail(_):
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match="input/output error"):
        storage.write_bytes("a", b"new")
    assert os.listdir(tmp_path) == ["a"]
    assert storage.read_bytes("a") == b"old"


def test_transient_failures_are_tried_again_and_the_time_is_bounded(tmp_path, monkeypatch):
    replace, calls = os.replace, []

    def busy_twice(*names):
        calls.append(names)
        if len(calls) <= 2:
            raise OSError(errno.EBUSY, "busy")
        replace(*names)

    monkeypatch.setattr(os, "replace", busy_twice)
    Storage(str(tmp_path)).write_bytes("a", b"x")
    assert len(calls) == 3

    calls.clear()
    with pytest.raises(StorageError, match="busy"):
        Storage(str(tmp_path), retry_s=0).write_bytes("a", b"x")
    assert len(calls) == 1


def test_a_folder_is_removed_although_another_still_writes_there(tmp_path, monkeypatch):
    storage, rmdir, late = Storage(str(tmp_path)), os.rmdir, []

    def written_to(*args, **options):
        if len(late) < 2:
            late.append(args)
            storage.write_bytes(f"sums/a/{len(late)}", b"late")
        return rmdir(*args, **options)

    storage.write_bytes("sums/a/0", b"x")
    monkeypatch.setattr(os, "rmdir", written_to)
    storage.remove("sums")
    assert len(late) == 2
    assert os.listdir(tmp_path) == []


def test_partial_files_are_unseen_and_can_be_cleared(tmp_path):
    storage = Storage(str(tmp_path))
    storage.write_bytes("a/b", b"x")
    (tmp_path / "a" / ".b.0123.partial").write_bytes(b"half")
    assert storage.list() == ["a/b"]
    storage.remove_partials()
    assert os.listdir(tmp_path / "a") == ["b"]


def test_a_file_where_a_folder_is_needed_is_told_at_once(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="file/a"):
        Storage(str(tmp_path / "file")).write_bytes("a", b"x")


def test_a_full_disk_is_told_with_its_place_and_keeps_what_was_there(tiny_disk):
    storage = Storage(str(tiny_disk))
    storage.write_bytes("small", b"kept")
    with pytest.raises(StorageError, match=r"big.*[Nn]o space.*Make room"):
        storage.write_bytes("big", bytes(2**20))
    assert storage.list() == ["small"]
    assert storage.read_bytes("small") == b"kept"
    storage.write_bytes("other", bytes(2**16))  # the half-written file gave its room back


def test_a_read_only_disk_is_told_with_its_place(tiny_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    with pytest.raises(StorageError, match="Read-only file system"):
        Storage(str(tiny_disk)).write_bytes("a", b"x")


@pytest.mark.s3
def test_large_objects_go_in_parts_and_come_back_whole(s3_url):
    data = os.urandom(2**20) * 101
    storage = Storage(s3_url)
    storage.write_bytes("large", memoryview(data))
    assert storage.size("large") == len(data)
    assert storage.read_array("large").tobytes() == data


@pytest.mark.s3
def test_a_missing_bucket_is_told_at_once_when_writing(s3_url):
    storage = Storage("s3://no-such-bucket/run")
    started = time.monotonic()
    with pytest.raises(StorageError, match="no-such-bucket"):
        storage.write_bytes("a", b"x")
    assert time.monotonic() - started < 20
    assert storage.list() == []
    assert not storage.exists("a")


@pytest.mark.s3
def test_a_vanished_server_is_a_storage_error_in_bounded_time_without_secrets(monkeypatch):
    server = S3Server()
    server.kill()
    set_environment(monkeypatch, server.endpoint.replace("http://", "http://user:hush@"))
    storage = Storage("s3://bucket/run", retry_s=1.0)
    started = time.monotonic()
    for act in (lambda: storage.read_bytes("a"), lambda: storage.write_bytes("a", b"x"), storage.list):
        with pytest.raises(StorageError, match="s3://bucket/run") as caught:
            act()
        assert "hush" not in str(caught.value)
        assert SECRET not in str(caught.value)
    assert time.monotonic() - started < 30


def test_credentials_are_struck_out_of_messages(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")

    def fail(*_):
        raise OSError(errno.EIO, "with very-secret and token-of-mine at https://me:pass@host/x")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(StorageError) as caught:
        Storage(str(tmp_path), {"token": "token-of-mine"}).write_bytes("a", b"x")
    for secret in ("very-secret", "token-of-mine", "pass"):
        assert secret not in str(caught.value)


@pytest.mark.parametrize(("given", "seconds"), [("", 60.0), ("8", 8.0)])
def test_how_long_is_tried_comes_from_the_environment(tmp_path, monkeypatch, given, seconds):
    monkeypatch.setenv("FISHER_RAY_RETRY_S", given)
    assert Storage(str(tmp_path))._retry_s == seconds
    monkeypatch.setenv("FISHER_RAY_RETRY_S", "a while")
    with pytest.raises(ConfigError, match="FISHER_RAY_RETRY_S is 'a while'"):
        Storage(str(tmp_path))
