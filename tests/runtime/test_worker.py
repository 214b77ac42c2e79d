import threading
from types import SimpleNamespace

import numpy as np
import pytest
import ray

from fisher_ray.runtime.slices import cut, join
from fisher_ray.runtime.worker import Worker


def a_worker():
    worker = object.__new__(Worker)
    worker._threads, worker._bench = 1, SimpleNamespace(turn=threading.RLock())
    return worker


@pytest.fixture
def refs(monkeypatch):
    """References are what they refer to."""
    monkeypatch.setattr(ray, "get", lambda found: found)


def test_merging_adds_every_sum_and_drops_none(refs):
    left, right = {"a": np.ones(2), "b": np.ones(())}, {"a": np.full(2, 3.0), "b": np.zeros(())}

    merged, nothing = a_worker().merge(None, [left], [right], None)
    assert nothing is None
    assert (merged["a"].tolist(), float(merged["b"])) == ([4.0, 4.0], 1.0)
    for first, second in ((left, {"a": right["a"]}), ({"a": left["a"]}, right)):
        with pytest.raises(ValueError, match="do not merge"):
            list(a_worker().merge(None, [first], [second], None))


def test_a_merge_of_its_own_gets_the_workbench(refs):
    worker = a_worker()
    merged, _ = worker.merge(lambda *given: {"given": given}, [{"a": 1}], [{"a": 2}], None)
    assert merged == {"given": (worker._bench, {"a": 1}, {"a": 2})}


@pytest.mark.parametrize("late", [None, "a/c/0", "b/c/0/0"])
@pytest.mark.parametrize("number", [1, 2])
def test_what_is_kept_is_read_back_as_it_was(number, late, refs, tmp_path):
    if late is not None:  # of a sum that was removed while its second writer was at it
        (tmp_path / "sum.zarr" / late).parent.mkdir(parents=True)
        (tmp_path / "sum.zarr" / late).write_bytes(b"late")
    left, right = {"a": np.arange(3.0)}, {"a": np.full(3, 0.1)}
    *merged, _ = a_worker().merge(None, cut(left, number), cut(right, number), str(tmp_path / "sum.zarr"))
    *restored, _ = a_worker().restore(str(tmp_path / "sum.zarr"), number)
    assert join(restored).keys() == join(merged).keys()
    assert join(restored)["a"].tobytes() == join(merged)["a"].tobytes() == (left["a"] + right["a"]).tobytes()
