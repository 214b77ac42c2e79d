"""Files under one URL, on a local disk or in S3: whole reads, atomic writes, bounded retries, typed errors."""

from __future__ import annotations

import contextlib
import errno
import glob
import importlib
import os
import random
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np

from fisher_ray.errors import ConfigError, StorageError

T = TypeVar("T")
Bytes = bytes | bytearray | memoryview
Fold = Callable[[int, np.ndarray], int]

RETRY_S = 60.0
"""How long transient failures are retried, in seconds, before :class:`StorageError`, if the environment's
``FISHER_RAY_RETRY_S`` does not say otherwise."""
BLOCK_BYTES, REST_BYTES = 1 << 20, 64
"""What is read at a time where bytes are looked at as they come, and as much as is told of what nobody has room for."""
PARTIAL = ".partial"
"""Ending of files whose writer has not finished, or was killed: ``.NAME.<hexadecimal digits>.partial``."""

_LOCAL_TRANSIENT = {errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT}
_LOCAL_TRANSIENT |= {errno.ENOENT, errno.ENOTEMPTY}  # one removes a folder while another writes there
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

    def __getstate__(self) -> dict[str, Any]:
        """Travel to other processes without open connections."""
        return {name: value for name, value in self.__dict__.items() if name != "_opened"}

    @property
    def _files(self) -> _LocalFiles | _S3Files:
        process, files = self.__dict__.get("_opened", (None, None))
        if files is None or process != os.getpid():  # connections do not survive a fork
            files = _S3Files(self._place, self._options, self._retry_s) if self.remote else _LocalFiles(self._place)
            self._opened = (os.getpid(), files)
        return files

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


class _LocalFiles:
    failures: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, root: str) -> None:
        self.root = Path(root)

    def is_transient(self, error: Exception) -> bool:
        return isinstance(error, OSError) and error.errno in _LOCAL_TRANSIENT

    def read(self, name: str, start: int | None, stop: int | None) -> bytes:
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
        data = np.empty(self.size(name), np.uint8)  # NumPy's memory has huge pages: ten times as quick as bytes
        with open(self.root / name, "rb") as file:
            return data[: file.readinto(data.data)]

    def read_into(self, name: str, target: np.ndarray, fold: Fold) -> tuple[int, bytes]:
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
        return np.empty(size, np.uint8).data  # in huge pages

    def settle(self, folder: str) -> None:
        _sync_folder(self.root / folder)

    def size(self, name: str) -> int:
        with contextlib.suppress(NotADirectoryError):
            status = os.stat(self.root / name)
            if stat.S_ISREG(status.st_mode):
                return status.st_size
        raise FileNotFoundError(errno.ENOENT, "no such file", str(self.root / name))

    def sizes(self, prefix: str) -> dict[str, int]:
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


class _S3Files:
    def __init__(self, place: str, options: dict[str, Any], retry_s: float) -> None:
        self.root = place.strip("/")
        botocore = importlib.import_module("botocore.exceptions")
        retryable = importlib.import_module("s3fs.core").S3_RETRYABLE_ERRORS  # aiohttp's among them: no OSErrors
        self.failures: tuple[type[Exception], ...] = (OSError, botocore.BotoCoreError, botocore.ClientError, *retryable)
        refusals = (botocore.NoCredentialsError, botocore.PartialCredentialsError, botocore.ParamValidationError)
        self._permanent = (PermissionError, FileNotFoundError, *refusals)
        self._fs = _open_s3(options, max(retry_s, 1.0))

    def is_transient(self, error: Exception) -> bool:
        refused = getattr(error, "errno", None) in (errno.EINVAL, errno.ENOSYS, errno.EPERM)
        return not refused and not isinstance(error, self._permanent)

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}".rstrip("/")

    def read(self, name: str, start: int | None, stop: int | None) -> bytes:
        # At more than one request at once, s3fs first asks for the size: a second request for every small object.
        return bytes(self._fs.cat_file(self._path(name), start=start, end=stop, max_concurrency=1))

    def read_array(self, name: str) -> np.ndarray:
        return np.frombuffer(self.read(name, None, None), np.uint8).copy()  # bytes are read-only

    def read_into(self, name: str, target: np.ndarray, fold: Fold) -> tuple[int, bytes]:
        data = np.frombuffer(self.read(name, None, None), np.uint8)
        body = data[: len(target)]
        target[: len(body)] = body
        return fold(0, body), data[len(body) : len(body) + REST_BYTES].tobytes()

    def write(self, name: str, data: Bytes, settle: bool) -> None:
        self._fs.pipe_file(self._path(name), bytes(data) if isinstance(data, memoryview) else data)

    def allocate(self, size: int) -> Bytes:
        return bytearray(size)  # botocore takes no memoryview

    def settle(self, folder: str) -> None:
        """Do nothing: an object that was put is there."""

    def size(self, name: str) -> int:
        bucket, key, _ = self._fs.split_path(self._path(name))  # `info` would list a folder where there is no object
        return int(self._fs.call_s3("head_object", Bucket=bucket, Key=key)["ContentLength"])

    def sizes(self, prefix: str) -> dict[str, int]:
        try:
            found = self._fs.find(self._path(prefix), detail=True)
        except FileNotFoundError:
            return {}
        offset = len(self.root) + 1
        return {path[offset:]: int(info["size"]) for path, info in found.items() if not path.endswith("/")}

    def remove(self, prefix: str) -> None:
        paths = [self._path(name) for name in self.sizes(prefix)]
        patterns = [path for path in paths if glob.has_magic(path)]  # which `rm` would expand
        for path in patterns:
            self._fs.rm_file(path)
        if plain := [path for path in paths if path not in set(patterns)]:
            self._fs.rm(plain)


def _open_s3(options: dict[str, Any], patience_s: float) -> Any:
    s3fs = importlib.import_module("s3fs")  # a second to import, so only where a URL asks for it
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    # Other processes write too, so no listing is kept; one layer alone retries, so that the time is bounded.
    timeouts = {"connect_timeout": min(10.0, patience_s), "read_timeout": patience_s}
    config = {**timeouts, "retries": {"max_attempts": 0}, "max_pool_connections": 32}
    config |= options.get("config_kwargs", {})
    chosen = {"endpoint_url": endpoint, "use_listings_cache": False, **options, "config_kwargs": config}
    files = s3fs.S3FileSystem(**chosen)
    files.retries = 1
    return files
