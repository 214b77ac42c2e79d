"""A folder of pictures, in a folder for each class."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath

import numpy as np

from fisher_ray.data.pictures import PictureSource, reading
from fisher_ray.data.ranges import is_url
from fisher_ray.data.source import Transform, select_rows
from fisher_ray.errors import ConfigError
from fisher_ray.storage import Storage

SUFFIXES = (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Files of other names are none of the pictures."""
NUM_HASHED = 5
"""Pictures that enter the fingerprint."""
READERS = 16
"""Objects that are fetched at a time."""


class FolderSource(PictureSource):
    """Pictures ``rows`` of ``place/CLASS/**``.

    Their order is that of a hash of the names, so that any range of rows is a sample of all classes, the same on every
    machine.
    """

    def __init__(
        self,
        place: str,
        classes: Sequence[str] | None,
        rows: tuple[int, int] | None,
        key: str,
        transform: Transform | None,
    ) -> None:
        """List the folder.

        Raises:
            ConfigError: if there is none, if its classes are not ``classes``, or if ``rows`` goes beyond it.
            StorageError: if it cannot be listed.
        """
        super().__init__(key, transform)
        self._place, self._storage = place, Storage(place) if is_url(place) else None
        if self._storage is None and not os.path.isdir(place):
            raise ConfigError(f"{key}.path: there is no folder {place}. Correct the path, or data.root.")
        sizes = self._storage.sizes() if self._storage is not None else _sizes(place, key)
        self._sizes = {name: sizes[name] for name in sorted(filter(is_picture, sizes), key=_order)}
        found = {PurePosixPath(name).parts[0] for name in self._sizes}
        if loose := [name for name in self._sizes if "/" not in name]:
            raise ConfigError(
                f"{key}.path: {place}/{loose[0]} lies in no class's folder. Move it to {place}/CLASS/, or away."
            )
        self.classes = tuple(sorted(found)) if classes is None else tuple(classes)
        if others := sorted(found - set(self.classes)):
            raise ConfigError(f"{key}.classes does not name the folder {others[0]!r} of {place}. Name it, or move it.")
        self._rows = select_rows(rows, len(self._sizes), key, place)
        numbers = {name: number for number, name in enumerate(self.classes)}
        self._names = [*self._sizes][self._rows.start : self._rows.stop]
        self._labels = [numbers[name.partition("/")[0]] for name in self._names]

    def __len__(self) -> int:
        """Return the number of rows of the split."""
        return len(self._rows)

    def fingerprint(self) -> str:
        """Return a digest of the classes, of the pictures' names and sizes, and of a few of them whole."""
        digest = hashlib.sha256(repr(("images", self.classes)).encode())
        for name in self._names:
            digest.update(f"\n{self._sizes[name]} {name}".encode(errors="surrogateescape"))
        for row in np.linspace(0, len(self) - 1, num=min(NUM_HASHED, len(self)), dtype=np.int64).tolist():
            digest.update(self._read(row))
        return digest.hexdigest()

    def where(self, row: int) -> str:
        """Return the file."""
        return f"{self._place}/{self._names[row]}"

    def raw_rows(self, start: int, stop: int) -> Iterator[tuple[bytes, int]]:
        """Yield ``(encoded picture, label)``; several objects are fetched at a time."""
        rows = range(len(self))[start:stop]
        if self._storage is None:
            yield from ((self._read(row), self._labels[row]) for row in rows)
            return
        with ThreadPoolExecutor(READERS) as readers:
            for first in rows[:: 2 * READERS]:
                some = range(first, min(first + 2 * READERS, rows.stop))
                yield from zip(readers.map(self._read, some), self._labels[some.start : some.stop], strict=True)

    def _read(self, row: int) -> bytes:
        with reading(self.where(row), self.key, "picture"):
            if self._storage is not None:
                return self._storage.read_bytes(self._names[row])
            with open(self.where(row), "rb") as file:
                return file.read()

    def labels(self) -> np.ndarray:
        """Return the folders' numbers."""
        return np.array(self._labels)


def is_picture(name: str) -> bool:
    """Whether a file of that name is a picture, and not hidden."""
    return name.lower().endswith(SUFFIXES) and not any(part.startswith(".") for part in name.split("/"))


def _order(name: str) -> bytes:
    return hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=16).digest()


def _sizes(place: str, key: str) -> dict[str, int]:
    """Return the bytes of every file below a folder, by name; links are followed."""
    found = {}
    with reading(place, key, "folder"):
        for folder, _, names in os.walk(place, onerror=_raise, followlinks=True):
            for path in (os.path.join(folder, name) for name in filter(is_picture, names)):
                found[os.path.relpath(path, place).replace(os.sep, "/")] = os.stat(path).st_size
    return found


def _raise(error: OSError) -> None:
    raise error
