"""The stages in order. A stage reads only what an earlier one sealed; a run that is taken up skips what is sealed."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any, Literal

import yaml

from fisher_ray import report
from fisher_ray.classifier import FisherClassifier
from fisher_ray.config import TRAINING_KEYS, Config, LinearConfig
from fisher_ray.errors import ConfigError
from fisher_ray.journal import Journal, refuse_foreign
from fisher_ray.progress import new_console, show_progress
from fisher_ray.records import Progress
from fisher_ray.runtime import Claim, Session, num_slices
from fisher_ray.stages import (
    Facts,
    compression,
    estimate,
    examples,
    inspect_request,
    minibatch,
    planning,
    shallow,
    tasks,
    training,
)
from fisher_ray.stages.gradnet.units import ENTRIES, PREDICTIONS
from fisher_ray.stages.workbench import require_network
from fisher_ray.staging import FEATURE_STORES, PARTS, GradNetStages, GramStages, crewed
from fisher_ray.storage import Storage
from fisher_ray.store import open_features

Until = Literal["base", "metric", "features", "linear", "report"]
FISHER_STORES = {split: f"features/{name}.zarr" for name, split in FEATURE_STORES.items()}
VIEW_KEYS = ("views", "view_mode")
"""Keys of the linear model that the features depend on."""
LATE = {
    **{f"linear.{key}": ("linear", "report") for key in LinearConfig.model_fields if key not in VIEW_KEYS},
    "gradnet": ("gradnet/ranges", "report"),
    **{f"gradnet.{key}": ("gradnet", "report") for key in TRAINING_KEYS},
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
    _make_folder(config.tensorboard)
    session, storage = Session(address), Storage(config.output)
    facts = inspect_request(config)
    refuse_foreign(storage)
    with Claim(config.output, progress.note) as claim:
        journal = Journal.open(storage, _journal_facts(config, facts), fresh=fresh, late=LATE, check=claim.check)
        with crewed(session, config, facts, journal, storage, progress) as (facts, crew, note):
            results = _Run(config, facts, journal, session, crew, claim, progress, note).run(until or "report")
            if config.tensorboard is not None and until in (None, "report"):
                from fisher_ray.report.tensorboard import write_tensorboard  # which takes a while to import

                write_tensorboard(config.tensorboard, storage)
    return results


def plan(config: Config) -> dict[str, Any]:
    """Return what :func:`run` would do, in plain values; nothing is written and Ray is not started.

    Raises:
        RequestError: as :func:`run`.
        DataError: if a label or a split's first sample is wrong.
    """
    config = config.located()
    Storage(config.output)  # refuses what run would refuse
    facts = inspect_request(config)
    environment = Session("local").worker_environment()
    return {**planning.describe_run(config, facts), **estimate.estimate_run(config, facts, environment)}


def _refuse_leak(config: Config, until: Until | None) -> None:
    labelled = config.scores.labels == "true" and config.linear.model != "gradnet"
    if labelled and until in (None, "linear", "report"):
        raise ConfigError(
            "scores.labels true: the features of a test row would be made with its label, so a linear model's test "
            "accuracy would mean nothing. Set scores.labels: all, or stop at write-features."
        )


def _make_folder(place: str | None) -> None:
    try:
        if place is not None:
            os.makedirs(place, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"tensorboard: cannot make {place}: {error.strerror}. Give a place that can be.") from error


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


class _Run(GradNetStages, GramStages):
    """One run's stages in order."""

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
        require_network(self._storage, self._journal.result("base")["fingerprint"])

    def metric(self) -> None:
        """Choose the compression, then decompose the Fisher matrix in its coordinates."""
        if self._alone:
            return
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

    def features(self) -> None:
        """Write the features of the shallow split and of the test split."""
        for name, split in {} if self._alone else FEATURE_STORES.items():
            units = self._without_excluded(split, planning.split_units(self._config, self._facts, split))
            results = {stage: self._journal.result(stage) for stage in ("base", "metric")}
            given = (f"features/{name}", split, units, FISHER_STORES[split], results)
            self._stage(f"features/{name}", len(units), partial(self._write_features, *given))

    def linear(self) -> None:
        """Fit the linear model on the features, the linear probe on the last hidden layer, and GradNet."""
        if not self._alone:
            self._fit_linear()
        if self._config.gradnet is not None:
            self.run_gradnet()

    @property
    def _alone(self) -> bool:
        """Whether GradNet is the only shallow model, which takes no metric and no features of it."""
        return self._config.linear.model == "gradnet"

    def _fit_linear(self) -> None:
        fit = self._fit_logistic if self._config.linear.model == "logistic" else self._fit_ridge
        self._stage("linear", self._num_linear_units(), fit)
        minibatch.remove_checkpoint(self._storage)
        if self._facts.hidden is not None:
            self._stage("linear_probe", None, lambda: self._solo("linear_probe", shallow.fit_probe))

    @property
    def _rank(self) -> int:
        return int(self._journal.result("metric")["rank"])

    def _fit_ridge(self) -> dict[str, Any]:
        fitted = self._fit_ridge_by("linear", shallow.fit_ridge)
        self._export_classifier()
        return fitted

    def _fit_logistic(self) -> dict[str, Any]:
        from fisher_ray.runtime import train  # Ray Train takes seconds to import

        streamed = self._config.linear.solver == "minibatch"
        if streamed:
            sums = [self._sum_columns(part) for part in PARTS]
        else:
            sums = [self._sum_gram("linear", part) for part in PARTS]
        self._solo("linear", shallow.save_column_sums if streamed else shallow.save_sums, *sums)
        workers, gpus = self._crew.target, self._crew.gpus
        self._crew.close()  # their places are Ray Train's meanwhile
        given = (self._session, self._config, self._facts, workers, gpus, self._note)
        advanced: Callable[[int, int, str], None] = partial(self._progress.advanced, "linear")
        fitted = train.fit_told(*given, advanced, train.MINIBATCH) if streamed else train.fit_logistic(*given)
        self._check()
        shallow.remove_sums(self._storage)
        self._export_classifier()
        return fitted

    def _sum_columns(self, part: str) -> Any:
        task, kept = partial(tasks.sum_columns, part=part), self._kept_part("columns", part)
        return self._reduce("linear", task, self._linear_units(part), kept)

    def _export_classifier(self) -> None:
        if self._config.scores.labels == "all":
            raw = FisherClassifier.from_run(self._config.output).to_bytes()
            self._check()
            self._storage.write_bytes("linear/classifier.safetensors", raw)

    def report(self) -> None:
        """Compare, and write the report."""
        if self._config.trained_on is not None:
            self._stage("trained_on", None, self._train_on)
            if self._config.trained_on.convergence is not None:
                self._stage("converged", None, lambda: self._solo("converged", training.train_to_convergence))
        self._stage("report", None, self._write_report)

    def _train_on(self) -> dict[str, Any]:
        asked = self._config.trained_on.seconds if self._config.trained_on is not None else "auto"
        # Not of the test rows: those predictions are no part of training, and the network's are not timed either.
        fisher = ("basis", "metric", "features/train", "linear")
        shallow_s = sum(map(self._journal.seconds, self.GRADNET_STAGES if self._alone else fisher))
        return self._solo("trained_on", training.train_on, seconds=shallow_s if asked == "auto" else asked)

    def _evaluate(self) -> dict[str, Any]:
        return {**self._solo("report", shallow.evaluate), **self._solo("report", examples.show_examples)}

    def _pictures(self, shown: list[dict[str, Any]]) -> dict[str, bytes]:
        rows = [("test", item["row"]) for item in shown]
        rows += [("shallow", near["row"]) for item in shown for near in item["nearest"]]
        read = self._storage.read_bytes
        return {f"{split}-{row}": read(examples.picture_name(split, row)) for split, row in dict.fromkeys(rows)}

    def _write_report(self) -> dict[str, Any]:
        counts = self._journal.result("gradnet/test") if self._alone else self._evaluate()
        stages = {**self._journal.results(), "report": {"result": counts}}
        stores = {"shallow": ENTRIES, "test": PREDICTIONS} if self._alone else FISHER_STORES
        skipped = {split: open_features(self._url(name)).skipped for split, name in stores.items()}
        num_halvings = self._journal.total("unit done", "num_halvings")
        units = self._journal.events("unit done")
        told = (num_halvings, self._facts.class_names, units, self._pictures(counts.get("examples", [])))
        results, details = report.summarise(self._config, stages, _versions(), skipped, *told)
        details["config"] = yaml.safe_dump(self._config.model_dump(mode="json"), sort_keys=False)
        self._check()
        report.write_report(self._storage, results, details)
        return {"results": results}

    @property
    def _results(self) -> dict[str, Any]:
        return dict(self._journal.result("report")["results"])
