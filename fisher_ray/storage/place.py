"""Files under one URL: bounded retries, typed errors."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import PurePosixPath
from typing import Any, TypeVar

import numpy as np

from fisher_ray.errors import ConfigError, StorageError
from fisher_ray.storage.local import PARTIAL, Bytes, Fold, LocalFiles
from fisher_ray.storage.s3 import S3Files

T = TypeVar("T")

RETRY_S = 60.0
"""How long transient failures are retried, in seconds, before :class:`StorageError`, if the environment's
``FISHER_RAY_RETRY_S`` does not say otherwise."""

_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "Make room there, then run again."),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "Give this user the right to write there."),
}
_SECRETS = {"key": "AWS_ACCESS_KEY_ID", "secret": "AWS_SECRET_ACCESS_KEY", "token": "AWS_SESSION_TOKEN"}


class Storage:
    """The files under ``url``; a name is a relative path with ``/`` between its parts.

    Credentials and the endpoint of ``s3://`` come from the environment (``AWS_*``), the machine's role, or ``options``.

    Attributes:
        url: as given.
        remote: whether a call crosses a network, so that several at once pay.
    """

    def __init__(self, url: str, options: Mapping[str, Any] | None = None, *, retry_s: float | None = None) -> None:
        """Touch nothing yet.

        Args:
            url: a local path, ``file://`` or ``s3://bucket/prefix``.
            options: further arguments of ``s3fs.S3FileSystem``.
            retry_s: bound on retries, and on one request to S3, in seconds (default ``RETRY_S``).

        Raises:
            ConfigError: if the URL's scheme is unknown or it contains credentials, or ``FISHER_RAY_RETRY_S`` is wrong.
        """
        scheme, separator, rest = url.partition("://")
        if separator and "@" in rest.partition("/")[0]:
            raise ConfigError(f"a {scheme}:// URL contains credentials. Leave them to the environment (AWS_*).")
        if separator and scheme not in ("file", "s3"):
            raise ConfigError(f"{url!r}: {scheme}:// is unknown. Give a local path, file:// or s3://.")
        if not url or (separator and not rest.strip("/")):
            raise ConfigError(f"{url!r} names no place. Give a local path, file:// or s3://bucket/prefix.")
        self.url, self.remote = url, scheme == "s3" and bool(separator)
        self._options, self._retry_s = dict(options or {}), _patience_s() if retry_s is None else retry_s
        self._place = rest if separator else url
        self._opened: tuple[int, LocalFiles | S3Files] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Travel to other processes without open connections."""
        return {**self.__dict__, "_opened": None}

    @property
    def _files(self) -> LocalFiles | S3Files:
        if self._opened is None or self._opened[0] != os.getpid():  # connections do not survive a fork
            files = S3Files(self._place, self._options, self._retry_s) if self.remote else LocalFiles(self._place)
            self._opened = (os.getpid(), files)
        return self._opened[1]

    def read_bytes(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        """Return the bytes of ``name``, or of its range ``[start, stop)``; a negative ``start`` counts from the end.

        Raises:
            FileNotFoundError: if there is no such file.
            StorageError: if it cannot be read.
        """
        return self._try("read", name, lambda: self._files.read(name, start, stop))

    def read_array(self, name: str) -> np.ndarray:
        """Return the bytes of ``name`` as uint8, shape ``(size,)``: quicker for large files. Errors as above."""
        return self._try("read", name, lambda: self._files.read_array(name))

    def read_into(self, name: str, target: np.ndarray, fold: Fold) -> tuple[int, bytes]:
        """Read ``name`` into memory that is there, and fold its bytes while they are in the processor's cache.

        Args:
            name: the file.
            target: uint8, for the bytes that it begins with.
            fold: from what it made of the bytes before (0 of none) and a block of bytes to what it makes of both.

        Returns:
            What ``fold`` made of ``target``; and the bytes behind, but not more than a few. A file that is too short
            fills a part of ``target``, and nothing is behind it.

        Raises:
            FileNotFoundError: if there is no such file.
            StorageError: if it cannot be read.
        """
        return self._try("read", name, lambda: self._files.read_into(name, target, fold))

    def write_bytes(self, name: str, data: Bytes, *, settle: bool = True) -> None:
        """Put ``data`` at ``name``: readers, and a crash, see the old file or the whole new one.

        Args:
            name: the file.
            data: its bytes.
            settle: whether the file is there after the power was lost; else :meth:`settle` sees to it for many.

        Raises:
            StorageError: if it cannot be written.
        """
        self._try("write", name, lambda: self._files.write(name, data, settle))

    def allocate(self, size: int) -> Bytes:
        """Return so many bytes of memory, whatever is in them, that :meth:`write_bytes` takes without a copy."""
        return self._files.allocate(size)

    def settle(self, names: Iterable[str]) -> None:
        """Make sure that files which were written are there after the power was lost.

        Raises:
            StorageError: if that cannot be made sure of.
        """
        folders = {folder.as_posix() for name in names for folder in PurePosixPath(name).parents}
        for folder in sorted(folders, key=len, reverse=True):  # the innermost first
            self._try("write", folder, partial(self._files.settle, folder))

    def exists(self, name: str) -> bool:
        """Whether there is a file ``name`` (a folder is none)."""
        with contextlib.suppress(FileNotFoundError):
            return self.size(name) >= 0
        return False

    def size(self, name: str) -> int:
        """Return the number of bytes of ``name``.

        Raises:
            FileNotFoundError: if there is no such file.
            StorageError: if it cannot be asked for.
        """
        return self._try("read", name, lambda: self._files.size(name))

    def sizes(self, prefix: str = "", *, partials: bool = False) -> dict[str, int]:
        """Return the bytes of every file under the folder ``prefix``, by name, sorted; or those of ``*.partial``."""
        found = self._try("list", prefix, lambda: self._files.sizes(prefix.strip("/")))
        return {name: size for name, size in sorted(found.items()) if _is_partial(name) == partials}

    def list(self, prefix: str = "") -> list[str]:
        """Return the names of every file under the folder ``prefix``, sorted; ``*.partial`` left out."""
        return [*self.sizes(prefix)]

    def remove(self, prefix: str) -> None:
        """Remove the file or the whole folder ``prefix`` (``""``: everything); what is not there is no error."""
        self._try("remove", prefix, lambda: self._files.remove(prefix))

    def remove_partials(self) -> None:
        """Remove what killed writers left behind; only where no writer is at work. Objects are put whole or not."""
        for name in () if self.remote else self.sizes(partials=True):
            self.remove(name)

    def _try(self, verb: str, name: str, act: Callable[[], T]) -> T:
        if name.startswith("/") or ".." in name.split("/"):
            raise StorageError(f"{name!r} leads out of its folder. Give a relative name without '..'.")
        deadline = time.monotonic() + self._retry_s
        delay_s = 0.1
        while True:
            try:
                return act()
            except self._files.failures as error:
                if isinstance(error, FileNotFoundError) and verb == "read":
                    raise
                wait_s = delay_s * random.uniform(0.5, 1.0)
                if not self._files.is_transient(error) or time.monotonic() + wait_s > deadline:
                    raise StorageError(self._explain(verb, name, error)) from None  # the original may hold secrets
            time.sleep(wait_s)
            delay_s = min(2 * delay_s, 10.0)

    def _explain(self, verb: str, name: str, error: Exception) -> str:
        place = f"{self.url.rstrip('/')}/{name}" if name else self.url
        number, reason = getattr(error, "errno", None), getattr(error, "strerror", None) or error
        advice = _ADVICE.get(number or 0, "Check the place, the network and the access rights, then run again.")
        return self._without_secrets(f"cannot {verb} {place}: {type(error).__name__}: {reason}. {advice}")

    def _without_secrets(self, text: str) -> str:
        given = [str(self._options.get(name) or "") for name in _SECRETS]
        for secret in (*given, *(os.environ.get(name, "") for name in _SECRETS.values())):
            text = text.replace(secret, "***") if len(secret) > 3 else text
        return re.sub(r"//[^/@\s]+@", "//***@", text)


def _is_partial(name: str) -> bool:
    return re.fullmatch(rf"\..+\.[0-9a-f]+{re.escape(PARTIAL)}", PurePosixPath(name).name) is not None


def _patience_s() -> float:
    given = os.environ.get("FISHER_RAY_RETRY_S", "")
    try:
        return float(given) if given else RETRY_S
    except ValueError:
        raise ConfigError(f"FISHER_RAY_RETRY_S is {given!r}. Give seconds, as in 60.") from None
