"""The state of a GradNet in training, kept in the run folder."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fisher_ray.stages.checkpoint import Tensors, load_state, save_state
from fisher_ray.storage import Storage

FILE = "gradnet/checkpoint.safetensors"
PROGRESS_FILE = "gradnet/progress.json"
"""How far the training is, for whoever shows it."""


@dataclass(frozen=True)
class Course:
    """How the training went so far.

    Attributes:
        step: steps done.
        best_step: after which the weights were best on the validation rows; 0 before the first look at them.
        best: their accuracy there; None without validation rows.
        path: of every look at the validation rows ``step``, mean ``loss`` since the one before, and ``accuracy``.
        losses: sum of the steps' losses since the last look.
    """

    step: int = 0
    best_step: int = 0
    best: float | None = None
    path: tuple[dict[str, Any], ...] = ()
    losses: float = 0.0

    def stepped(self, loss: float) -> Course:
        """Return the course after another step."""
        return replace(self, step=self.step + 1, losses=self.losses + loss)

    def looked(self, accuracy: float | None) -> Course:
        """Return the course after a look at the validation rows."""
        steps = self.step - (self.path[-1]["step"] if self.path else 0)
        found = {"step": self.step, "loss": self.losses / max(1, steps), "accuracy": accuracy}
        after = replace(self, path=(*self.path, found), losses=0.0)
        better = accuracy is None or self.best is None or accuracy >= self.best
        return replace(after, best_step=self.step, best=accuracy) if better else after


@dataclass(frozen=True)
class Checkpoint:
    """All that the next step depends on, of all ranks.

    Attributes:
        course: how the training went.
        state: parameters by name, cut into pieces.
        momentum: likewise, of those that have some.
        best: the parameters that did best on the validation rows; empty before the first look at them.
    """

    course: Course
    state: Tensors
    momentum: Tensors = field(default_factory=dict)
    best: Tensors = field(default_factory=dict)


def save_checkpoint(storage: Storage, checkpoint: Checkpoint, fingerprint: str) -> None:
    """Write a checkpoint; ``fingerprint`` is of all that it depends on."""
    parts = {"state": checkpoint.state, "momentum": checkpoint.momentum, "best": checkpoint.best}
    save_state(storage, FILE, parts, asdict(checkpoint.course), fingerprint)


def load_checkpoint(storage: Storage, fingerprint: str) -> Checkpoint | None:
    """Return the checkpoint that is there; None if there is none, or one of another training.

    Raises:
        StoreError: if it is damaged.
    """
    found = load_state(storage, FILE, fingerprint, lambda kept: Course(**{**kept, "path": tuple(kept["path"])}))
    if found is None:
        return None
    course, parts = found
    return Checkpoint(course, *(parts.get(part, {}) for part in ("state", "momentum", "best")))


def remove_checkpoint(storage: Storage) -> None:
    """Remove what :func:`save_checkpoint` wrote, and what told of the progress."""
    for name in (FILE, PROGRESS_FILE):
        storage.remove(name)
