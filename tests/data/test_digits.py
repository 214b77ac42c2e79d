import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from fisher_ray.config import SourceConfig
from fisher_ray.data import check_source, open_source
from fisher_ray.data.digits import digits
from fisher_ray.errors import ConfigError


def test_the_three_splits_are_all_digits_each_once():
    splits = [digits(name) for name in ("train", "shallow", "test")]
    assert [len(split) for split in splits] == [600, 600, 597]
    ours = sorted(
        (picture * 16).tobytes() + bytes([label])
        for split in splits
        for picture, label in map(split.__getitem__, range(len(split)))
    )
    bunch = load_digits()
    theirs = sorted(
        x.astype(np.float32).tobytes() + bytes([y]) for x, y in zip(bunch.images, bunch.target, strict=True)
    )
    assert ours == theirs


def test_the_split_is_fixed():
    """The labels were noted when the split was made: another order would make other results of the same demo."""
    noted = {"train": [2, 8, 2, 6, 6, 7, 1, 9], "shallow": [2, 7, 1, 4, 4, 1, 3, 5], "test": [6, 1, 6, 0, 6, 4, 0, 1]}
    assert {name: [digits(name)[row][1] for row in range(8)] for name in noted} == noted


def test_the_demo_source_has_pictures_of_eight_by_eight():
    config = SourceConfig(format="torch", factory="fisher_ray.data.digits:digits", kwargs={"split": "test"})
    source = open_source(config, root=".", transform="fisher_ray.models:digits_transform", key="data.test")
    assert check_source(source, 10).shape[1:] == (1, 8, 8)


def test_an_unknown_split_is_refused():
    with pytest.raises(ConfigError, match=r"no split 'validation'\. Choose one of: train, shallow, test"):
        digits("validation")


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ConfigError, match=r'pip install "fisher_ray\[demo\]"'):
        digits("train")
