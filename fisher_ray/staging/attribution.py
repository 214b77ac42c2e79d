"""The stages of scoring training samples for queries, and of auditing labels, on a run that is finished."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import numpy as np

from fisher_ray.config import AuditConfig, Config, ScoreConfig
from fisher_ray.errors import DataError, StoreError
from fisher_ray.journal import Journal
from fisher_ray.records import Progress, Unit
from fisher_ray.runtime import Claim, Crew, Session
from fisher_ray.stages import Facts, planning
from fisher_ray.stages.attribution import audit, index, listing, ridge, search
from fisher_ray.staging.gram import CHOSEN, GramStages
from fisher_ray.store import FeatureStore, create_store, open_features, seal

NUM_SUSPECTS = 24
"""Suspected labels on the page."""


class AttributionStages(GramStages):
    """Scores or audit of one run.

    Args:
        config: of the run; where queries come from elsewhere, with these in place of the test split.
        facts: of the same.
        journal: of the scores, in their own folder.
        session: the connection to Ray.
        crew: the workers.
        claim: on the folder.
        progress: hears how it goes.
        note: told what a user may want to know.
        folder: of the scores, in the run folder.
        stages: results of the run's stages, by name.
    """

    def __init__(
        self,
        config: Config,
        facts: Facts,
        journal: Journal,
        session: Session,
        crew: Crew,
        claim: Claim,
        progress: Progress,
        note: Callable[[str], None],
        folder: str,
        stages: dict[str, dict[str, Any]],
    ) -> None:
        """See the class."""
        super().__init__(config, facts, journal, session, crew, claim, progress, note, folder)
        self._folder: str = folder
        self._stages = stages

    def score(self, request: ScoreConfig, blocks: list[range]) -> dict[str, Any]:
        """Score every training row for every query.

        Args:
            request: what is asked.
            blocks: of the queries' rows.

        Returns:
            ``num_queries``, ``num_rows``, ``shown`` and ``pairs`` (as of
            :func:`fisher_ray.stages.attribution.listing.list_best`), ``drawn``, ``seconds`` by stage.
        """
        if request.store is None:
            units = planning.split_units(self._config, self._facts, "test")
            given = ("queries", "test", units, search.QUERIES, self._stages)
            self._stage("queries", len(units), partial(self._write_features, *given))
        if request.by == "ridge":
            self._stage("ridge", self._num_linear_units(), self._fit_ridge)
        blocks = self._with_rows(request, blocks)
        units = self._train_units()
        if request.by == "class_gap":
            self._stage("class_gap", len(units), partial(self._fit_class_gap, units))
        for block in blocks:
            self._stage(f"search/{block.start}", len(units), partial(self._search, request, units, block))
        found = [self._journal.result(f"search/{block.start}") for block in blocks]
        self._require([f"{kind}/{listing.block_name(b.start)}" for b in blocks for kind in ("top", "queries")])
        split = "shallow" if request.queries == "shallow" else "test"
        self._stage("pictures", None, partial(self._draw, _pictures(split, found[0]["shown"])))
        self._storage.remove(ridge.RIDGE)
        return {
            "num_queries": sum(item["num_queries"] for item in found),
            "num_rows": self._train_store.num_rows - len(self._train_store.skipped),
            "shown": found[0]["shown"],
            "split": split,
            "pairs": _added([item["pairs"] for item in found]),
            "drawn": self._journal.result("pictures")["drawn"],
            "seconds": {name: item["seconds"] for name, item in self._journal.results().items()},
        }

    def audit(self, request: AuditConfig) -> dict[str, Any]:
        """Judge every training row's label.

        Returns:
            ``num_rows``, ``num_against`` and ``shown`` (as of
            :func:`fisher_ray.stages.attribution.audit.list_suspects`), ``drawn``, ``seconds`` by stage.
        """
        units, folder = self._train_units(), self._folder
        self._stage("ridge", self._num_linear_units(), self._fit_ridge)
        self._stage("rows", len(units), partial(self._audit_rows, units))
        listed = {"folder": folder, "top": request.top, "num_shown": NUM_SUSPECTS}
        self._stage("suspects", None, lambda: self._solo("suspects", audit.list_suspects, **listed))
        found = self._journal.result("suspects")
        self._require([audit.SUSPECTS])
        self._stage("pictures", None, partial(self._draw, [["shallow", line["index"]] for line in found["shown"]]))
        self._storage.remove(ridge.RIDGE)
        seconds = {name: item["seconds"] for name, item in self._journal.results().items()}
        return {**found, "drawn": self._journal.result("pictures")["drawn"], "seconds": seconds}

    def index(self, request: ScoreConfig) -> dict[str, Any]:
        """Make the index of a request, which this job's folder is of."""
        units, given = self._train_units(), {"by": request.by, "folder": self._folder}
        train = partial(self._solo, "train", index.train_index, factory=request.index, **given)
        self._stage("train", None, train)
        self._stage("fill", len(units), partial(self._fill_index, units, given))
        return self._journal.result("train")

    def _fill_index(self, units: list[Unit], given: dict[str, Any]) -> dict[str, Any]:
        there = {*self._storage.list()}
        todo = [unit for unit in units if index.part_name(unit.index) not in there]
        self._pool.map("fill", index.fill_index, todo, partial(self._received, "fill"), **given)
        return {"num_units": len(units)}

    @cached_property
    def _train_store(self) -> FeatureStore:
        return open_features(f"{self._config.output.rstrip('/')}/features/train.zarr")

    def _train_units(self) -> list[Unit]:
        return planning.split_units(self._config, self._facts, "shallow")

    @property
    def _rank(self) -> int:
        return int(self._stages["metric"]["rank"])

    def _fit_ridge(self) -> dict[str, Any]:
        linear = self._stages["linear"]
        chosen = {name: linear[name] for name in CHOSEN} if self._config.linear.model == "ridge" else None
        return self._fit_ridge_by("ridge", ridge.save_ridge, chosen, folder=self._folder)

    def _fit_class_gap(self, units: list[Unit]) -> dict[str, Any]:
        sums = self._reduce("class_gap", search.sum_class_gaps, units)
        return self._solo("class_gap", search.save_class_gap, sums, folder=self._folder)

    def _query_store(self, request: ScoreConfig) -> FeatureStore:
        output = self._config.output.rstrip("/")
        return open_features(f"{output}/{request.store}" if request.store else self._url(search.QUERIES))

    def _with_rows(self, request: ScoreConfig, blocks: list[range]) -> list[range]:
        """Return the blocks of queries that are not all skipped."""
        store = self._query_store(request)
        left = [block for block in blocks if not store.skipped.keys() >= {*block}]
        if not left:
            row, reason = next((row, text) for row, text in store.skipped.items() if row in blocks[0])
            what = f"all the queries [{blocks[0].start}, {blocks[-1].stop}) were skipped in {store.url}"
            raise DataError(f"{what}; row {row}: {reason}. Ask for others.", row=row)
        return left

    def _require(self, names: list[str]) -> None:
        """Refuse an answer of which something was removed."""
        there = {*self._storage.list()}
        if missing := [name for name in names if name not in there]:
            raise StoreError(f"{self._url(missing[0])} was there once, and is missing. Ask again with --fresh.")

    def _search(self, request: ScoreConfig, units: list[Unit], block: range) -> dict[str, Any]:
        given: dict[str, Any] = {"request": request.model_dump(mode="json"), "folder": self._folder}
        given |= {"start": block.start, "stop": block.stop}
        if request.full:
            self._create_scores(request, self._query_store(request), block)
        stage = f"search/{block.start}"
        task: Callable[..., Any] = search.search_rows
        more = {}
        if request.index is not None:
            task, more = index.search_index, {"index": index_folder(request)}
        found = self._reduce(stage, task, units, merge=search.merge_found, **given, **more)
        listed = self._solo(stage, listing.list_best, found, **given)
        if request.full:
            seal(self._url(search.SCORES), len(units))
        return listed

    def _create_scores(self, request: ScoreConfig, store: FeatureStore, block: range) -> None:
        gone = sum(row in block for row in store.skipped)
        attributes = {"by": request.by, "queries": [block.start, block.stop]}
        rows = self._config.runtime.unit_rows
        create_store(
            self._url(search.SCORES), search.score_spec(self._train_store, len(block) - gone, rows, attributes)
        )

    def _draw(self, shown: list[list[Any]]) -> dict[str, Any]:
        return self._solo("pictures", listing.draw_shown, shown=shown, folder=self._folder)

    def _audit_rows(self, units: list[Unit]) -> dict[str, Any]:
        spec = audit.audit_spec(self._train_store, self._config, self._facts.num_classes)
        temperature = self._journal.result("ridge")["temperature"]
        task = partial(audit.audit_rows, folder=self._folder, temperature=temperature)
        return self._write_units("rows", "shallow", audit.ROWS, spec, units, task, None)


def index_folder(request: ScoreConfig) -> str:
    """Return where in the run folder the index of a request is."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", str(request.index)).strip("-")
    return f"indexes/{request.by}-{name}-{hashlib.sha256(str(request.index).encode()).hexdigest()[:8]}"


def _pictures(split: str, shown: list[dict[str, Any]]) -> list[list[Any]]:
    """Return split and row of every picture that is shown, each once."""
    rows = [(split, item["row"]) for item in shown]
    rows += [("shallow", near["row"]) for item in shown for end in ("highest", "lowest") for near in item[end]]
    return [[*item] for item in dict.fromkeys(rows)]


def _added(pairs: list[list[list[int]] | None]) -> list[list[int]] | None:
    """Add counts ``(2, bins)``, of which there are all or none."""
    counted = [item for item in pairs if item is not None]
    return np.sum(counted, axis=0).tolist() if counted else None
