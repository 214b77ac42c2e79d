import threading
from types import SimpleNamespace

import numpy as np
import pytest

from fisher_ray.runtime.worker import Worker


def a_worker():
    worker = object.__new__(Worker)
    worker._threads, worker._bench = 1, SimpleNamespace(turn=threading.RLock())
    return worker


def test_merging_adds_every_sum_and_drops_none():
    left, right = {"a": np.ones(2), "b": np.ones(())}, {"a": np.full(2, 3.0), "b": np.zeros(())}

    nothing, merged = a_worker().merge(None, left, right, None)
    assert nothing is None
    assert (merged["a"].tolist(), float(merged["b"])) == ([4.0, 4.0], 1.0)
    for first, second in ((left, {"a": right["a"]}), ({"a": left["a"]}, right)):
        with pytest.raises(ValueError, match="do not merge"):
            a_worker().merge(None, first, second, None)


def test_a_merge_of_its_own_gets_the_workbench():
    worker = a_worker()
    _, merged = worker.merge(lambda *given: {"given": given}, {"a": 1}, {"a": 2}, None)
    assert merged == {"given": (worker._bench, {"a": 1}, {"a": 2})}


def test_what_is_kept_is_read_back_as_it_was(tmp_path):
    left, right = {"a": np.arange(3.0)}, {"a": np.full(3, 0.1)}
    _, merged = a_worker().merge(None, left, right, str(tmp_path / "sum.zarr"))
    _, restored = a_worker().restore(str(tmp_path / "sum.zarr"))
    assert restored.keys() == merged.keys()
    assert restored["a"].tobytes() == merged["a"].tobytes()
