import pytest
import torch
from torch import nn

from fisher_ray.gradients import patch_products
from fisher_ray.gradients.convolution import patches

LAYERS = {
    "same": (nn.Conv2d(3, 1, 5, padding=2), (7, 6)),
    "same, even kernel": (nn.Conv2d(2, 1, (4, 3), padding="same"), (6, 5)),
    "valid": (nn.Conv2d(2, 1, 3, padding="valid"), (6, 7)),
    "strided": (nn.Conv2d(2, 1, 3, stride=(2, 3), padding=(1, 2)), (8, 7)),
    "dilated": (nn.Conv2d(2, 1, (3, 2), stride=(1, 2), padding=3, dilation=(2, 3)), (7, 9)),
    "kernel larger than the picture": (nn.Conv2d(2, 1, 5, padding=2), (2, 3)),
    "stride larger than the kernel": (nn.Conv2d(2, 1, 2, stride=3), (8, 9)),
    "reflect": (nn.Conv2d(2, 1, 3, padding=1, padding_mode="reflect"), (5, 4)),
    "circular": (nn.Conv2d(2, 1, 3, padding=(2, 1), padding_mode="circular"), (5, 4)),
    "one axis": (nn.Conv1d(3, 1, 4, padding=2, dilation=2), (11,)),
    "three axes": (nn.Conv3d(2, 1, (2, 3, 2), padding=1, stride=(1, 2, 1)), (3, 4, 5)),
}


@pytest.fixture(autouse=True)
def always(monkeypatch):
    monkeypatch.setattr(patch_products, "_pays", lambda conv, value: True)


def unfolded(conv, value, bias):
    rows = patches(conv, value)
    if bias:
        rows = torch.cat([rows, rows.new_ones(len(rows), 1, rows.shape[2])], dim=1)
    return torch.einsum("bit,bjt->ij", rows, rows)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
@pytest.mark.parametrize("name", LAYERS)
def test_products_are_those_of_the_patches_unfolded(name, chunk_bytes, bias, monkeypatch):
    monkeypatch.setattr(patch_products, "CHUNK_BYTES", chunk_bytes)
    conv, shape = LAYERS[name]
    value = torch.randn(4, conv.in_channels, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = patch_products.patch_products(conv, value, bias)
    torch.testing.assert_close(found, unfolded(conv, value, bias), rtol=1e-12, atol=1e-12)
