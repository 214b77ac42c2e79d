"""The stages in order. A stage reads only what an earlier one sealed; a run that is taken up skips what is sealed."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import Any, Literal

import yaml

from fisher_ray import report
from fisher_ray.classifier import FisherClassifier
from fisher_ray.config import Config, LinearConfig
from fisher_ray.errors import ConfigError, ModelError
from fisher_ray.journal import Journal, refuse_foreign
from fisher_ray.progress import new_console, show_progress
from fisher_ray.records import Progress, Receipt, Unit
from fisher_ray.runtime import Checkpoints, Claim, Crew, Pool, Session, num_slices, remove_checkpoints
from fisher_ray.stages import Facts, compression, inspect_request, planning, shallow, tasks, training
from fisher_ray.stages.passes import feature_spec
from fisher_ray.stages.workbench import BASE_FILE
from fisher_ray.storage import Storage
from fisher_ray.store import create_store, finished_units, open_features, seal

Until = Literal["base", "metric", "features", "linear", "report"]
FEATURE_STORES = {"train": "shallow", "test": "test"}
"""The feature stores' names, and the split that each is made of."""
PARTS = ("fit", "validation")
"""Of the shallow split: the linear model is fitted to the one while the other chooses."""
LATE = {
    **{f"linear.{key}": ("linear",) for key in LinearConfig.model_fields if key != "views"},
    "trained_on": ("trained_on", "report"),
}
"""Keys that may change between two starts of a run until these stages are sealed: nothing earlier reads them."""


def run(
    config: Config,
    address: str | None = None,
    *,
    fresh: bool = False,
    until: Until | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run every stage that is not sealed yet, on Ray.

    Args:
        config: the run.
        address: of a Ray cluster; by default ``RAY_ADDRESS``, else Ray is started inside this process.
        fresh: start anew in the same folder instead of resuming.
        until: the last stage to run; None for all.
        progress: hears how it goes; by default it is drawn in the terminal or notebook, or as lines on stderr.

    Returns:
        The content of ``report/results.json``, or with ``until`` an earlier stage what is known of each stage so far.

    Raises:
        RequestError: if the configuration, the model or the address is wrong, before any work.
        DataError: if a row or a store is wrong.
        StoppedError: if the run ended early; run again to resume.
    """
    if progress is None:
        with show_progress(new_console()) as shown:
            return run(config, address, fresh=fresh, until=until, progress=shown)
    config = config.located()
    _refuse_leak(config, until)
    session, storage = Session(address), Storage(config.output)
    facts = inspect_request(config)
    refuse_foreign(storage)
    with Claim(config.output, progress.note) as claim:
        journal = Journal.open(storage, _journal_facts(config, facts), fresh=fresh, late=LATE, check=claim.check)
        sizes = {name: journal.decide(name, getattr(facts, name)) for name in ("micro_batch", "micro_batch_gpu")}
        facts = replace(facts, **sizes)

        def note(text: str) -> None:
            progress.note(text)
            journal.event("note", text=text)

        with closing(session), closing(Crew(session, config, facts, note, journal.decide)) as crew:
            return _Run(config, facts, journal, session, crew, claim, progress, note).run(until or "report")


def plan(config: Config) -> dict[str, Any]:
    """Return what :func:`run` would do, in plain values; nothing is written and Ray is not started.

    Raises:
        RequestError: as :func:`run`.
        DataError: if a label or a split's first sample is wrong.
    """
    config = config.located()
    Storage(config.output)  # refuses what run would refuse
    return planning.describe_run(config, inspect_request(config))


def _refuse_leak(config: Config, until: Until | None) -> None:
    if config.scores.labels == "true" and until in (None, "linear", "report"):
        raise ConfigError(
            "scores.labels true: the features of a test row would be made with its label, so a linear model's test "
            "accuracy would mean nothing. Set scores.labels: all, or stop at write-features."
        )


def _journal_facts(config: Config, facts: Facts) -> dict[str, Any]:
    return {
        "identity": config.identity(),
        "fingerprints": facts.fingerprints,
        "config": config.model_dump(mode="json"),
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    packages = ("fisher_ray", "torch", "ray", "zarr", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


class _Run:
    """One run's stages."""

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
    ) -> None:
        self._config, self._facts, self._journal = config, facts, journal
        self._session, self._crew, self._progress, self._note = session, crew, progress, note
        self._pool, self._check = Pool(crew, config, note, claim.check), claim.check
        self._storage = Storage(config.output)

    def run(self, until: Until) -> dict[str, Any]:
        """Run up to ``until``."""
        for name in ("base", "metric", "features", "linear", "report"):
            getattr(self, name)()
            if name == until:
                break
        return self._results if until == "report" else self._journal.results()

    def base(self) -> None:
        """Train the base network, or take the checkpoint."""
        self._stage("base", None, lambda: self._solo("base", training.train_base))
        found = hashlib.sha256(self._storage.read_bytes(BASE_FILE)) if self._storage.exists(BASE_FILE) else None
        if found is None or found.hexdigest() != self._journal.result("base")["fingerprint"]:
            raise ModelError(
                f"{self._url(BASE_FILE)} is not, or no more, the network that this run was begun with. Put it back, or "
                "start anew with --fresh."
            )

    def metric(self) -> None:
        """Choose the compression, then decompose the Fisher matrix in its coordinates."""
        units = planning.metric_units(self._config, self._facts)
        plans = compression.plan(self._config.compression, self._config.metric, self._facts.block_shapes)

        slices = num_slices(planning.moment_bytes(self._config, self._facts))

        def choose_basis() -> dict[str, Any]:
            if not plans.with_moments:
                return self._solo("basis", tasks.choose_basis)
            sums = self._sum_rows("basis", tasks.sum_kronecker, units, num_slices=slices)
            return self._solo("basis", tasks.choose_basis, sums)

        def fit_metric() -> dict[str, Any]:
            sums = self._sum_rows("metric", tasks.sum_fisher, units, merge=tasks.merge_fisher)
            return self._solo("metric", tasks.fit_metric, sums, fingerprints=self._fingerprints())

        self._stage("basis", len(units) if plans.with_moments else None, choose_basis)
        self._stage("metric", len(units), fit_metric)

    def _sum_rows(self, stage: str, task: Callable[..., Any], units: list[Unit], **options: Any) -> Any:
        """Sum over rows of the shallow split, of which those that fail by themselves may be left out."""
        left, exclude = self._without_excluded("shallow", units), partial(self._journal.exclude, "shallow")
        return self._reduce(stage, task, left, probe=task, on_excluded=exclude, **options)

    def features(self) -> None:
        """Write the features of the shallow split and of the test split."""
        for name, split in FEATURE_STORES.items():
            units = self._without_excluded(split, planning.split_units(self._config, self._facts, split))
            self._stage(f"features/{name}", len(units), partial(self._write_features, name, split, units))

    def _write_features(self, name: str, split: str, units: list[Unit]) -> dict[str, Any]:
        url, metric = self._url(f"features/{name}.zarr"), self._journal.result("metric")
        fingerprints = {**self._fingerprints(), "metric": metric["fingerprint"]}
        attributes = {"split": split, "labels": self._config.scores.labels, "views": self._config.linear.views}
        self._check()
        create_store(
            url,
            feature_spec(
                self._config,
                self._facts,
                split,
                metric["rank"],
                metric["feature_rms"],
                {**attributes, "fingerprints": fingerprints},
            ),
        )
        finished, stage = finished_units(url), f"features/{name}"
        if finished:
            self._note(f"{stage}: {len(finished)} of {len(units)} units are there already")
        todo = [unit for unit in units if unit.index not in finished]
        heard = {"on_receipt": partial(self._received, stage), "on_excluded": partial(self._journal.exclude, split)}
        self._pool.map(stage, tasks.write_features, todo, probe=tasks.try_features, split=split, name=name, **heard)
        self._check()  # another driver may have it by now
        seal(url, len(units))
        return {"num_rows": self._facts.num_rows[split], "num_units": len(units)}

    def linear(self) -> None:
        """Fit the linear model on the features, and the linear probe on the last hidden layer."""
        columns = planning.num_columns(self._config, self._facts, self._journal.result("metric")["rank"])
        units = {part: planning.linear_units(self._config, self._facts, columns, part) for part in PARTS}
        fit = self._fit_logistic if self._config.linear.model == "logistic" else self._fit_ridge
        self._stage("linear", sum(map(len, units.values())), partial(fit, units))
        if self._facts.hidden is not None:
            self._stage("linear_probe", None, lambda: self._solo("linear_probe", shallow.fit_probe))

    def _fit_ridge(self, units: dict[str, list[Unit]]) -> dict[str, Any]:
        fit = self._sum_gram(units["fit"], "fit")
        chosen = self._solo("linear", shallow.choose_penalty, fit)
        validation = self._sum_gram(units["validation"], "validation")
        kept = {name: chosen[name] for name in ("penalty", "rank", "damping", "temperature")}
        fitted = self._solo("linear", shallow.fit_ridge, fit, validation, **kept)
        self._export_classifier()
        return {**chosen, **fitted}

    def _fit_logistic(self, units: dict[str, list[Unit]]) -> dict[str, Any]:
        from fisher_ray.runtime.train import fit_logistic  # Ray Train takes seconds to import

        fit = self._sum_gram(units["fit"], "fit")
        validation = self._sum_gram(units["validation"], "validation")
        self._solo("linear", shallow.save_sums, fit, validation)
        workers, gpus = self._crew.target, self._crew.gpus
        self._crew.close()  # their places are Ray Train's meanwhile
        fitted = fit_logistic(self._session, self._config, self._facts, workers, gpus, self._note)
        self._check()
        shallow.remove_sums(self._storage)
        self._export_classifier()
        return fitted

    def _sum_gram(self, units: list[Unit], part: str) -> Any:
        settings = json.dumps(self._config.linear.model_dump(mode="json"), sort_keys=True)
        kept = f"{part}-{hashlib.sha256(settings.encode()).hexdigest()[:16]}"  # these may change before a resume
        columns = planning.num_columns(self._config, self._facts, self._journal.result("metric")["rank"])
        slices = num_slices(planning.gram_bytes(columns))
        return self._reduce("linear", partial(tasks.sum_gram, part=part), units, kept, num_slices=slices)

    def _export_classifier(self) -> None:
        if self._config.scores.labels == "all":
            raw = FisherClassifier.from_run(self._config.output).to_bytes()
            self._check()
            self._storage.write_bytes("linear/classifier.safetensors", raw)

    def report(self) -> None:
        """Compare, and write the report."""
        if self._config.trained_on is not None:
            self._stage("trained_on", None, self._train_on)
        self._stage("report", None, self._write_report)

    def _train_on(self) -> dict[str, Any]:
        asked = self._config.trained_on.seconds if self._config.trained_on is not None else "auto"
        # Not of the test rows: those predictions are no part of training, and the network's are not timed either.
        shallow_s = sum(self._journal.seconds(name) for name in ("basis", "metric", "features/train", "linear"))
        return self._solo("trained_on", training.train_on, seconds=shallow_s if asked == "auto" else asked)

    def _write_report(self) -> dict[str, Any]:
        counts = self._solo("report", shallow.evaluate)
        stages = {**self._journal.results(), "report": {"result": counts}}
        skipped = {
            split: open_features(self._url(f"features/{name}.zarr")).skipped for name, split in FEATURE_STORES.items()
        }
        num_halvings = self._journal.total("unit done", "num_halvings")
        results, details = report.summarise(self._config, stages, _versions(), skipped, num_halvings)
        details["config"] = yaml.safe_dump(self._config.model_dump(mode="json"), sort_keys=False)
        self._check()
        report.write_report(self._storage, results, details)
        return {"results": results}

    @property
    def _results(self) -> dict[str, Any]:
        return dict(self._journal.result("report")["results"])

    # -- what every stage does

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

    def _url(self, name: str) -> str:
        return f"{self._config.output.rstrip('/')}/{name}"
