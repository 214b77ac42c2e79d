"""How the ranks of a fit reach each other: ``torch.distributed``.

What travels between the ranks is small next to their arithmetic and lives on the CPU, so gloo carries it; NCCL takes
over the tensors where every rank has a GPU of its own. The driver cannot know that (Ray's GPUs may be shared, or mere
numbers without hardware), and NCCL refuses both: so the process group starts with gloo, and the ranks decide.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fisher_ray.errors import WorkersLostError
from fisher_ray.runtime.failures import reason
from fisher_ray.stages.logistic import Order


class TorchExchange:
    """The exchange through ``torch.distributed``: objects go through the default group, which has to be gloo's.

    Args:
        device: this rank's. Tensors go through NCCL if every rank has a GPU of its own, else through gloo too.

    Attributes:
        rank: this rank.
        size: how many there are.
        backend: what carries tensors, ``nccl`` or ``gloo``.
    """

    def __init__(self, device: torch.device) -> None:
        """See the class.

        Raises:
            WorkersLostError: here and in every method, if another rank cannot be reached.
        """
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None
        self.backend = choose_backend(self._all(gpu))
        self._device = device if self.backend == "nccl" else torch.device("cpu")
        self._group = dist.new_group(backend="nccl") if self.backend == "nccl" else None

    def share(self, order: Order | None) -> Order:
        """See :class:`fisher_ray.stages.logistic.Exchange`."""
        heads: list[Any] = [None if order is None else (order.task, order.part, tuple(order.weight.shape))]
        with _in_touch():
            dist.broadcast_object_list(heads, src=0)
        task, part, shape = heads[0]
        given = order or Order(task, part, *(torch.empty(size, dtype=torch.float64) for size in (shape, shape[:1])))
        return Order(task, part, self._broadcast(given.weight), self._broadcast(given.bias))

    def gather(self, value: Tensor) -> list[Tensor]:
        """See :class:`fisher_ray.stages.exchange.Ranks`."""
        mine = value.to(self._device).contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        with _in_touch():
            dist.all_gather(parts, mine, group=self._group)
        return [part.to(value.device) for part in parts]

    def collect(self, reply: Tensor | Exception) -> list[Tensor] | Exception:
        """See :class:`fisher_ray.stages.exchange.Ranks`."""
        heads = self._all(reply if isinstance(reply, Exception) else tuple(reply.shape))
        for head in heads:
            if isinstance(head, Exception):
                return head
        sizes = [math.prod(shape) for shape in heads]
        mine = torch.zeros(max(sizes), dtype=torch.float64, device=self._device)
        if isinstance(reply, Tensor):
            mine[: reply.numel()] = reply.reshape(-1)
        parts = [torch.empty_like(mine) for _ in sizes] if self.rank == 0 else None
        if len(mine):
            with _in_touch():
                dist.gather(mine, parts, dst=0, group=self._group)
        return [part[:size].cpu().view(shape) for part, size, shape in zip(parts or [], sizes, heads, strict=False)]

    def _broadcast(self, value: Tensor) -> Tensor:
        value = value.to(self._device).contiguous()
        if value.numel():
            with _in_touch():
                dist.broadcast(value, src=0, group=self._group)
        return value.cpu()

    def _all(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        with _in_touch():
            dist.all_gather_object(found, value)
        return found


def choose_backend(gpus: list[str | None]) -> str:
    """Return what carries tensors between ranks with these GPUs (their UUIDs; None without one): nccl or gloo."""
    own = None not in gpus and len(set(gpus)) == len(gpus)
    return "nccl" if own else "gloo"


@contextmanager
def _in_touch() -> Iterator[None]:
    """Tell a broken connection from other failures: Ray Train starts the group again after either."""
    try:
        yield
    except RuntimeError as error:  # of which torch.distributed's errors are
        raise WorkersLostError(f"a rank of the fit cannot be reached: {reason(error)}") from error
