"""How many bytes of tensors a computation holds at once, counted and not measured: the same on every machine.

And whether an error says that there were too few.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
"""Of the errors for want of memory for which torch has no class: on the CPU, and of libraries on a GPU."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, or a library that it calls, could not get memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


class _Bytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the memory of tensors that operations return, until it is given back."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._is_new(leaf.untyped_storage())  # what was there before is not counted
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor) and self._is_new(storage := leaf.untyped_storage()):
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._give_back, storage.nbytes())
        return found

    def _is_new(self, storage: torch.UntypedStorage) -> bool:
        known = self._known.get(id(storage))
        if known is not None and known() is storage:
            return False
        self._known[id(storage)] = weakref.ref(storage)
        return True

    def _give_back(self, size: int) -> None:
        self.now -= size


def peak_bytes(compute: Callable[[], object]) -> int:
    """Return the most bytes that tensors made by ``compute`` hold at one time; what kernels take inside is not seen."""
    counted = _Bytes()
    with counted:
        compute()
    return counted.peak
