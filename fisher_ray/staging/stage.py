"""How a stage is run: once, on the crew, its units and its result kept in the journal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from fisher_ray.config import Config
from fisher_ray.journal import Journal
from fisher_ray.records import Progress, Receipt, Unit
from fisher_ray.runtime import Checkpoints, Claim, Crew, Pool, Session, remove_checkpoints
from fisher_ray.stages import Facts, tasks
from fisher_ray.stages.passes import feature_spec
from fisher_ray.storage import Storage
from fisher_ray.store import StoreSpec, create_store, finished_units, seal

FEATURE_STORES = {"train": "shallow", "test": "test"}
"""The feature stores' names, and the split that each is made of."""


class Staging:
    """One run, and what every stage of it does.

    Args:
        config: of the run, its paths absolute.
        facts: what the first look at the request found.
        journal: says how far the run came.
        session: the connection to Ray.
        crew: the workers.
        claim: on the run folder.
        progress: hears how it goes.
        note: told what a user may want to know.
        folder: in the run folder, that the stages write to; by default the run folder itself.
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
        folder: str | None = None,
    ) -> None:
        """See the class."""
        self._config, self._facts, self._journal = config, facts, journal
        self._session, self._crew, self._progress, self._note = session, crew, progress, note
        self._pool, self._check = Pool(crew, config, note, claim.check), claim.check
        self._folder = folder
        self._place = config.output.rstrip("/") + (f"/{folder}" if folder else "")
        self._storage = Storage(self._place)

    def _sum_rows(self, stage: str, task: Callable[..., Any], units: list[Unit], **options: Any) -> Any:
        """Sum over rows of the shallow split, of which those that fail by themselves may be left out."""
        left, exclude = self._without_excluded("shallow", units), partial(self._journal.exclude, "shallow")
        return self._reduce(stage, task, left, probe=options.pop("probe", task), on_excluded=exclude, **options)

    def _write_units(
        self,
        stage: str,
        split: str,
        place: str,
        spec: StoreSpec,
        units: list[Unit],
        task: Callable[..., Any],
        probe: Callable[..., Any] | None,
    ) -> dict[str, Any]:
        """Have the units of a split written that are not yet in the store at ``place``, and seal it."""
        url = self._url(place)
        self._check()
        create_store(url, spec)
        finished = finished_units(url)
        if finished:
            self._note(f"{stage}: {len(finished)} of {len(units)} units are there already")
        todo = [unit for unit in units if unit.index not in finished]
        heard = {"on_receipt": partial(self._received, stage), "on_excluded": partial(self._journal.exclude, split)}
        self._pool.map(stage, task, todo, probe=probe, **heard)
        self._check()  # another driver may have it by now
        seal(url, len(units))
        return {"num_rows": self._facts.num_rows[split], "num_units": len(units)}

    def _write_features(
        self, stage: str, split: str, units: list[Unit], name: str, results: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Have the Fisher features of a split written to the store ``name``; ``results`` are of the run's stages."""
        config, facts, metric = self._config, self._facts, results["metric"]
        fingerprints = {"model": results["base"]["fingerprint"], "data": facts.fingerprints}
        fingerprints["metric"] = metric["fingerprint"]
        views = config.linear.views if config.linear.num_stacked is None else "stacked"
        attributes = {"split": split, "labels": config.scores.labels, "views": views, "fingerprints": fingerprints}
        spec = feature_spec(config, facts, split, metric["rank"], metric["feature_rms"], attributes)
        place = name if self._folder is None else f"{self._folder}/{name}"
        pair = (partial(task, split=split, name=place) for task in (tasks.write_features, tasks.try_features))
        return self._write_units(stage, split, name, spec, units, *pair)

    def _stage(self, name: str, total: int | None, work: Callable[[], dict[str, Any] | None]) -> None:
        if self._journal.sealed(name):
            self._note(f"{name}: done before")
            return
        self._pool.wait_until_ready()  # so that no stage is charged with Ray's start
        self._progress.stage_started(name, total)
        with self._journal.stage(name) as result:
            result.update(work() or {})
        self._check()
        remove_checkpoints(self._storage)
        self._progress.stage_done(name, self._journal.seconds(name))

    def _checkpoints(self, *name: str) -> Checkpoints:
        return Checkpoints(self._storage, "/".join(name), self._config.runtime.checkpoint_units)

    def _reduce(
        self, stage: str, task: Callable[..., Any], units: list[Unit], part: str = "all", **options: Any
    ) -> Any:
        heard, kept = partial(self._received, stage), self._checkpoints(stage, part)
        return self._pool.reduce(stage, task, units, heard, checkpoints=kept, **options)

    def _solo(self, stage: str, task: Callable[..., Any], *inputs: Any, **options: Any) -> dict[str, Any]:
        threads = self._journal.decide("threads", self._pool.num_cpus())

        def on_item(item: dict[str, Any]) -> None:
            self._progress.advanced(stage, item["done"], item["total"], item["text"])

        return dict(self._pool.solo(task, *inputs, threads=threads, on_item=on_item, **options) or {})

    def _without_excluded(self, split: str, units: list[Unit]) -> list[Unit]:
        """Return units without the rows that are known to kill or fail whoever works on them."""
        rows = sorted(self._journal.excluded(split).items())
        inside = [tuple(item for item in rows if unit.start <= item[0] < unit.stop) for unit in units]
        return [replace(unit, excluded=excluded) for unit, excluded in zip(units, inside, strict=True)]

    def _received(self, stage: str, receipt: Receipt) -> None:
        self._progress.unit_done(stage, receipt)
        unit, seconds = receipt.unit, {name: round(value, 4) for name, value in receipt.seconds.items()}
        self._journal.event(
            "unit done",
            stage=stage,
            unit=unit.index,
            rows=[unit.start, unit.stop],
            attempt=receipt.attempt,
            seconds=seconds,
            num_bytes=receipt.num_bytes,
            worker=receipt.worker,
            num_skipped=len(receipt.skipped),
            num_halvings=receipt.num_halvings,
        )

    def _fingerprints(self) -> dict[str, Any]:
        return {"model": self._journal.result("base")["fingerprint"], "data": self._facts.fingerprints}

    def _feature_stages(self) -> list[str]:
        return [f"features/{name}" for name in FEATURE_STORES]

    def _url(self, name: str) -> str:
        return f"{self._place}/{name}"
