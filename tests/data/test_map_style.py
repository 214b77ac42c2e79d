import pytest
import torch

from fisher_ray.config import SourceConfig
from fisher_ray.data import check_source, load_batches, open_source
from fisher_ray.errors import ConfigError, DataError


def opened(factory, transform=None, **settings):
    config = SourceConfig(format="torch", factory=f"tests.data.files:{factory}", **settings)
    return open_source(config, root=".", transform=transform, key="data.train")


def test_tensors_and_tensor_labels_are_taken(tmp_path):
    source = opened("tensors", kwargs={"num_rows": 5}, rows=(1, 5))
    (batch,) = load_batches(source, range(4), 8, num_classes=3)
    torch.testing.assert_close(batch.inputs[:, 0], torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert batch.labels.tolist() == [1, 2, 0, 1]
    assert check_source(source, 3).shape[1:] == (2,)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (1, "cannot be decoded: RuntimeError: the disk sector is gone"),
        (2, "1.0 is not an integer"),
        (3, "True is not an integer"),
        (4, r"shape \(3,\), the split's is \(2,\)"),
        (5, "NaN or infinity"),
        (6, r"the item is str, not \(input, label\)"),
        (7, "the input is str, not a tensor or array"),
    ],
)
def test_a_bad_item_is_named(row, said):
    source = opened("mixed")
    with pytest.raises(DataError, match=said) as caught:
        list(load_batches(source, range(row, row + 1), 1, num_classes=2, expected_shape=(2,)))
    assert caught.value.row == row
    assert f"tests.data.files:mixed item {row} (data.train row {row})" in str(caught.value)


def test_bad_items_are_left_out_with_their_reasons():
    skipped = {}
    batches = list(load_batches(opened("mixed"), range(9), 3, num_classes=2, on_error="skip", skipped=skipped))
    assert [batch.index.tolist() for batch in batches] == [[0], [8]]
    assert sorted(skipped) == [1, 2, 3, 4, 5, 6, 7]
    assert "disk sector" in skipped[1]


def test_the_fingerprint_depends_on_length_rows_and_samples():
    prints = [
        opened("tensors").fingerprint(),
        opened("tensors", kwargs={"num_rows": 7}).fingerprint(),
        opened("tensors", rows=(0, 5)).fingerprint(),
        opened("mixed").fingerprint(),
    ]
    assert len(set(prints)) == 4
    assert prints[0] == opened("tensors").fingerprint()


@pytest.mark.parametrize(
    ("factory", "settings", "said"),
    [
        ("unsized", {}, "object, which has no __len__ and __getitem__"),
        ("picky", {}, "raised OSError: no such archive"),
        ("tensors", {"kwargs": {"size": 3}}, "TypeError"),
        ("tensors", {"rows": (0, 9)}, r"data.train.rows \[0, 9\) goes beyond .* 6 rows"),
        ("absent", {}, "has no 'absent'"),
        ("NOT_A_FUNCTION", {}, "is int, not a function"),
    ],
)
def test_a_factory_that_does_not_fit_is_a_wrong_request(factory, settings, said):
    with pytest.raises(ConfigError, match=said):
        opened(factory, **settings)
