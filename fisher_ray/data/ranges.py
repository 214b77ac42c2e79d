"""Files on object storage, read in parts."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from fisher_ray.storage import Storage

BUFFER_BYTES = 2**20
"""As much as is fetched for a small read, since the next one follows it."""
_PATTERN = frozenset("*?[")


def is_url(path: str) -> bool:
    """Whether a path is on object storage, or ``file://``."""
    return "://" in path


def open_file(path: str) -> BinaryIO:
    """Open a local file, or an object whose parts are fetched when they are read.

    Raises:
        OSError: if there is no such file, or it cannot be read.
        StorageError: if storage does not answer.
    """
    return io.BufferedReader(_Ranges(path), BUFFER_BYTES) if is_url(path) else open(path, "rb")


def file_size(path: str) -> int:
    """Return the bytes of a local file or an object. Errors as :func:`open_file`."""
    if not is_url(path):
        return os.path.getsize(path)
    storage, name = _split(path)
    with _naming(path):
        return storage.size(name)


def find_objects(url: str) -> list[str]:
    """Return the URLs that a URL names, sorted: itself, or as a pattern of which ``*`` stays within one folder.

    Raises:
        StorageError: if storage does not answer.
    """
    storage, name = _split(url)
    if storage.exists(name):  # before patterns: a name may contain their characters
        return [url]
    scheme, _, place = url.partition("://")
    parts = PurePosixPath(place).parts
    fixed = next((number for number, part in enumerate(parts) if _PATTERN & set(part)), len(parts))
    folder, wanted = f"{scheme}://{'/'.join(parts[:fixed])}", parts[fixed:]
    if not wanted:
        return []
    return sorted(f"{folder}/{name}" for name in Storage(folder).list() if _matches(PurePosixPath(name).parts, wanted))


def _matches(parts: tuple[str, ...], wanted: tuple[str, ...]) -> bool:
    if not wanted or not parts:
        return not wanted and not parts
    if wanted[0] == "**":
        return _matches(parts, wanted[1:]) or _matches(parts[1:], wanted)
    return fnmatchcase(parts[0], wanted[0]) and _matches(parts[1:], wanted[1:])


def _split(url: str) -> tuple[Storage, str]:
    folder, _, name = url.rpartition("/")
    return Storage(folder), name


@contextmanager
def _naming(url: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url) from None


class _Ranges(io.RawIOBase):
    """One object; each read that a buffer asks for is a request, tried again as all of storage's."""

    def __init__(self, url: str) -> None:
        self._url, self._place, self._size = url, 0, file_size(url)
        self._storage, self._name = _split(url)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        self._place = start + offset
        return self._place

    def readinto(self, buffer: Any) -> int:
        stop = min(self._place + len(buffer), self._size)
        if stop <= self._place:
            return 0
        with _naming(self._url):
            data = self._storage.read_bytes(self._name, self._place, stop)
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)
