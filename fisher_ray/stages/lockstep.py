"""Ranks that train in step: an error that one of them meets is raised by all, and none waits for another in vain."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fisher_ray.errors import FisherRayError, WorkersLostError
from fisher_ray.stages.exchange import Ranks
from fisher_ray.storage import Storage

PROGRESS_S = 1.0
"""Least time between two words on the progress."""


def told_once(ranks: Ranks, run: Callable[[], dict[str, Any] | None]) -> dict[str, Any] | None:
    """Return what ``run`` returns; of an error that all ranks meet, rank 0 alone tells."""
    try:
        return run()
    except WorkersLostError:
        raise
    except FisherRayError:
        if ranks.rank:
            return None
        raise


class Lockstep:
    """One rank's side of it; all ranks make the same calls in the same order.

    Args:
        ranks: of the training.
        device: of the tensors that are exchanged.
    """

    def __init__(self, ranks: Ranks, device: str | torch.device) -> None:
        """See the class."""
        self._ranks, self._device = ranks, device
        self._failure: Exception | None = None

    def gather(
        self,
        make: Callable[[], Tensor | None],
        width: int,
        num_rows: int = 0,
        *,
        place: str,
        dtype: torch.dtype = torch.float32,
    ) -> list[Tensor]:
        """Return what every rank makes, filled up with zeros to ``(num_rows, width)``; or raise what one met.

        Args:
            make: returns this rank's tensor of two dimensions, or None for zeros.
            width: the same on all ranks.
            num_rows: likewise.
            place: where the training is, for the message of an error that is not ours.
            dtype: of what travels.
        """
        sent = torch.zeros(1 + num_rows, max(1, width), dtype=dtype, device=self._device)
        try:
            if self._failure is None and (made := make()) is not None:
                sent[1 : 1 + len(made), : made.shape[1]] = made
        except FisherRayError as error:
            self._failure = error
        except Exception as error:  # noqa: BLE001 - raised below, by all ranks; here it would leave the others waiting
            self._failure = RuntimeError(f"{place}: {type(error).__name__}: {error}")
        sent[0, 0] = float(self._failure is not None)
        received = self._ranks.gather(sent)
        if any(float(part[0, 0]) for part in received):
            self.collect(torch.zeros(0, dtype=torch.float64))
        return [part[1:] for part in received]

    def collect(self, reply: Tensor) -> list[Tensor]:
        """Bring a float64 tensor of each rank to rank 0, or raise what one of them met."""
        found = self._ranks.collect(reply if self._failure is None else self._failure)
        if isinstance(found, Exception):
            raise found
        return found

    def attempt(self, act: Callable[[], object]) -> None:
        """Do what one rank does by itself; if that fails, all ranks learn of it when they next exchange something."""
        try:
            act()
        except FisherRayError as error:
            self._failure = error


class Teller:
    """Writes how far a training is, now and then, for whoever shows it: Ray Train's workers cannot call the driver."""

    def __init__(self, storage: Storage, name: str) -> None:
        """Write nothing yet; ``name`` is the file's in the run folder."""
        self._storage, self._name, self._told_s = storage, name, -math.inf

    def tell(self, **told: Any) -> None:
        """Write ``done`` and ``total`` steps, ``loss`` and ``validation`` accuracy, unless that was just done."""
        if time.monotonic() - self._told_s >= PROGRESS_S:
            self._told_s = time.monotonic()
            self._storage.write_bytes(self._name, json.dumps(told).encode())
