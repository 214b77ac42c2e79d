import threading
from pathlib import Path

import numpy as np
import pytest

from fisher_ray.errors import StorageError
from fisher_ray.runtime.checkpoints import NUM_REMOVERS, Checkpoints, remove_checkpoints
from fisher_ray.runtime.tree import Node
from fisher_ray.storage import Storage
from fisher_ray.store import load_arrays, save_arrays


@pytest.mark.parametrize(("every", "level"), [(1, 0), (2, 1), (3, 2), (8, 3), (9, 4)])
def test_a_sum_of_so_many_units_and_every_larger_one_is_kept(tmp_path, every, level):
    checkpoints = Checkpoints(Storage(str(tmp_path)), "metric/all", every)
    for other in range(6):
        assert (checkpoints.place(Node(other, 5)) is not None) == (other >= level)


def test_none_keeps_none_and_finds_none(tmp_path):
    Checkpoints(Storage(str(tmp_path)), "metric/all", 1)
    save_arrays(str(tmp_path / "sums/metric/all/2-0.zarr"), {"a": np.ones(2)}, {})
    nothing = Checkpoints(Storage(str(tmp_path)), "metric/all", None)
    assert nothing.place(Node(9, 0)) is None
    assert nothing.found() == []


def test_what_is_found_is_whole_and_no_part_of_another(tmp_path):
    checkpoints = Checkpoints(Storage(str(tmp_path)), "metric/all", 1)
    for node in (Node(0, 4), Node(1, 0), Node(1, 1), Node(2, 0), Node(1, 6), Node(3, 1)):
        save_arrays(checkpoints.url(node), {"a": np.full(2, node.level)}, {})
    (tmp_path / "sums/metric/all/3-1.zarr/seal.json").unlink()  # its writer did not end
    (tmp_path / "sums/metric/all/notes.txt").write_text("mine")
    found = checkpoints.found()
    assert sorted((node.level, node.position) for node in found) == [(0, 4), (1, 6), (2, 0)]
    assert load_arrays(checkpoints.url(Node(2, 0)))[0]["a"].tolist() == [2, 2]
    assert Checkpoints(Storage(str(tmp_path)), "linear/fit", 1).found() == []


def test_what_was_kept_is_removed(tmp_path):
    checkpoints = Checkpoints(Storage(str(tmp_path)), "metric/all", 1)
    for node in (Node(1, 0), Node(1, 1)):
        save_arrays(checkpoints.url(node), {"a": np.ones(2)}, {})
    checkpoints.remove([Node(1, 0)])
    assert checkpoints.found() == [Node(1, 1)]
    remove_checkpoints(Storage(str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


def test_a_sum_that_is_kept_again_is_not_removed_by_what_removes_the_one_before(tmp_path):
    begun, go_on = threading.Event(), threading.Event()

    class Slow(Storage):
        def remove(self, prefix: str) -> None:
            begun.set()
            assert go_on.wait(60)
            super().remove(prefix)

    checkpoints = Checkpoints(Slow(str(tmp_path)), "metric/all", 1)
    nodes = [Node(1, position) for position in range(NUM_REMOVERS + 1)]
    for node in nodes:
        save_arrays(checkpoints.url(node), {"a": np.ones(2)}, {})
    checkpoints.remove(nodes)
    assert begun.wait(60)
    assert checkpoints.place(nodes[-1]) is not None  # its removal has not begun, and never will
    go_on.set()
    for node in nodes[:-1]:
        assert not Path(str(checkpoints.place(node))).exists()
    assert checkpoints.settle() == []
    assert checkpoints.found() == [nodes[-1]]


def test_a_sum_that_cannot_be_removed_is_told_at_the_end(tmp_path):
    class Refusing(Storage):
        def remove(self, prefix: str) -> None:
            raise StorageError(f"{prefix}: not now")

    checkpoints = Checkpoints(Refusing(str(tmp_path)), "metric/all", 1)
    checkpoints.remove([Node(1, 3)])
    checkpoints.remove([Node(1, 4)])
    assert checkpoints.place(Node(1, 4)) == checkpoints.url(Node(1, 4))  # it is written over
    assert checkpoints.settle() == ["sums/metric/all/1-3.zarr: not now"]
    assert checkpoints.settle() == []
