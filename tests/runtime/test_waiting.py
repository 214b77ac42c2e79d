"""What waits is handed out as a list without repetitions would hand it out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fisher_ray.runtime.tree import Node
from fisher_ray.runtime.waiting import Waiting

NODES = st.integers(0, 5).map(lambda position: Node(0, position))
STEPS = st.lists(st.tuples(st.sampled_from(["append", "put_first", "discard", "take"]), NODES), max_size=40)


@given(STEPS)
def test_nodes_wait_as_in_a_list_in_which_each_is_once(steps):
    waiting, oracle = Waiting(), list[Node]()
    for name, node in steps:
        if name == "take":
            if oracle:
                assert waiting.first == oracle[0]
                assert waiting.take() == oracle.pop(0)
            continue
        getattr(waiting, name)(node)
        if name == "append":
            oracle += [] if node in oracle else [node]
        else:
            oracle = [*([node] if name == "put_first" else []), *(other for other in oracle if other != node)]
        assert len(waiting) == len(oracle)
