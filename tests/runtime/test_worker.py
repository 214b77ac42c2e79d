from types import SimpleNamespace

import numpy as np
import pytest

from fisher_ray.runtime.worker import Worker


def test_merging_adds_every_sum_and_drops_none():
    left, right = {"a": np.ones(2), "b": np.ones(())}, {"a": np.full(2, 3.0), "b": np.zeros(())}

    nothing, merged = Worker.merge(None, None, left, right)
    assert nothing is None
    assert (merged["a"].tolist(), float(merged["b"])) == ([4.0, 4.0], 1.0)
    for first, second in ((left, {"a": right["a"]}), ({"a": left["a"]}, right)):
        with pytest.raises(ValueError, match="do not merge"):
            Worker.merge(None, None, first, second)


def test_a_merge_of_its_own_gets_the_workbench():
    worker = SimpleNamespace(_bench="bench")
    _, merged = Worker.merge(worker, lambda *given: {"given": given}, {"a": 1}, {"a": 2})
    assert merged == {"given": ("bench", {"a": 1}, {"a": 2})}
