"""The sums that a ridge regression on a run's features is fitted to, and the choice of its penalty."""

from __future__ import annotations

import hashlib
import json
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
    """Sums over the feature store."""

    def _linear_units(self, rank: int) -> dict[str, list[Unit]]:
        columns = planning.num_columns(self._config, self._facts, rank)
        return {part: planning.linear_units(self._config, self._facts, columns, part) for part in PARTS}

    def _sum_gram(self, stage: str, units: list[Unit], part: str, rank: int) -> Any:
        slices = num_slices(planning.gram_bytes(planning.num_columns(self._config, self._facts, rank)))
        kept = self._kept_part("gram", part)
        return self._reduce(stage, partial(tasks.sum_gram, part=part), units, kept, num_slices=slices)

    def _choose_penalty(self, stage: str, fit: Any) -> dict[str, Any]:
        return self._solo(stage, shallow.choose_penalty, fit)

    def _kept_part(self, sums: str, part: str) -> str:
        """Name a part's sums by the settings, which may change before a resume."""
        settings = json.dumps(self._config.linear.model_dump(mode="json"), sort_keys=True)
        return f"{part}-{hashlib.sha256(f'{sums} {settings}'.encode()).hexdigest()[:16]}"
