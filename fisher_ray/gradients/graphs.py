"""What is done with batches of one size, recorded as a CUDA graph and replayed.

A small network's kernels take less time on a GPU than Python takes to ask for them; a graph asks for all at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisher_ray.gradients.memory import is_out_of_memory

Made = tuple[Tensor | None, ...]
WARM_UPS = 4
"""How often a function runs before it is recorded: the engine has made its comparisons with a plain backward then."""
_LOG = logging.getLogger(__name__)


class Graphs:
    """Runs functions of batches; on a GPU, of batches of one size by replaying what was recorded with the first.

    Every batch of that size is replayed, the first one too, so that a sample's numbers do not depend on which batch a
    process happened to see first.

    Args:
        batch: that size; None to record nothing.
    """

    def __init__(self, batch: int | None = None) -> None:
        """See the class."""
        self._batch, self._recorded = batch, dict[Hashable, _Graph | None]()

    def run(self, key: Hashable, function: Callable[..., Made], *tensors: Tensor) -> Made:
        """Return ``function(*tensors)``.

        Args:
            key: of the function, with all that it holds on to.
            function: of tensors whose first axis are the samples; on a GPU it may do nothing but launch kernels there.
                One that does more, such as looking at a number, is not recorded but called each time.
            tensors: one at least.
        """
        if len(tensors[0]) != self._batch or not all(tensor.is_cuda for tensor in tensors):
            return function(*tensors)
        place = (key, *((tensor.shape, tensor.dtype) for tensor in tensors))
        if place not in self._recorded:
            self._recorded[place] = _record(function, tensors)
        graph = self._recorded[place]
        return function(*tensors) if graph is None else graph.replay(tensors)


@dataclass(frozen=True)
class _Graph:
    graph: Any
    inputs: tuple[Tensor, ...]
    outputs: Made

    def replay(self, tensors: tuple[Tensor, ...]) -> Made:
        for place, value in zip(self.inputs, tensors, strict=True):
            place.copy_(value, non_blocking=True)
        self.graph.replay()
        return tuple(None if value is None else value.clone() for value in self.outputs)


def _record(function: Callable[..., Made], tensors: tuple[Tensor, ...]) -> _Graph | None:
    inputs = tuple(tensor.clone() for tensor in tensors)
    beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(WARM_UPS):
            function(*inputs)
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    try:
        # Other threads of this process read samples meanwhile, and may allocate memory.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = function(*inputs)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        _LOG.warning("the network's work is launched step by step, since it cannot be recorded: %s", error)
        return None
    return _Graph(graph, inputs, outputs)
