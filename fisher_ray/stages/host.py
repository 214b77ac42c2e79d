"""Copies from a GPU to the host's memory while the GPU computes on."""

from __future__ import annotations

import torch
from torch import Tensor


class Host:
    """Copies tensors to pinned host memory on a stream beside the one that computes.

    Args:
        device: where the tensors are; of a CPU nothing is copied.
    """

    def __init__(self, device: torch.device) -> None:
        """See the class."""
        self._beside = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def copy(self, value: Tensor) -> Tensor:
        """Return a copy in host memory, to be read after :meth:`wait`; a tensor that is there already, as it is."""
        if self._beside is None or not value.is_cuda:
            return value
        self._beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._beside):
            made = value.to("cpu", non_blocking=True)
        value.record_stream(self._beside)  # its memory is not used again before it is copied
        return made

    def wait(self) -> None:
        """Wait until all copies are there."""
        if self._beside is not None:
            self._beside.synchronize()
