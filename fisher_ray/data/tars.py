"""Tar files in WebDataset's manner: ``NAME.jpg`` and ``NAME.cls`` follow each other."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fisher_ray.data.folders import SUFFIXES
from fisher_ray.data.pictures import PictureSource, reading
from fisher_ray.data.source import Transform, select_rows
from fisher_ray.errors import DataError

NAME = "tar"
LABEL_SUFFIX = ".cls"

_Span = tuple[int, int]
"""First byte and number of bytes within a tar file."""


@dataclass(frozen=True)
class _Sample:
    path: str
    name: str
    picture: _Span | None
    label: _Span | None


class TarSource(PictureSource):
    """Samples ``rows`` of ``paths``, counted over the files in order."""

    def __init__(
        self, paths: Sequence[str], rows: tuple[int, int] | None, key: str, transform: Transform | None
    ) -> None:
        """Look for the samples: every member's header is read, no content.

        Raises:
            ConfigError: if ``rows`` goes beyond the files.
            DataError: if a file is not an uncompressed tar file, or a sample has two pictures or labels.
            StorageError: if a file cannot be read.
        """
        super().__init__(key, transform)
        samples = [sample for path in paths for sample in _samples(path, key)]
        what = paths[0] if len(paths) == 1 else f"{paths[0]} … {paths[-1]}"
        self._rows = select_rows(rows, len(samples), key, what)
        self._samples = samples[self._rows.start : self._rows.stop]

    def __len__(self) -> int:
        """Return the number of rows of the split."""
        return len(self._rows)

    def fingerprint(self) -> str:
        """Return a digest of the files' names, and of their samples' names, places and labels."""
        digest = hashlib.sha256(b"webdataset")
        for sample in self._samples:
            told = (os.path.basename(sample.path), sample.name, sample.picture, sample.label)
            digest.update(f"\n{told!r}".encode(errors="surrogateescape"))
        digest.update(self.labels().tobytes())
        return digest.hexdigest()

    def where(self, row: int) -> str:
        """Return the file and the sample in it."""
        return f"{self._samples[row].path} sample {self._samples[row].name}"

    def raw_rows(self, start: int, stop: int) -> Iterator[tuple[bytes | None, int | str | None]]:
        """Yield ``(encoded picture, label)``."""
        for sample, label in zip(self._samples[start:stop], self._labels(start, stop), strict=True):
            yield _read(sample.path, sample.picture, self.key), label

    def labels(self) -> np.ndarray:
        """Read the labels alone."""
        found = [label if isinstance(label, int) else np.nan for label in self._labels(0, len(self))]
        return np.array(found, np.float64)

    def _labels(self, start: int, stop: int) -> Iterator[int | str | None]:
        for sample in self._samples[start:stop]:
            raw = _read(sample.path, sample.label, self.key)
            text = None if raw is None else raw.decode(errors="replace").strip()
            yield int(text) if text is not None and text.isascii() and text.isdigit() else text


def _read(path: str, span: _Span | None, key: str) -> bytes | None:
    if span is None:
        return None
    with reading(path, key, NAME), open(path, "rb") as file:
        file.seek(span[0])
        return file.read(span[1])


def _samples(path: str, key: str) -> Iterator[_Sample]:
    """Yield the groups of members that follow each other and have one name up to its first dot."""
    name, picture, label = None, None, None
    with reading(path, key, NAME), tarfile.open(path, "r:") as members:
        for member in members:
            if not member.isfile():
                continue
            folder, _, last = member.name.rpartition("/")
            stem, dot, suffix = last.partition(".")
            suffix = (dot + suffix).lower()
            if suffix not in (*SUFFIXES, LABEL_SUFFIX):
                continue
            own = f"{folder}/{stem}" if folder else stem
            if name is not None and name != own:
                yield _Sample(path, name, picture, label)
                picture = label = None
            name, span = own, (member.offset_data, member.size)
            if (label if suffix == LABEL_SUFFIX else picture) is not None:
                what = "labels" if suffix == LABEL_SUFFIX else "pictures"
                raise DataError(f"{key}: {path}: sample {name} has two {what}. Give each sample a name of its own.")
            picture, label = (picture, span) if suffix == LABEL_SUFFIX else (span, label)
    if name is not None:
        yield _Sample(path, name, picture, label)
