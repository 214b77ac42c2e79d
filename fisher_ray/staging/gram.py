"""The sums that a ridge regression on a run's features is fitted to, and the choice of its penalty."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from typing import Any

from fisher_ray.records import Unit
from fisher_ray.runtime import num_slices
from fisher_ray.stages import planning, shallow, tasks
from fisher_ray.staging.stage import Staging

PARTS = ("fit", "validation")
"""Of the shallow split: the linear model is fitted to the one while the other chooses."""
CHOSEN = ("penalty", "rank", "damping", "temperature")
"""What is chosen on the validation rows."""


class GramStages(Staging):
    """Sums over the feature store, and what is fitted to them."""

    @property
    def _rank(self) -> int:
        """``R`` of the run's metric."""
        raise NotImplementedError

    @property
    def _columns(self) -> int:
        return planning.num_columns(self._config, self._facts, self._rank)

    def _linear_units(self, part: str) -> list[Unit]:
        return planning.linear_units(self._config, self._facts, self._columns, part)

    def _num_linear_units(self) -> int:
        return sum(len(self._linear_units(part)) for part in PARTS)

    def _sum_gram(self, stage: str, part: str) -> Any:
        slices, kept = num_slices(planning.gram_bytes(self._columns)), self._kept_part("gram", part)
        task = partial(tasks.sum_gram, part=part)
        return self._reduce(stage, task, self._linear_units(part), kept, num_slices=slices)

    def _fit_ridge_by(
        self, stage: str, task: Callable[..., Any], chosen: dict[str, Any] | None = None, **options: Any
    ) -> dict[str, Any]:
        """Choose on the validation rows, unless that was done before, then run ``task`` on the sums of both parts.

        Returns:
            What was chosen, and what the task returns.
        """
        fit = self._sum_gram(stage, "fit")
        chosen = self._solo(stage, shallow.choose_penalty, fit) if chosen is None else chosen
        validation = self._sum_gram(stage, "validation")
        kept = {name: chosen[name] for name in CHOSEN}
        return {**chosen, **self._solo(stage, task, fit, validation, **kept, **options)}

    def _kept_part(self, sums: str, part: str) -> str:
        """Name a part's sums by the settings, which may change before a resume."""
        settings = json.dumps(self._config.linear.model_dump(mode="json"), sort_keys=True)
        return f"{part}-{hashlib.sha256(f'{sums} {settings}'.encode()).hexdigest()[:16]}"
