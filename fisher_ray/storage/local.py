"""Files below a local folder."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np

Bytes = bytes | bytearray | memoryview
Fold = Callable[[int, np.ndarray], int]
BLOCK_BYTES, REST_BYTES = 1 << 20, 64
"""What is read at a time where bytes are looked at as they come, and as much as is told of what nobody has room for."""
PARTIAL = ".partial"
"""Ending of files whose writer has not finished, or was killed: ``.NAME.<hexadecimal digits>.partial``."""

_TRANSIENT = {errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT}
_TRANSIENT |= {errno.ENOENT, errno.ENOTEMPTY}  # one removes a folder while another writes there


class LocalFiles:
    """The files below a folder; every name is relative to it."""

    failures: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, root: str) -> None:
        """See the class."""
        self.root = Path(root)

    def is_transient(self, error: Exception) -> bool:
        """Return whether the same call may go well a little later."""
        return isinstance(error, OSError) and error.errno in _TRANSIENT

    def read(self, name: str, start: int | None, stop: int | None) -> bytes:
        """Return the bytes of a file, or of its range ``[start, stop)``."""
        try:
            self.size(name)  # which knows of pipes, that would wait for a writer
            with open(self.root / name, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                first, last, _ = slice(start, stop).indices(size)
                file.seek(first)
                return file.read(max(last - first, 0))
        except (IsADirectoryError, NotADirectoryError):
            raise FileNotFoundError(errno.ENOENT, "no such file", str(self.root / name)) from None

    def read_array(self, name: str) -> np.ndarray:
        """Return the bytes of a file, uint8 ``(size,)``."""
        data = np.empty(self.size(name), np.uint8)  # NumPy's memory has huge pages: ten times as quick as bytes
        with open(self.root / name, "rb") as file:
            return data[: file.readinto(data.data)]

    def read_into(self, name: str, target: np.ndarray, fold: Fold) -> tuple[int, bytes]:
        """Fill ``target`` and fold its bytes, as :meth:`Storage.read_into` says."""
        self.size(name)  # which knows of folders
        with open(self.root / name, "rb", buffering=0) as file:
            folded, place = 0, 0
            while place < len(target):
                size = file.readinto(target[place : place + BLOCK_BYTES].data) or 0
                if not size:
                    break
                folded = fold(folded, target[place : place + size])
                place += size
            return folded, file.read(REST_BYTES)

    def write(self, name: str, data: Bytes, settle: bool) -> None:
        """Put the whole of ``data`` at ``name``, or nothing."""
        path = self.root / name
        made = _make_folder(path.parent)
        unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL}")
        try:
            with open(unfinished, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except BaseException:
            with contextlib.suppress(OSError):  # the first failure is the one to tell
                unfinished.unlink(missing_ok=True)
            raise
        if settle:
            for folder in (path.parent, *made):
                _sync_folder(folder)

    def allocate(self, size: int) -> Bytes:
        """Return memory that :meth:`write` takes without a copy."""
        return np.empty(size, np.uint8).data  # in huge pages

    def settle(self, folder: str) -> None:
        """Make sure that what was put into a folder outlasts a loss of power."""
        _sync_folder(self.root / folder)

    def size(self, name: str) -> int:
        """Return the bytes of a file; FileNotFoundError where there is none."""
        with contextlib.suppress(NotADirectoryError):
            status = os.stat(self.root / name)
            if stat.S_ISREG(status.st_mode):
                return status.st_size
        raise FileNotFoundError(errno.ENOENT, "no such file", str(self.root / name))

    def sizes(self, prefix: str) -> dict[str, int]:
        """Return the bytes of every file under a folder, by name."""
        found: dict[str, int] = {}
        with contextlib.suppress(FileNotFoundError):
            return {prefix: self.size(prefix)}
        for folder, _, names in os.walk(self.root / prefix, onerror=_raise_unless_missing):
            for name in names:
                path = Path(folder, name)
                with contextlib.suppress(FileNotFoundError):  # a writer renamed it meanwhile
                    found[path.relative_to(self.root).as_posix()] = path.stat().st_size
        return found

    def remove(self, prefix: str) -> None:
        """Remove a file, or all under a folder."""
        path = self.root / prefix
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _make_folder(folder: Path) -> list[Path]:
    """Make a folder and those around it, and return the ones that others were made in, the innermost first."""
    made = []
    for inner in (folder, *folder.parents):
        if inner.is_dir():
            break
        made.append(inner.parent)
    folder.mkdir(parents=True, exist_ok=True)
    return made


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # else the rename itself may be lost with the power
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
