import copy
import pickle
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from fisher_ray.errors import DataError, ModelError, RequestError, StoreError
from fisher_ray.metric import ClassGapSum, Normalisation, RangeSum, SparseMetric, class_gaps
from fisher_ray.store import ArraySpec, StoreSpec, create_store, load_arrays, save_arrays
from tests.reference import normalisation as reference

DIM = 10
BLOCKS = {"second": slice(6, 10), "first": slice(None, 6)}


def random_rows(num_rows, seed=0, dtype=torch.float64):
    """Gradients and labels of three classes; coordinates 1, 4, 5 and 8 tell the classes apart, 8 the best."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_rows) % 3
    rows = torch.randn(num_rows, DIM, generator=generator, dtype=torch.float64)
    for j, strength in ((1, 2), (4, 3), (5, 4), (8, 8)):
        rows[:, j] += strength * (labels - 1)
    return (rows - 0.3).to(dtype), labels


def fitted_sums(rows, labels, normalisation):
    sums = ClassGapSum(rows.shape[1], 3)
    sums.add(normalisation.apply(rows), labels)
    return sums.to_arrays()


def scaling(rows, **kwargs):
    ranges = RangeSum(DIM)
    ranges.add(rows)
    return Normalisation.from_ranges(ranges.to_arrays(), **kwargs)


@pytest.fixture
def fitted():
    """A metric with every part, and gradients that it was not fitted on."""
    rows, labels = random_rows(60)
    normalisation = scaling(rows, power=0.5, l2=True)
    attributes = {"labels": "true", "fingerprints": {"model": "é"}}
    sums = fitted_sums(rows, labels, normalisation)
    metric = SparseMetric.from_sums(sums, normalisation, keep=5, blocks=BLOCKS, attributes=attributes)
    return metric, random_rows(8, seed=1)[0]


def products(metric, a, b, inside=range(DIM)):
    """The kernel by the reference, over the coordinates ``inside``."""
    weights = dict(zip(metric.coordinates.tolist(), metric.weights.tolist(), strict=True))
    weights = {j: weight for j, weight in weights.items() if j in inside}
    left, right = (
        [dict(enumerate(row)) for row in metric.normalisation.apply(rows.double()).tolist()] for rows in (a, b)
    )
    expected = [[reference.weighted_product(x, y, weights) for y in right] for x in left]
    return torch.tensor(expected, dtype=torch.float64)


def assert_same_bits(actual, expected):
    assert (actual.dim, dict(actual.blocks), dict(actual.attributes)) == (
        expected.dim,
        {name: slice(block.start or 0, block.stop) for name, block in expected.blocks.items()},
        dict(expected.attributes),
    )
    assert list(actual.blocks) == list(expected.blocks)
    for name in ("coordinates", "weights"):
        mine, theirs = getattr(actual, name), getattr(expected, name)
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)
    arrays, others = actual.normalisation.to_arrays(), expected.normalisation.to_arrays()
    assert {name: value.tobytes() for name, value in arrays.items()} == {n: v.tobytes() for n, v in others.items()}


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("keep", [None, 1, 2, 3, 99])
def test_the_coordinates_with_the_largest_positive_gaps_are_chosen(keep, weighted):
    sums = fitted_sums(*random_rows(300), Normalisation())
    gaps = class_gaps(sums)
    assert gaps.argsort(descending=True)[:3].tolist() == [8, 5, 4]
    positive = (gaps > 0).nonzero()[:, 0].tolist()
    assert 4 < len(positive) < DIM
    expected = {None: positive, 1: [8], 2: [5, 8], 3: [4, 5, 8], 99: positive}[keep]

    metric = SparseMetric.from_sums(sums, Normalisation(), keep=keep, weighted=weighted)

    assert metric.coordinates.tolist() == expected
    assert metric.weights.tolist() == (gaps[expected].tolist() if weighted else [1.0] * len(expected))
    assert metric.dim == DIM


def test_of_equal_gaps_the_first_coordinates_are_chosen():
    rows, labels = random_rows(30)
    sums = fitted_sums(rows[:, [8]].expand(-1, 5000), labels, Normalisation())  # few are sorted stably anyway
    assert SparseMetric.from_sums(sums, Normalisation(), keep=4).coordinates.tolist() == [0, 1, 2, 3]


def test_sums_in_which_no_class_is_alike_are_refused():
    rows = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]).expand(-1, DIM)
    sums = fitted_sums(rows, torch.tensor([0, 0, 1, 1]), Normalisation())
    assert bool((class_gaps(sums) < 0).all())
    with pytest.raises(DataError, match="nowhere more alike"):
        SparseMetric.from_sums(sums, Normalisation())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_the_kernel_equals_a_weighted_sum_over_the_chosen_coordinates(fitted, dtype, tolerance):
    metric, rows = fitted
    expected = products(metric, rows[:3], rows)
    assert float(expected.abs().max()) > 1e-3

    rows = rows.to(dtype)
    kernel, features = metric.kernel(rows[:3], rows), metric.transform(rows)

    assert (kernel.dtype, features.dtype, features.shape) == (dtype, dtype, (8, 5))
    torch.testing.assert_close(kernel.double(), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close((features[:3] @ features.T).double(), expected, rtol=0, atol=tolerance)
    batched = metric.kernel(rows.reshape(2, 4, DIM), rows.reshape(2, 4, DIM))
    torch.testing.assert_close(batched[0].double(), products(metric, rows[:4], rows[:4]), rtol=0, atol=tolerance)
    torch.testing.assert_close(batched[1].double(), products(metric, rows[4:], rows[4:]), rtol=0, atol=tolerance)


def test_the_block_kernel_is_the_sum_of_the_blocks_products(fitted):
    metric, rows = fitted
    by_block = metric.kernels_by_block(rows[:3], rows)
    first, second = products(metric, rows[:3], rows, range(6)), products(metric, rows[:3], rows, range(6, 10))

    assert list(by_block) == ["second", "first"]
    torch.testing.assert_close(by_block["first"], first, rtol=0, atol=1e-12)
    torch.testing.assert_close(by_block["second"], second, rtol=0, atol=1e-12)
    torch.testing.assert_close(metric.block_kernel(rows[:3], rows), first + second, rtol=0, atol=1e-12)
    assert float((first * second - (first + second)).abs().min()) > 1e-3  # what the product of sums would give


def test_blocks_that_cover_the_coordinates_once_give_the_kernel_itself(fitted):
    metric, rows = fitted
    for cuts in ([0, 10], [0, 1, 4, 5, 9, 10], list(range(11))):
        blocks = {f"{a}": slice(a, b) for a, b in pairwise(cuts)}
        kernel = replace(metric, blocks=blocks).block_kernel(rows, rows[:2])
        torch.testing.assert_close(kernel, metric.kernel(rows, rows[:2]), rtol=0, atol=1e-12)


def test_overlapping_blocks_count_twice_and_what_no_block_has_not_at_all(fitted):
    metric, rows = fitted
    overlapping = replace(metric, blocks={"a": slice(0, 6), "b": slice(4, 9)}).block_kernel(rows, rows)
    expected = products(metric, rows, rows, range(6)) + products(metric, rows, rows, range(4, 9))
    torch.testing.assert_close(overlapping, expected, rtol=0, atol=1e-12)
    part = replace(metric, blocks={"b": slice(4, 9), "none": slice(6, 8)})
    assert not {6, 7} & set(metric.coordinates.tolist())
    assert not part.kernels_by_block(rows, rows)["none"].any()
    torch.testing.assert_close(part.block_kernel(rows, rows), products(metric, rows, rows, range(4, 9)))


def test_a_metric_without_blocks_says_so(fitted):
    metric, rows = fitted
    for use in (replace(metric, blocks={}).kernels_by_block, replace(metric, blocks={}).block_kernel):
        with pytest.raises(RequestError, match="no blocks"):
            use(rows, rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kept_entries_have_the_features_of_all_entries_where_all_are_kept(fitted, dtype):
    metric, rows = fitted
    rows = rows.to(dtype).reshape(2, 4, DIM)
    coordinates = torch.arange(DIM, dtype=torch.int32).flip(0).expand(2, 4, DIM)
    actual = metric.transform_sparse(rows.flip(2), coordinates)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, metric.transform(rows), rtol=1e-6, atol=1e-7)


def test_features_of_kept_entries_are_zero_where_an_entry_was_left_out(fitted):
    metric, rows = fitted
    metric = replace(metric, coordinates=torch.tensor([1, 2, 4, 5, 6]))
    kept = torch.tensor([[0, 8], [9, 5], [4, 2]])
    values = rows[:3].gather(1, kept)
    normalised = metric.normalisation.apply_sparse(values, kept)
    expected = torch.zeros(3, DIM, dtype=torch.float64).scatter(1, kept, normalised)[:, metric.coordinates]
    actual = metric.transform_sparse(values, kept)
    torch.testing.assert_close(actual, expected * metric.weights.sqrt(), rtol=1e-12, atol=0)
    assert int((actual != 0).sum()) == 3


def test_rows_of_another_network_are_refused(fitted):
    rows = fitted[1]
    for metric in (fitted[0], replace(fitted[0], normalisation=Normalisation())):
        for use in (metric.transform, lambda wrong, metric=metric: metric.kernel(wrong, rows)):
            with pytest.raises(ModelError, match="do not have 10 coordinates"):
                use(torch.zeros(2, DIM + 1, dtype=torch.float64))
        with pytest.raises(ModelError, match=r"coordinate 10 is not in \[0, 10\)"):
            metric.transform_sparse(rows[:, :1], torch.full((8, 1), DIM))


@pytest.mark.parametrize(
    "wrong",
    [
        {"dim": 8},
        {"dim": 11},
        {"coordinates": torch.tensor([4, 1, 5, 7, 8])},
        {"coordinates": torch.tensor([1, 1, 4, 5, 8])},
        {"coordinates": torch.tensor([-1, 1, 4, 5, 8])},
        {"coordinates": torch.zeros(0, dtype=torch.long), "weights": torch.zeros(0)},
        {"weights": torch.ones(4)},
        {"weights": torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])},
        {"normalisation": Normalisation(torch.zeros(9), torch.ones(9))},
        {"blocks": {"a": slice(0, 11)}},
        {"blocks": {"a": slice(3, 3)}},
        {"blocks": {"a": slice(-2, 3)}},
        {"blocks": {"a": slice(2, None)}},
        {"blocks": {"a": slice(0, 4, 2)}},
    ],
    ids=str,
)
def test_attributes_that_do_not_fit_together_are_refused(fitted, wrong):
    with pytest.raises(RequestError):
        replace(fitted[0], **wrong)


@pytest.mark.parametrize("keep", [0, -1])
def test_a_number_of_coordinates_below_one_is_refused(keep):
    with pytest.raises(RequestError, match="give at least 1"):
        SparseMetric.from_sums(fitted_sums(*random_rows(30), Normalisation()), Normalisation(), keep=keep)


@pytest.mark.parametrize("normalisation", [None, Normalisation(power=0.5), Normalisation(l2=True)])
def test_a_saved_metric_comes_back_with_the_same_bits_and_gives_the_same_features(fitted, normalisation, tmp_path):
    metric, rows = fitted
    if normalisation:
        metric = replace(metric, normalisation=normalisation)
    for _ in range(2):  # the second time it replaces the first
        metric.save(str(tmp_path / "metric.zarr"))
    loaded = SparseMetric.load(str(tmp_path / "metric.zarr"))

    assert_same_bits(loaded, metric)
    assert torch.equal(loaded.transform(rows), metric.transform(rows))
    assert torch.equal(loaded.block_kernel(rows, rows), metric.block_kernel(rows, rows))
    loaded.save(str(tmp_path / "again.zarr"))
    assert_same_bits(SparseMetric.load(str(tmp_path / "again.zarr")), metric)


@pytest.mark.s3
def test_a_metric_saved_in_s3_comes_back_with_the_same_bits(fitted, s3_url):
    fitted[0].save(s3_url)
    assert_same_bits(SparseMetric.load(s3_url), fitted[0])


def test_its_own_attributes_win_over_the_same_names(fitted, tmp_path):
    metric = replace(fitted[0], attributes={"kind": "other", "dim": 3, "labels": "true"})
    metric.save(str(tmp_path / "metric"))
    assert_same_bits(SparseMetric.load(str(tmp_path / "metric")), replace(metric, attributes={"labels": "true"}))


def test_what_is_not_a_sparse_metric_is_refused(fitted, tmp_path):
    fitted[0].save(str(tmp_path / "metric"))
    arrays, kept = load_arrays(str(tmp_path / "metric"))
    save_arrays(str(tmp_path / "copy"), arrays, kept)
    SparseMetric.load(str(tmp_path / "copy"))

    save_arrays(str(tmp_path / "low-rank"), arrays, {**kept, "kind": "metric"})
    save_arrays(str(tmp_path / "later"), arrays, {**kept, "schema": 2})
    create_store(str(tmp_path / "features"), StoreSpec(4, 4, 4, "none", {"a": ArraySpec((), "int64", ("sample",))}, {}))
    (tmp_path / "metric" / "seal.json").unlink()
    for name in ("low-rank", "later", "features", "metric", "nothing"):
        with pytest.raises(StoreError):
            SparseMetric.load(str(tmp_path / name))


def test_copies_and_pickles_give_the_same_features(fitted):
    metric, rows = fitted
    for again in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        assert torch.equal(again.transform(rows), metric.transform(rows))
        assert again.blocks == metric.blocks


@pytest.mark.gpu
def test_features_on_a_gpu_equal_those_on_the_processor(fitted):
    metric, rows = fitted
    coordinates = torch.arange(DIM).expand(8, DIM).cuda()
    torch.testing.assert_close(metric.transform(rows.cuda()).cpu(), metric.transform(rows), rtol=1e-12, atol=1e-12)
    sparse = metric.transform_sparse(rows.cuda(), coordinates).cpu()
    torch.testing.assert_close(sparse, metric.transform(rows), rtol=1e-12, atol=1e-12)
    kernel = metric.block_kernel(rows.cuda(), rows.cuda()).cpu()
    torch.testing.assert_close(kernel, metric.block_kernel(rows, rows), rtol=1e-12, atol=1e-12)
