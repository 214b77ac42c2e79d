import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisher_ray.gradients import Bernoulli, Compressor, Gaussian, ScoreEngine, Softmax, random_bases
from fisher_ray.gradients.spanning import reflect
from tests.gradients.networks import NETWORKS, make


@pytest.mark.parametrize("name", NETWORKS)
def test_all_classes_follow_from_one_fewer(name):
    model, inputs = make(name, 5)
    engine = ScoreEngine(model)
    compressor = Compressor(random_bases(engine.blocks, 3, 0), engine.blocks, inputs)
    whole = compressor.compress(engine.all_classes(inputs))

    scores, reflection = engine.spanning_classes(inputs)
    made = compressor.compress(scores)
    assert (scores.num_scores, made.shape[1]) == (whole.shape[1] - 1, whole.shape[1] - 1)
    torch.testing.assert_close(reflection.complete(made), whole, rtol=1e-10, atol=1e-12)
    products = [values.transpose(1, 2) @ values for values in (made, whole)]
    torch.testing.assert_close(*products, rtol=1e-10, atol=1e-12)


@given(num_classes=st.integers(2, 7), scale=st.floats(0, 900), seed=st.integers(0, 999))
def test_rounding_is_not_enlarged_however_sure_the_network_is(num_classes, scale, seed):
    logits = scale * torch.randn(4, num_classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    p = logits.softmax(1)
    scores = ((torch.eye(num_classes) - p[:, None]) * p.sqrt()[:, :, None]).transpose(0, 1)
    kept, reflection = reflect(scores, p)

    torch.testing.assert_close(reflection.complete(kept.transpose(0, 1)), scores.transpose(0, 1), rtol=0, atol=1e-15)
    products = [torch.einsum("sbi,sbj->bij", values, values) for values in (kept, scores)]
    torch.testing.assert_close(*products, rtol=0, atol=1e-15)


def test_one_class_and_other_likelihoods_leave_out_nothing():
    output = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    for likelihood in (Bernoulli(), Gaussian()):
        scores, reflection = likelihood.spanning_scores(output)
        assert reflection is None
        assert torch.equal(scores, likelihood.all_scores(output, weighted=True))
    assert Softmax().spanning_scores(output[:, :1])[1] is None
