"""Small data sets on disk, and transforms and factories that configurations in these tests name."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from fisher_ray.config import SourceConfig
from fisher_ray.data import Source, open_source


def picture(value: int, side: int = 8) -> bytes:
    """A PNG whose every pixel is (value, value + 1, value + 2)."""
    pixels = np.broadcast_to(np.array([value, value + 1, value + 2], np.uint8), (side, side, 3))
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(
    path: Path, images: list[bytes | None], labels: list[int | None], *, struct: bool = True, group_rows: int = 4
) -> None:
    column = (
        pa.array([{"bytes": image, "path": None} for image in images]) if struct else pa.array(images, type=pa.binary())
    )
    table = pa.table({"image": column, "label": pa.array(labels, type=pa.int64())})
    pq.write_table(table, path, row_group_size=group_rows)


def write_numbered(folder: Path, sizes: tuple[int, ...] = (10, 7), *, struct: bool = True) -> None:
    """Files in which the split's row ``i`` is a picture of value ``i`` with label ``i % 5``."""
    start = 0
    for file, size in enumerate(sizes):
        rows = range(start, start + size)
        write_parquet(folder / f"part-{file}.parquet", [picture(i) for i in rows], [i % 5 for i in rows], struct=struct)
        start += size


def open_parquet(folder: Path, *, transform: str | None = None, **settings: Any) -> Source:
    config = SourceConfig(path=settings.pop("path", "*.parquet"), **settings)
    return open_source(config, root=str(folder), transform=transform, key="data.shallow")


def value_of(batch_inputs: torch.Tensor) -> list[int]:
    """The values that ``picture`` was given."""
    return (batch_inputs.flatten(1)[:, 0] * 255).round().int().tolist()


def value_and_noise(image: Image.Image, generator: torch.Generator | None) -> torch.Tensor:
    noise = torch.zeros(1) if generator is None else torch.rand(1, generator=generator)
    return torch.cat([torch.tensor([float(image.getpixel((0, 0))[0])]), noise])


def scribbling(image: Image.Image, generator: torch.Generator | None) -> torch.Tensor:
    before = float(image.getpixel((0, 0))[0])
    image.putpixel((0, 0), (255, 255, 255))
    return torch.tensor([before])


def integers(image: Any, generator: torch.Generator | None) -> torch.Tensor:
    return torch.zeros(3, dtype=torch.int32)


def tokens(image: Any, generator: torch.Generator | None) -> torch.Tensor:
    return torch.tensor([1, 2**40])  # more than float32 has digits for


def of_any_type(image: Any, generator: torch.Generator | None) -> torch.Tensor:
    of_type = torch.int64 if np.asarray(image).flat[0] % 2 else torch.float32
    return torch.zeros(3, dtype=of_type)


def failing(image: Any, generator: torch.Generator | None) -> torch.Tensor:
    raise KeyError("no such augmentation")


NOT_A_FUNCTION = 3


class Items:
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: int) -> Any:
        if isinstance(self.items[row], Exception):
            raise self.items[row]
        return self.items[row]


def tensors(num_rows: int = 6) -> Items:
    return Items([(torch.full((2,), float(i)), torch.tensor(i % 3)) for i in range(num_rows)])


def mixed() -> Items:
    good = (np.ones(2), np.int64(1))
    return Items(
        [
            good,
            RuntimeError("the disk sector is gone"),
            (np.ones(2), 1.0),
            (np.ones(2), True),
            (np.ones(3), 1),
            (np.array([1.0, np.inf]), 1),
            "not a pair",
            ("text", 1),
            good,
        ]
    )


def unsized() -> object:
    return object()


def picky() -> None:
    raise OSError("no such archive")
