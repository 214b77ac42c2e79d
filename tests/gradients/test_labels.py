import numpy as np
import pytest
import torch

from fisher_ray.gradients import draw_labels, keyed_uniform


def test_the_same_sample_draws_the_same_number_in_any_batch():
    index = torch.arange(1000)
    whole = keyed_uniform(7, index)

    shuffled = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(keyed_uniform(7, shuffled), whole[shuffled], rtol=0, atol=0)
    assert float((keyed_uniform(8, index) == whole).double().mean()) < 0.01


def test_keyed_numbers_are_uniform():
    # Kolmogorov-Smirnov distance of 100,000 numbers; P(D > 0.0073) < 1e-4 for a uniform source
    for seed in (0, 1, 2**40):
        values = np.sort(keyed_uniform(seed, torch.arange(100_000)).numpy())
        distance = np.abs(values - (np.arange(100_000) + 0.5) / 100_000).max()
        assert values.min() >= 0
        assert values.max() < 1
        assert distance < 0.0073


def test_neighbouring_samples_and_seeds_are_not_correlated():
    # correlation of 100,000 pairs: standard deviation 0.0032, five of them
    index = torch.arange(100_001)
    values = keyed_uniform(3, index).numpy()
    other = keyed_uniform(4, index).numpy()
    assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 0.016
    assert abs(np.corrcoef(values, other)[0, 1]) < 0.016


def test_sampled_labels_follow_the_probabilities():
    # 100,000 draws: a share's standard deviation is at most 0.0016; six of them
    p = torch.tensor([0.5, 0.0, 0.2, 0.3], dtype=torch.float64)
    drawn = draw_labels("sampled", p.expand(100_000, 4), torch.zeros(100_000), torch.arange(100_000), seed=1)

    shares = torch.bincount(drawn, minlength=4).double() / 100_000
    assert float((shares - p).abs().max()) < 0.0096
    assert float(shares[1]) == 0


def test_uniform_labels_do_not_look_at_the_probabilities():
    p = torch.zeros(100_000, 5)
    p[:, 0] = 1
    drawn = draw_labels("uniform", p, torch.zeros(100_000), torch.arange(100_000), seed=1)

    shares = torch.bincount(drawn, minlength=5).double() / 100_000
    assert float((shares - 0.2).abs().max()) < 0.0078  # six standard deviations


def test_true_labels_are_the_given_ones():
    labels = torch.tensor([2, 0, 1])
    assert draw_labels("true", torch.ones(3, 3) / 3, labels, torch.arange(3), seed=0) is labels


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="'magic'"):
        draw_labels("magic", torch.ones(1, 2), torch.zeros(1), torch.zeros(1), seed=0)
