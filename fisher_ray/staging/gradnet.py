"""The stages of GradNet, in order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from typing import Any

from fisher_ray.config import TRAINING_KEYS
from fisher_ray.data import choose_units
from fisher_ray.records import Unit
from fisher_ray.stages import planning
from fisher_ray.stages.gradnet import checkpoint, entries, network, units
from fisher_ray.staging.stage import Staging


class GradNetStages(Staging):
    """GradNet from a run's base network on: ranges, entries, training, validation and test."""

    GRADNET_STAGES = ("gradnet/ranges", "gradnet/entries", "gradnet", "gradnet/validation", "gradnet/test")
    """Their names; the fourth is left out without validation rows."""

    def run_gradnet(self) -> None:
        """Run them all."""
        rows = planning.split_units(self._config, self._facts, "shallow")
        ranged = choose_units(rows, self._config.gradnet_section.range_fraction)
        self._stage("gradnet/ranges", len(ranged), partial(self._take_ranges, ranged))
        left = self._without_excluded("shallow", rows)
        self._stage("gradnet/entries", len(left), partial(self._write_entries, left))
        self._stage("gradnet", self._config.gradnet_section.steps, self._train_gradnet)
        checkpoint.remove_checkpoint(self._storage)
        if self._config.gradnet_section.validation:
            self._stage("gradnet/validation", len(rows), partial(self._validate_gradnet, rows))
        tested = self._without_excluded("test", planning.split_units(self._config, self._facts, "test"))
        self._stage("gradnet/test", len(tested), partial(self._predict, tested))

    def _take_ranges(self, ranged: list[Unit]) -> dict[str, Any]:
        section = self._config.gradnet_section.model_dump(mode="json", exclude=set(TRAINING_KEYS))
        settings = json.dumps(section, sort_keys=True).encode()
        kept = hashlib.sha256(settings).hexdigest()[:16]  # they may change before a resume
        ranges = self._sum_rows("gradnet/ranges", units.sum_ranges, ranged, merge=units.merge_ranges, part=kept)
        return self._solo("gradnet/ranges", units.save_ranges, ranges)

    def _write_entries(self, todo: list[Unit]) -> dict[str, Any]:
        section = self._config.gradnet_section.model_dump(mode="json", exclude=set(TRAINING_KEYS))
        attributes = {"split": "shallow", "views": self._config.linear.views, "gradnet": section}
        attributes["fingerprints"] = {**self._fingerprints(), **self._journal.result("gradnet/ranges")}
        num_kept = network.num_kept(self._config, self._facts)
        largest = self._journal.result("gradnet/ranges")["largest"]
        spec = entries.entry_spec(self._config, self._facts.num_rows["shallow"], num_kept, largest, attributes)
        pair = (units.write_entries, units.try_entries)
        written = self._write_units("gradnet/entries", "shallow", units.ENTRIES, spec, todo, *pair)
        return {**written, "num_kept": num_kept}

    def _train_gradnet(self) -> dict[str, Any]:
        from fisher_ray.runtime import train  # Ray Train takes seconds to import

        workers, gpus = min(self._crew.target, network.num_pieces(self._config, self._facts)), self._crew.gpus
        self._crew.close()  # their places are Ray Train's meanwhile
        advanced: Callable[[int, int, str], None] = partial(self._progress.advanced, "gradnet")
        given = (self._session, self._config, self._facts, workers, gpus, self._note)
        fitted = train.fit_told(*given, advanced, train.GRADNET)
        self._check()
        return fitted

    def _validate_gradnet(self, held: list[Unit]) -> dict[str, Any]:
        counts = self._sum_rows("gradnet/validation", units.count_held_out, held)
        return self._solo("gradnet/validation", units.share_held_out, counts)

    def _predict(self, todo: list[Unit]) -> dict[str, Any]:
        attributes = {"split": "test", "views": self._config.linear.views, "fingerprints": self._fingerprints()}
        num_rows, num_classes = self._facts.num_rows["test"], self._facts.num_classes
        spec = entries.prediction_spec(self._config, num_rows, num_classes, attributes)
        pair = (units.predict, units.try_predictions)
        self._write_units("gradnet/test", "test", units.PREDICTIONS, spec, todo, *pair)
        return self._solo("gradnet/test", units.count_test)
