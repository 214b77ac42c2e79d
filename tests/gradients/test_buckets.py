"""Many classes in few buckets."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fisher_ray
from fisher_ray.errors import RequestError, StoreError
from fisher_ray.gradients import Compressor, Gaussian, ScoreEngine, Softmax, bucketed, random_bases
from fisher_ray.gradients.buckets import ClassBuckets, bucket_signs
from fisher_ray.models import mlp
from fisher_ray.records import Batch
from fisher_ray.stages.passes import compressed_scores, root_scores

CLOSE = {"rtol": 1e-12, "atol": 1e-14}


def logits(rows, num_classes, seed=0):
    return 3 * torch.randn(rows, num_classes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(st.integers(2, 70), st.integers(2, 40), st.integers(0, 2**63 - 1))
def test_every_class_is_in_one_bucket_and_buckets_are_of_one_size(num_classes, num_buckets, seed):
    signs = bucket_signs(num_classes, num_buckets, seed)
    assert (signs.abs().sum(0) == 1).all()
    sizes = signs.abs().sum(1)
    assert sizes.max() - sizes.min() <= 1
    assert set(signs.unique().tolist()) <= {-1.0, 0.0, 1.0}
    assert torch.equal(signs, bucket_signs(num_classes, num_buckets, seed))


def test_classes_and_signs_are_shared_out_anew_by_another_seed():
    found = torch.stack([bucket_signs(100, 10, seed) for seed in range(200)])
    together = (found[:, :, 0].abs() * found[:, :, 1].abs()).sum(1)  # whether two classes share a bucket
    assert 0.04 < together.mean() < 0.15  # 9 of the 99 others do
    assert abs(found.sum(1).mean()) < 0.02  # signs


@pytest.mark.parametrize("num_buckets", [2, 7, 19])
def test_a_bucket_s_score_is_the_signed_sum_of_its_classes(num_buckets):
    output = logits(5, 20)
    found = ClassBuckets(num_buckets, 3).all_scores(output, weighted=True)
    every = Softmax().all_scores(output, weighted=True)
    expected = torch.einsum("sc,cbd->sbd", bucket_signs(20, num_buckets, 3), every)
    torch.testing.assert_close(found, expected, **CLOSE)
    spanning, reflection = ClassBuckets(num_buckets, 3).spanning_scores(output)
    assert reflection is None
    assert torch.equal(spanning, found)


@pytest.mark.parametrize("num_buckets", [20, 21, 64])
def test_with_no_more_classes_than_buckets_every_class_is_by_itself(num_buckets):
    output, buckets = logits(5, 20), ClassBuckets(num_buckets, 3)
    assert torch.equal(buckets.all_scores(output, weighted=True), Softmax().all_scores(output, weighted=True))
    (found, reflection), (expected, other) = buckets.spanning_scores(output), Softmax().spanning_scores(output)
    assert torch.equal(found, expected)
    assert torch.equal(reflection.roots, other.roots)


def test_scores_without_weights_are_of_every_class():
    output = logits(3, 20)
    assert torch.equal(
        ClassBuckets(4, 0).all_scores(output, weighted=False), Softmax().all_scores(output, weighted=False)
    )


def test_dot_products_and_the_fisher_are_those_of_all_classes_on_average():
    output = logits(4, 30)
    every = Softmax().all_scores(output, weighted=True)
    kernel = torch.einsum("cid,cjd->ij", every, every)
    fisher = torch.einsum("cbd,cbe->de", every, every)
    found = []
    for seed in range(1000):
        scores = ClassBuckets(6, seed).all_scores(output, weighted=True)
        found.append((torch.einsum("sid,sjd->ij", scores, scores), torch.einsum("sbd,sbe->de", scores, scores)))
    for values, expected in zip(zip(*found, strict=True), (kernel, fisher), strict=True):
        many = torch.stack(values)
        error = (many.mean(0) - expected).abs() / (many.std(0) / len(many) ** 0.5).clamp_min(1e-9)
        assert error.max() < 4.5
        assert many.std(0).max() > 1e-3  # they are not all the same


def test_the_more_buckets_the_closer_the_dot_products():
    output = logits(60, 200)
    every = Softmax().all_scores(output, weighted=True)
    kernel = torch.einsum("cid,cjd->ij", every, every)
    errors = []
    for num_buckets in (4, 16, 64, 199):
        squares = []
        for seed in range(20):
            scores = ClassBuckets(num_buckets, seed).all_scores(output, weighted=True)
            squares.append((torch.einsum("sid,sjd->ij", scores, scores) - kernel).square().mean())
        errors.append(float(torch.stack(squares).mean().sqrt()))
    assert all(later < 0.62 * earlier for earlier, later in pairwise(errors))  # 1/√4, about


def test_a_network_is_gone_back_through_once_for_each_bucket():
    model = mlp((12, 16, 300)).double()
    engine = ScoreEngine(model, likelihood=ClassBuckets(8, 0))
    inputs = torch.randn(5, 12, dtype=torch.float64)
    batch = Batch(inputs, torch.zeros(5, dtype=torch.int64), torch.arange(5))
    assert all(item.deltas.shape[0] == 8 for item in root_scores(engine, batch, "all", 0).factors)
    compressor = Compressor(random_bases(engine.blocks, 4, 0), engine.blocks, engine.like)
    found = compressed_scores(engine, compressor, batch, "all", 0)[2]
    every = compressed_scores(ScoreEngine(model), compressor, batch, "all", 0)[2]
    expected = torch.einsum("sc,bcd->bsd", bucket_signs(300, 8, 0), every)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_metrics_of_other_buckets_are_told_apart(tmp_path):
    """Though their arrays are the same: these are of the true labels."""
    torch.manual_seed(0)
    model, inputs, labels = mlp((6, 5, 12)).eval(), torch.randn(40, 6), torch.arange(40) % 12
    options = {"dim": 32, "rank": 16, "metric_labels": "true"}
    first, second, plain = (
        fisher_ray.fit_metric(model, [(inputs, labels)], class_buckets=buckets, seed=seed, **options)
        for buckets, seed in ((4, np.int64(0)), (4, 1), (None, 0))
    )
    assert len({first.fingerprint, second.fingerprint, plain.fingerprint}) == 3
    place = str(tmp_path / "store")
    fisher_ray.write_features(model, first, inputs, place, labels=labels, chunk_rows=8)
    with pytest.raises(StoreError, match="another"):
        fisher_ray.write_features(model, second, inputs, place, labels=labels, chunk_rows=8)


def test_buckets_are_of_classes_alone():
    with pytest.raises(RequestError, match="not of a Gaussian likelihood"):
        bucketed(Gaussian(), (4, 0))
    assert isinstance(bucketed(Gaussian(), None), Gaussian)
    assert np.array_equal(bucket_signs(9, 3, 1), bucketed(Softmax(), (3, 1))._matrix(logits(1, 9)))
