"""What the ranks of one distributed fit tell each other."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Ranks(Protocol):
    """The ranks of one fit, as one of them sees them. All ranks make the same calls in the same order."""

    @property
    def rank(self) -> int:
        """This rank; 0 leads."""

    @property
    def size(self) -> int:
        """How many ranks there are."""

    def gather(self, value: Tensor) -> list[Tensor]:
        """Return on every rank all ranks' tensors, by rank; they have one shape and dtype."""

    def collect(self, reply: Tensor | Exception) -> list[Tensor] | Exception:
        """Bring float64 tensors of any shapes to rank 0.

        Returns:
            On rank 0 every rank's tensor, by rank, elsewhere nothing; or, on all ranks alike, the exception of the
            first rank that gave one.
        """


class Alone:
    """The exchange of a fit in one process."""

    rank, size = 0, 1

    def gather(self, value: Tensor) -> list[Tensor]:
        """Return ``value``."""
        return [value]

    def collect(self, reply: Tensor | Exception) -> list[Tensor] | Exception:
        """Return ``reply``."""
        return reply if isinstance(reply, Exception) else [reply]
