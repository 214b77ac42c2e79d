import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fisher_ray.models import digits_mlp, digits_transform, mlp, paper_cnn, paper_transform


def image(seed=0):
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (32, 32, 3)).astype(np.uint8))


def whitened(x):
    """TensorFlow's per_image_standardization, in float64."""
    return (x - x.mean()) / max(x.std(), 1 / np.sqrt(x.size))


def augmented(pixels, top, left, mirror, contrast):
    """One augmentation, in float64."""
    crop = pixels[top : top + 24, left : left + 24].astype(np.float64).transpose(2, 0, 1)
    crop = crop[:, :, ::-1] if mirror else crop
    means = crop.mean(axis=(1, 2), keepdims=True)
    return whitened((crop - means) * contrast + means)


def test_the_papers_network_has_the_papers_layers_and_sizes():
    model = paper_cnn()
    names = "conv0 relu0 pool0 conv1 relu1 pool1 flatten fc"
    assert " ".join(name for name, _ in model.named_children()) == names
    weights = {name: p.numel() for name, p in model.named_parameters() if name.endswith("weight")}
    assert weights == {"conv0.weight": 4_800, "conv1.weight": 102_400, "fc.weight": 23_040}
    x, shapes = torch.zeros(2, 3, 24, 24), {}
    for name, layer in model.named_children():
        x = layer(x)
        shapes[name] = tuple(x.shape[1:])
    assert shapes["conv0"] == (64, 22, 22)
    assert shapes["pool0"] == shapes["conv1"] == (64, 11, 11)
    assert shapes["pool1"] == (64, 6, 6)
    assert shapes["fc"] == (10,)
    assert not any(layer.inplace for layer in model if isinstance(layer, nn.ReLU))
    assert paper_cnn(num_classes=3)(torch.zeros(1, 3, 24, 24)).shape == (1, 3)


def test_a_clean_picture_is_the_middle_whitened():
    x = paper_transform(image(), None)
    assert (x.dtype, x.shape) == (torch.float32, (3, 24, 24))
    middle = np.asarray(image(), np.float64)[4:28, 4:28].transpose(2, 0, 1)
    np.testing.assert_allclose(x.numpy(), whitened(middle), rtol=1e-5, atol=1e-6)


def test_a_flat_picture_is_whitened_to_zero():
    x = paper_transform(Image.new("RGB", (32, 32), (200, 200, 200)), None)
    assert x.abs().max() == 0


def test_a_barely_varying_picture_is_not_blown_up():
    pixels = np.full((32, 32, 3), 7, np.uint8)
    pixels[10, 10, 0] = 8
    middle = pixels[4:28, 4:28].astype(np.float64).transpose(2, 0, 1)
    assert middle.std() < 1 / np.sqrt(1728) * 1.001
    np.testing.assert_allclose(
        paper_transform(Image.fromarray(pixels), None).numpy(), whitened(middle), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("seed", range(20))
def test_an_augmented_picture_is_one_crop_mirrored_or_not_with_one_contrast(seed):
    x = paper_transform(image(), torch.Generator().manual_seed(seed))
    u = torch.rand(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).double().numpy()
    expected = augmented(
        np.asarray(image()), int(u[0] * 9), int(u[1] * 9), mirror=u[2] < 0.5, contrast=0.2 + 1.6 * u[3]
    )
    np.testing.assert_allclose(x.numpy(), expected, rtol=1e-4, atol=1e-5)


def ramp(down):
    """Red grows by 7 a row (or a column), green is 100, blue 0: so offset, mirroring and contrast can be read off."""
    red = np.broadcast_to(7 * np.arange(32), (32, 32))
    red = red.T if down else red
    planes = [red, np.full((32, 32), 100), np.zeros((32, 32))]
    return Image.fromarray(np.stack(planes, axis=2).astype(np.uint8))


def read_off(x):
    """Return offset along the ramp, and the red step a pixel right and down, from one augmented ``ramp``."""
    red, green, blue = x.double()
    scale = float(green.mean() - blue.mean()) / 100  # what whitening divided by; contrast leaves the means alone
    offset = float(red.mean() - blue.mean()) / (7 * scale) - 11.5
    return round(offset), float(red[0, 1] - red[0, 0]) / (7 * scale), float(red[1, 0] - red[0, 0]) / (7 * scale)


def test_augmentations_reach_every_crop_both_mirrorings_and_the_range_of_contrast():
    """2,000 draws: one of 162 crops is missed with probability < 162 (161/162)^2000 < 7e-4, for fixed seeds."""
    seen, contrasts = set(), []
    for seed in range(2_000):
        top, _, contrast = read_off(paper_transform(ramp(down=True), torch.Generator().manual_seed(seed)))
        left, step, _ = read_off(paper_transform(ramp(down=False), torch.Generator().manual_seed(seed)))
        assert abs(step) == pytest.approx(contrast, rel=1e-3)
        seen.add((top, left, step < 0))
        contrasts.append(contrast)
    assert seen == {(top, left, mirror) for top in range(9) for left in range(9) for mirror in (False, True)}
    deciles = np.histogram(contrasts, bins=10, range=(0.2, 1.8))[0]
    assert deciles.sum() == 2_000
    assert abs(deciles - 200).max() < 6 * 13.5


def test_the_same_generator_state_gives_the_same_picture():
    a, b = (paper_transform(image(), torch.Generator().manual_seed(3)) for _ in range(2))
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_grey_picture_is_taken_and_another_size_is_not():
    assert paper_transform(image().convert("L"), None).shape == (3, 24, 24)
    with pytest.raises(ValueError, match="the picture is 30×32"):
        paper_transform(image().resize((30, 32)), None)


def test_an_mlp_has_relus_between_its_layers_only():
    names = [name for name, _ in mlp((4, 3, 3, 2)).named_children()]
    assert names == ["flatten", "fc0", "relu0", "fc1", "relu1", "fc2"]
    assert mlp((4, 2))(torch.zeros(5, 2, 2)).shape == (5, 2)
    with pytest.raises(ValueError, match="at least an input and an output"):
        mlp((4,))


def test_the_digits_network_takes_the_digits_transform():
    digit = np.random.RandomState(0).rand(8, 8)
    x = digits_transform(digit, None)
    assert (x.dtype, x.shape) == (torch.float32, (1, 8, 8))
    np.testing.assert_array_equal(x[0].numpy(), digit.astype(np.float32))
    assert digits_mlp()(x[None]).shape == (1, 10)


def test_a_digit_is_shifted_by_at_most_one_pixel_every_way():
    """300 draws of 9 shifts: one is missed with probability < 9 (8/9)^300 < 5e-15."""
    digit = np.arange(1.0, 65.0).reshape(8, 8)
    framed = np.pad(digit, 1)
    shifts = {tuple(framed[i : i + 8, j : j + 8].ravel()): (i, j) for i in range(3) for j in range(3)}
    seen = {
        shifts[tuple(digits_transform(digit, torch.Generator().manual_seed(seed)).double().numpy().ravel())]
        for seed in range(300)
    }
    assert len(seen) == 9
