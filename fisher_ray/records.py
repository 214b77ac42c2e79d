"""Plain records that travel between rooms and processes. Axes: see the names in each docstring."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Unit:
    """Consecutive rows of one split that one worker computes in one go.

    Attributes:
        index: position in the plan, from 0.
        start: first row of the split (inclusive).
        stop: last row (exclusive).
        excluded: rows to leave out, with reasons: known to kill or fail whoever works on them.
    """

    index: int
    start: int
    stop: int
    excluded: tuple[tuple[int, str], ...] = ()

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.stop - self.start


@dataclass(frozen=True)
class Batch:
    """Decoded samples.

    Attributes:
        inputs: float32, or int64 of tokens, shape ``(B, *input_shape)``.
        labels: int64, shape ``(B,)``.
        index: int64, shape ``(B,)``: row in the split.
    """

    inputs: Tensor
    labels: Tensor
    index: Tensor


@dataclass(frozen=True)
class LayerBasis:
    """Two bases for one layer's gradient, and which products of their columns are kept.

    Attributes:
        name: the module's name in the network.
        inputs: ``(A, I)``, columns for the layer's input factors (a trailing 1 for the bias included).
        outputs: ``(O, J)``, columns for the backpropagated factors.
        pairs: int64 ``(K, 2)``: kept coordinates as (output column, input column).
    """

    name: str
    inputs: Tensor
    outputs: Tensor
    pairs: Tensor

    @property
    def dim(self) -> int:
        """``K``."""
        return len(self.pairs)

    @property
    def shape(self) -> tuple[int, int]:
        """``(O, A)``."""
        return len(self.outputs), len(self.inputs)


@dataclass(frozen=True)
class LayerSketch:
    """How the entries of one layer's gradient are added, with signs, to fewer numbers.

    Attributes:
        name: the module's name in the network.
        shape: ``(O, A)``.
        dim: ``K``.
        seed: of signs and places; None keeps every entry in its place, and ``K`` is ``O · A``.
        share: of a gradient's entries those of largest magnitude that are taken, the others being zero; 1 takes all.
    """

    name: str
    shape: tuple[int, int]
    dim: int
    seed: int | None
    share: float = 1.0


Compression = LayerBasis | LayerSketch
"""What makes compressed coordinates of one layer's gradient."""


@dataclass(frozen=True)
class Receipt:
    """What a finished unit tells the driver: never arrays.

    Attributes:
        unit: the unit.
        attempt: from 1.
        seconds: wall time, by part (read, compute, write).
        num_bytes: bytes written.
        worker: host, process and device, as the worker puts them in.
        skipped: rows left out under ``data.on_error: skip``, with reasons.
        num_halvings: how often a micro-batch was cut in two for want of memory.
    """

    unit: Unit
    attempt: int = 1
    seconds: dict[str, float] = field(default_factory=dict)
    num_bytes: int = 0
    worker: str = ""
    skipped: dict[int, str] = field(default_factory=dict)
    num_halvings: int = 0


class Progress(Protocol):
    """Hears how a run goes on; the command line draws it."""

    def stage_started(self, name: str, total: int | None) -> None:
        """A stage starts, with so many units if it has any."""

    def unit_done(self, stage: str, receipt: Receipt) -> None:
        """A unit of ``stage`` is finished."""

    def advanced(self, stage: str, done: int, total: int, text: str) -> None:
        """A stage without units is so far; ``text`` says a little more."""

    def note(self, text: str) -> None:
        """Something worth a line happened: a retry, a lost worker, a resumed stage."""

    def stage_done(self, name: str, seconds: float) -> None:
        """A stage ended after ``seconds`` of wall time."""


class SilentProgress:
    """Hears everything, says nothing."""

    def stage_started(self, name: str, total: int | None) -> None:
        """Ignore it."""

    def unit_done(self, stage: str, receipt: Receipt) -> None:
        """Ignore it."""

    def advanced(self, stage: str, done: int, total: int, text: str) -> None:
        """Ignore it."""

    def note(self, text: str) -> None:
        """Ignore it."""

    def stage_done(self, name: str, seconds: float) -> None:
        """Ignore it."""
