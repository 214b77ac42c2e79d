"""Networks and transforms for the paper's experiment and the demo, named by configurations as ``module:name``."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

IMAGE_SIDE, CROP_SIDE, CLEAN_OFFSET = 32, 24, 4
NUM_OFFSETS = IMAGE_SIDE - CROP_SIDE + 1
CONTRAST_LOW, CONTRAST_HIGH = 0.2, 1.8


def paper_cnn(num_classes: int = 10) -> nn.Sequential:
    """Return the base network of Daróczy et al. (2018): inputs ``(B, 3, 24, 24)``, logits ``(B, C)``.

    Weights come from torch's default initialisation and its global generator.

    Args:
        num_classes: ``C``.
    """
    return nn.Sequential(
        OrderedDict(
            conv0=nn.Conv2d(3, 64, kernel_size=5, padding=1),
            relu0=nn.ReLU(),
            pool0=nn.MaxPool2d(2, ceil_mode=True),
            conv1=nn.Conv2d(64, 64, kernel_size=5, padding=2),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2, ceil_mode=True),
            flatten=nn.Flatten(),
            fc=nn.Linear(64 * 6 * 6, num_classes),
        )
    )


def paper_transform(image: Image.Image, generator: torch.Generator | None) -> Tensor:
    """Crop and whiten a 32×32 picture; with a generator, crop anywhere, mirror and change the contrast.

    The crop's offsets are uniform in 0..8, it is mirrored with probability ½, and one contrast factor, uniform in
    [0.2, 1.8), acts about each channel's mean. Whitening is ``(x - mean) / max(std, 1/√n)`` over all ``n`` values.

    Args:
        image: 32×32; other modes are converted to RGB.
        generator: None for the clean picture: the crop at (4, 4).

    Returns:
        float32 ``(3, 24, 24)``.

    Raises:
        ValueError: if the picture has another size.
    """
    if image.size != (IMAGE_SIDE, IMAGE_SIDE):
        width, height = image.size
        raise ValueError(f"the picture is {width}×{height}, paper_transform takes {IMAGE_SIDE}×{IMAGE_SIDE}")
    pixels = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    if generator is None:
        return _whitened(_crop(pixels, CLEAN_OFFSET, CLEAN_OFFSET))
    u = torch.rand(4, generator=generator).tolist()
    crop = _crop(pixels, int(u[0] * NUM_OFFSETS), int(u[1] * NUM_OFFSETS))
    if u[2] < 0.5:
        crop = crop[:, :, ::-1]
    planes = np.ascontiguousarray(crop).reshape(3, -1)
    means = planes.mean(axis=1, keepdims=True)
    planes = (planes - means) * np.float32(CONTRAST_LOW + (CONTRAST_HIGH - CONTRAST_LOW) * u[3]) + means
    return _whitened(planes.reshape(crop.shape))


def _crop(pixels: np.ndarray, top: int, left: int) -> np.ndarray:
    window = pixels[top : top + CROP_SIDE, left : left + CROP_SIDE]
    return window.transpose(2, 0, 1).astype(np.float32, order="C")


def _whitened(x: np.ndarray) -> Tensor:
    flat = x.reshape(-1)
    flat = flat - flat.sum() / np.float32(flat.size)
    std = float(np.sqrt(flat @ flat / np.float32(flat.size)))
    flat /= np.float32(max(std, flat.size**-0.5))
    return torch.from_numpy(flat.reshape(x.shape))


def mlp(sizes: Sequence[int]) -> nn.Sequential:
    """Return flatten, then linear layers ``fc0, fc1, …`` with ReLUs between them.

    Args:
        sizes: input values, hidden widths, classes: at least two numbers.

    Raises:
        ValueError: if there are fewer.
    """
    if len(sizes) < 2:
        raise ValueError(f"sizes {list(sizes)} need at least an input and an output width")
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for i, (width_in, width_out) in enumerate(itertools.pairwise(sizes)):
        if i:
            layers[f"relu{i - 1}"] = nn.ReLU()
        layers[f"fc{i}"] = nn.Linear(width_in, width_out)
    return nn.Sequential(layers)


def digits_mlp() -> nn.Sequential:
    """Return the demo's network: 64 → 32 → 10, inputs ``(B, 1, 8, 8)``."""
    return mlp((64, 32, 10))


def digits_transform(array: np.ndarray, generator: torch.Generator | None) -> Tensor:
    """Return an 8×8 digit as float32 ``(1, 8, 8)``; with a generator, shifted by up to one pixel each way.

    Args:
        array: ``(8, 8)``, values in [0, 1].
        generator: None for the digit as it is.
    """
    digit = torch.as_tensor(array, dtype=torch.float32)
    if generator is None:
        return digit[None].clone()
    down, right = torch.randint(3, (2,), generator=generator).tolist()
    framed = nn.functional.pad(digit, (1, 1, 1, 1))
    return framed[None, down : down + digit.shape[0], right : right + digit.shape[1]].clone()
