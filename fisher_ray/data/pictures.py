"""What sources of encoded pictures share: how one is decoded, and what their columns are."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fisher_ray.data.source import Source
from fisher_ray.errors import DataError, StorageError

DECODED_BYTES = 512 * 2**20
"""Memory that decoded pictures may take while a network is trained."""


class PictureSource(Source):
    """Rows that are a picture's encoded bytes and a label."""

    def decode(self, raw: tuple[bytes | None, Any]) -> tuple[Image.Image, Any]:
        """Return the picture, fully decoded, and the label."""
        encoded, label = raw
        if encoded is None:
            raise ValueError("the row has no picture (null bytes)")
        try:
            image = Image.open(io.BytesIO(encoded))
        except UnidentifiedImageError:  # whose message names an object in memory
            raise ValueError(f"its {len(encoded):,} bytes are no picture that Pillow knows") from None
        image.load()
        return image, label

    def plain(self, decoded: Image.Image) -> Tensor:
        """Return the picture as RGB in [0, 1], ``(3, H, W)``."""
        pixels = np.asarray(decoded.convert("RGB")).transpose(2, 0, 1).astype(np.float32, order="C")
        return torch.from_numpy(pixels / np.float32(255))

    def random_reader(self) -> Callable[[int], tuple[Any, Any]]:
        """Keep the encoded pictures, and as many decoded ones as ``DECODED_BYTES`` holds."""
        raws, decoded, room = list(self.raw_rows(0, len(self))), dict[int, Image.Image](), DECODED_BYTES

        def read(row: int) -> tuple[Image.Image, Any]:
            nonlocal room
            if row in decoded:
                return decoded[row].copy(), raws[row][1]  # a transform may draw on what it gets
            image, label = self.decode(raws[row])
            num_bytes = 4 * image.width * image.height
            if num_bytes <= room:
                room -= num_bytes
                decoded[row] = image.copy()
            return image, label

        return read


@dataclass(frozen=True)
class Columns:
    """The columns of a table that hold pictures and labels.

    Attributes:
        image: encoded pictures, as binary, or as a struct with a binary field ``bytes``.
        label: integers.
    """

    image: str = "image"
    label: str = "label"

    def check(self, schema: Any, path: str, key: str) -> None:
        """Refuse a table that has them not.

        Raises:
            DataError: naming the column.
        """
        if missing := {self.image, self.label} - set(schema.names):
            raise DataError(
                f"{key}: {path} has no column {', '.join(map(repr, sorted(missing)))}; its columns are "
                f"{', '.join(map(repr, schema.names))}. Name yours by image_column and label_column."
            )
        image, label = schema.field(self.image).type, schema.field(self.label).type
        if not pa.types.is_integer(label):
            raise DataError(f"{key}: {path}: column {self.label!r} is {label}. Write integers from 0.")
        if not (_is_bytes(image) or self.is_nested(schema)):
            raise DataError(
                f"{key}: {path}: column {self.image!r} is {image}. Write encoded pictures (JPEG, PNG) as binary, "
                "or as a struct with a binary field 'bytes'."
            )

    def is_nested(self, schema: Any) -> bool:
        """Whether the pictures' bytes are a field of a struct."""
        image = schema.field(self.image).type
        return pa.types.is_struct(image) and any(field.name == "bytes" and _is_bytes(field.type) for field in image)

    def class_names(self, schema: Any) -> tuple[str, ...] | None:
        """Return the labels' names that Hugging Face's ``datasets`` keeps beside a schema; None where it does not."""
        try:
            features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
            names = features[self.label]["names"]
        except (KeyError, TypeError, ValueError):
            return None
        return tuple(map(str, names)) if isinstance(names, list) else None

    def rows(self, batch: Any) -> Iterator[tuple[bytes | None, int | None]]:
        """Yield the encoded picture and the label of each row of a record batch."""
        images = batch.column(self.image)
        if pa.types.is_struct(images.type):
            fields = [field.name for field in images.type]
            images = images.flatten()[fields.index("bytes")]  # unlike field(): a null struct's bytes are null too
        yield from zip(images.to_pylist(), batch.column(self.label).to_pylist(), strict=True)


@contextlib.contextmanager
def reading(path: str, key: str, format_name: str) -> Iterator[None]:
    """Tell a file that cannot be reached (try again) from one that is not what it should be.

    Raises:
        StorageError: for the first.
        DataError: for the second.
    """
    try:
        yield
    except (pa.ArrowException, tarfile.TarError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            message = f"{key}: {path} cannot be read: {os.strerror(error.errno)}. Make it readable, then run again."
            raise StorageError(message) from error
        raise DataError(
            f"{key}: {path} is not a sound {format_name} file: {type(error).__name__}: {error}. Write it again."
        ) from error


def _is_bytes(kind: Any) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
