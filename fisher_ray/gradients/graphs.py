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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fisher_ray.gradients.memory import is_out_of_memory

Made = tuple[Tensor | None, ...]
WARM_UPS = 4
"""How often a function runs before it is recorded: the engine has made its comparisons with a plain backward then."""
_LOOKING = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
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
        self._pool: Any = None

    def run(self, key: Hashable, function: Callable[..., Made], *tensors: Tensor) -> Made:
        """Return ``function(*tensors)``.

        Args:
            key: of the function, with all that it holds on to.
            function: of tensors whose first axis are the samples; on a GPU it may do nothing but launch kernels there,
                and what it keeps from one call to the next it must never let go. One that does more, such as looking at
                a number, is not recorded but called each time.
            tensors: one at least.
        """
        if self._batch is None or not all(isinstance(tensor, Tensor) and tensor.is_cuda for tensor in tensors):
            return function(*tensors)
        if len(tensors[0]) != self._batch:
            return function(*tensors)
        place = (key, *((tensor.shape, tensor.dtype) for tensor in tensors))
        if place not in self._recorded:
            self._record(place, function, tensors)
        graph = self._recorded[place]
        return function(*tensors) if graph is None else graph.replay(tensors)

    def _record(self, place: Hashable, function: Callable[..., Made], tensors: tuple[Tensor, ...]) -> None:
        stream, beside = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        inputs = tuple(tensor.clone() for tensor in tensors)
        beside.wait_stream(stream)
        with torch.cuda.stream(beside):
            for _ in range(WARM_UPS):
                function(*inputs)
            looked = _looks(function, inputs)
        stream.wait_stream(beside)
        self._recorded[place] = None
        if looked:
            _LOG.warning("the network's work is launched step by step, since it cannot be recorded: %s", looked)
            return
        if self._pool is None:  # for all graphs: what one leaves behind is copied before another is replayed
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads of this process read samples meanwhile, and may allocate memory.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                outputs = function(*inputs)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            _LOG.warning("the network's work is launched step by step, since it cannot be recorded: %s", error)
            return
        finally:
            torch.cuda.set_stream(stream)  # where torch leaves another, after a failure
        self._recorded[place] = _Graph(graph, inputs, outputs)


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


class _LookedError(Exception):
    """Something was looked at, or copied between devices, in the middle of the work."""


class _Blind(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses what waits for the GPU, in this thread alone, before a recording that it would break."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(tag in func.tags for tag in _LOOKING) and not _takes_places(func, args):
            raise _LookedError(f"{func} looks at numbers")
        found = func(*args, **(kwargs or {}))
        copies = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        tensors = [leaf for leaf in tree_leaves((args, found)) if isinstance(leaf, Tensor)]
        if len({tensor.device.type for tensor in tensors if copies or tensor.ndim}) > 1:
            raise _LookedError(f"{func} copies between the GPU and the host")
        return found


def _takes_places(func: Any, args: Any) -> bool:
    """Whether it indexes by numbers of places, whose result has the same size whatever they are, and not by masks."""
    if func is not torch.ops.aten.index.Tensor:
        return False
    return all(place is None or place.dtype in (torch.int32, torch.int64) for place in args[1])


def _looks(function: Callable[..., Made], inputs: tuple[Tensor, ...]) -> str:
    """Return what a function does that cannot be recorded, or nothing."""
    try:
        with _Blind():  # type: ignore[no-untyped-call]
            function(*inputs)
    except Exception as error:
        found: BaseException | None = error
        while found is not None and not isinstance(found, _LookedError):
            found = found.__cause__ or found.__context__
        if found is None:
            raise
        return str(found)
    return ""
