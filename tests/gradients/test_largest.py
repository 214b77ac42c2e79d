from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from fisher_ray.gradients import PercentileEntries, ScoreEngine, form_gradients, formation, num_above
from fisher_ray.gradients.largest import entries_above


class Shared(nn.Module):
    """A layer that is called twice, and one that the logits do not depend on."""

    def __init__(self):
        super().__init__()
        self.twice, self.head, self.unused = nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(4, 5)

    def forward(self, x):
        return self.head(torch.relu(self.twice(torch.relu(self.twice(x)))))


def convolutional():
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def above(gradient, share):
    """What numpy's percentile leaves of each row's entries, the others zero."""
    size = np.abs(gradient)
    return np.where(size > np.percentile(size, 100 - 100 * share, axis=-1, keepdims=True), gradient, 0)


@pytest.mark.parametrize("share", [0.15, 0.5, 0.031])
@pytest.mark.parametrize(("make", "shape"), [(convolutional, (2, 4, 4)), (Shared, (6,))])
def test_the_entries_above_each_layers_percentile_are_kept(make, shape, share):
    torch.manual_seed(0)
    model = make().double().eval()
    engine = ScoreEngine(model, "*weight")
    kept = PercentileEntries(engine.blocks, share, engine.like)
    scores = engine.all_classes(torch.randn(5, *shape, dtype=torch.float64), weighted=False)
    values, coordinates = kept.compress(scores)
    assert values.shape == coordinates.shape == (5, 3, kept.num_kept)
    assert coordinates.dtype == torch.int32
    assert (coordinates.diff(dim=2) > 0).all()
    found = torch.zeros(5, 3, kept.dim, dtype=torch.float64).scatter_(2, coordinates.long(), values)
    whole = form_gradients(engine.blocks, model, scores)
    for block in engine.blocks:
        (piece,) = block.pieces
        gradient = whole[piece.parameter] if piece.rows is None else whole[piece.parameter][:, :, piece.rows]
        expected = above(gradient.flatten(2).numpy(), share)
        np.testing.assert_allclose(found[:, :, kept.spans[block.name]].numpy(), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("size", [1, 2, 7, 100, 4800, 23040, 102400])
@pytest.mark.parametrize("share", [0.15, 0.3, 0.001])
def test_as_many_entries_are_kept_as_numpys_percentile_leaves_of_different_ones(size, share):
    numbers = np.arange(1.0, size + 1)
    left = int((numbers > np.percentile(numbers, 100 * (1 - share))).sum())
    assert num_above(size, share) == max(1, left)


def test_the_papers_network_keeps_its_15_percent():
    assert [num_above(size, 0.15) for size in (4800, 102400, 23040)] == [720, 15360, 3456]


def test_all_entries_are_kept_by_a_share_of_one():
    gradient = torch.randn(2, 3, 11)
    chosen, values = entries_above(gradient, num_above(11, 1))
    assert torch.equal(values, gradient)
    assert torch.equal(chosen, torch.arange(11).expand(2, 3, 11))


@pytest.mark.parametrize("levels", [1, 2, 3, 50])
def test_equal_entries_on_the_percentile_are_not_kept_and_coordinates_stay_different(levels):
    generator = torch.Generator().manual_seed(levels)
    gradient = torch.randint(-levels, levels + 1, (4, 2, 40), generator=generator).double()
    gradient[0] = 0
    number = num_above(40, 0.25)
    chosen, values = entries_above(gradient, number)
    assert (chosen.diff(dim=2) > 0).all()
    found = torch.zeros_like(gradient).scatter_(2, chosen, values)
    np.testing.assert_array_equal(found.numpy(), above(gradient.numpy(), 0.25))


@pytest.mark.parametrize("bad", [[math.nan], [math.inf, math.nan, -math.inf], [math.nan] * 30])
def test_what_is_not_finite_is_among_the_values(bad):
    gradient = torch.randn(3, 1, 40, generator=torch.Generator().manual_seed(0))
    gradient[1, 0, 5 : 5 + len(bad)] = torch.tensor(bad)
    chosen, values = entries_above(gradient, 10)
    assert chosen.shape == values.shape == (3, 1, 10)
    assert values.isfinite().all(dim=2)[:, 0].tolist() == [True, False, True]


def test_a_layer_larger_than_a_cache_is_put_together(monkeypatch):
    torch.manual_seed(0)
    model = convolutional().double().eval()
    engine = ScoreEngine(model, "*weight")
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    found = []
    for chunk_bytes in (6 << 20, 300):
        monkeypatch.setitem(formation.CHUNK_BYTES, "cpu", chunk_bytes)
        kept = PercentileEntries(engine.blocks, 0.15, engine.like)
        found.append(kept.compress(engine.all_classes(x, weighted=False)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-12, atol=1e-15)
    assert torch.equal(found[0][1], found[1][1])
