"""Objects of S3 below a prefix."""

from __future__ import annotations

import errno
import glob
import importlib
import os
from typing import Any

import numpy as np

from fisher_ray.storage.local import REST_BYTES, Bytes, Fold


class S3Files:
    """The objects below a prefix; every name is relative to it."""

    def __init__(self, place: str, options: dict[str, Any], retry_s: float) -> None:
        """See the class."""
        self.root = place.strip("/")
        botocore = importlib.import_module("botocore.exceptions")
        retryable = importlib.import_module("s3fs.core").S3_RETRYABLE_ERRORS  # aiohttp's among them: no OSErrors
        self.failures: tuple[type[Exception], ...] = (OSError, botocore.BotoCoreError, botocore.ClientError, *retryable)
        refusals = (botocore.NoCredentialsError, botocore.PartialCredentialsError, botocore.ParamValidationError)
        self._permanent = (PermissionError, FileNotFoundError, *refusals)
        self._fs = _open_s3(options, max(retry_s, 1.0))

    def is_transient(self, error: Exception) -> bool:
        """Return whether the same call may go well a little later."""
        refused = getattr(error, "errno", None) in (errno.EINVAL, errno.ENOSYS, errno.EPERM)
        return not refused and not isinstance(error, self._permanent)

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}".rstrip("/")

    def read(self, name: str, start: int | None, stop: int | None) -> bytes:
        """Return the bytes of a file, or of its range ``[start, stop)``."""
        # At more than one request at once, s3fs first asks for the size: a second request for every small object.
        return bytes(self._fs.cat_file(self._path(name), start=start, end=stop, max_concurrency=1))

    def read_array(self, name: str) -> np.ndarray:
        """Return the bytes of a file, uint8 ``(size,)``."""
        return np.frombuffer(self.read(name, None, None), np.uint8).copy()  # bytes are read-only

    def read_into(self, name: str, target: np.ndarray, fold: Fold) -> tuple[int, bytes]:
        """Fill ``target`` and fold its bytes, as :meth:`Storage.read_into` says."""
        data = np.frombuffer(self.read(name, None, None), np.uint8)
        body = data[: len(target)]
        target[: len(body)] = body
        return fold(0, body), data[len(body) : len(body) + REST_BYTES].tobytes()

    def write(self, name: str, data: Bytes, settle: bool) -> None:
        """Put the whole of ``data`` at ``name``, or nothing."""
        self._fs.pipe_file(self._path(name), bytes(data) if isinstance(data, memoryview) else data)

    def allocate(self, size: int) -> Bytes:
        """Return memory that :meth:`write` takes without a copy."""
        return bytearray(size)  # botocore takes no memoryview

    def settle(self, folder: str) -> None:
        """Do nothing: an object that was put is there."""

    def size(self, name: str) -> int:
        """Return the bytes of a file; FileNotFoundError where there is none."""
        bucket, key, _ = self._fs.split_path(self._path(name))  # `info` would list a folder where there is no object
        return int(self._fs.call_s3("head_object", Bucket=bucket, Key=key)["ContentLength"])

    def sizes(self, prefix: str) -> dict[str, int]:
        """Return the bytes of every file under a folder, by name."""
        try:
            found = self._fs.find(self._path(prefix), detail=True)
        except FileNotFoundError:
            return {}
        offset = len(self.root) + 1
        return {path[offset:]: int(info["size"]) for path, info in found.items() if not path.endswith("/")}

    def remove(self, prefix: str) -> None:
        """Remove a file, or all under a folder."""
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
