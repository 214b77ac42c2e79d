"""Questions to a finished run: which training samples is this one like, and which labels look wrong?"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from fisher_ray.config import AuditConfig, Config, ScoreConfig
from fisher_ray.errors import ConfigError, RequestError, ResumeMismatchError
from fisher_ray.journal import Journal, read_run, refuse_foreign
from fisher_ray.progress import new_console, show_progress
from fisher_ray.records import Progress
from fisher_ray.report.attribution import write_audit, write_scores
from fisher_ray.runtime import Claim, Session
from fisher_ray.stages import Facts, inspect_request
from fisher_ray.stages.attribution.audit import ROWS, SUSPECTS
from fisher_ray.stages.attribution.listing import PICTURES
from fisher_ray.stages.attribution.ridge import RIDGE
from fisher_ray.stages.attribution.search import QUERIES, SCORES, query_blocks
from fisher_ray.stages.attribution.vectors import CLASS_GAP, has_label_scores
from fisher_ray.stages.workbench import inspect_queries, require_network
from fisher_ray.staging import crewed
from fisher_ray.staging.attribution import AttributionStages, index_folder
from fisher_ray.storage import Storage
from fisher_ray.store import open_features

AUDIT = "audit"
"""Where in the run folder an audit is."""
OWN: tuple[str, ...] = (QUERIES, CLASS_GAP, RIDGE, SCORES, ROWS, SUSPECTS, PICTURES)
OWN += ("queries", "top", "scores.json", "audit.json", "figures", "report.html", "sums")
"""What scores or an audit write into their folder, besides what a journal does."""


def score(
    run: str,
    queries: str | Mapping[str, Any] = "test",
    *,
    by: str = "kernel",
    rows: tuple[int, int] | None = None,
    top: int = 10,
    target: str = "label",
    full: bool = False,
    index: str | None = None,
    index_parameters: str | None = None,
    name: str | None = None,
    address: str | None = None,
    overrides: Sequence[str] = (),
    fresh: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score every training sample of a finished run for every query, on Ray; what was begun goes on.

    The training features are read once, by all workers. Of each query the training samples with the highest and the
    lowest scores are listed.

    Args:
        run: the run folder.
        queries: ``test``, ``shallow`` (each other training sample), or a source as the configuration has it, such as
            ``{"format": "images", "path": "photos"}``.
        by: ``kernel``: dot products of Fisher features (Jaakkola & Haussler, 1998). ``cosine``: the same of features of
            length one. ``class_gap``: cosines in the coordinates in which samples of one class are more alike than
            those of two (Rácz & Daróczy, 2021). ``influence``: by how much training on the sample raises the log
            probability of the query's class, in nats, to first order, ``sᵀ (F + δ)⁻¹ s' / N`` (Koh & Liang, 2017, with
            the Fisher as Hessian). ``ridge``: by how much the squared error of the linear model at the query would be
            larger without the sample, exactly.
        rows: of the queries, ``[first, last)``.
        top: training samples listed for each query, at either end.
        target: of ``influence`` and ``ridge``: on the query's ``label``, or on what it is ``taken`` for.
        full: keep the scores of all training samples as ``scores.zarr``, ``(N, Q)``.
        index: search approximately, in a FAISS index of this factory string, such as ``IVF64,Flat``, which is made
            when first asked for and kept in ``RUN/indexes``; of ``kernel`` and ``cosine``, and of the highest scores
            alone. By default exactly.
        index_parameters: of FAISS, such as ``nprobe=16``.
        name: of the folder in ``RUN/scores``; by default made of what is asked.
        address: of a Ray cluster, as for :func:`fisher_ray.run`.
        overrides: of the run's ``runtime`` keys, as in ``runtime.num_workers=2``.
        fresh: start anew in the same folder.
        progress: as for :func:`fisher_ray.run`.

    Returns:
        ``place`` of the folder, which holds ``top/*.parquet`` (``query``, ``end``, ``place``, ``row``, ``label``,
        ``score``), ``queries/*.parquet`` (``row``, ``label``, ``taken``, ``probability``, ``norm`` and
        ``novelty``: see :func:`fisher_ray.stages.attribution.novelty.novelty`) and ``report.html``; ``num_queries``,
        ``num_rows``, ``seconds``, ``class_names``, and ``shown``: the first queries with their best.

    Raises:
        RequestError: if the request is wrong, or the run has not come so far.
        DataError: if a row or a store is wrong.
        StoppedError: if it ended early; ask again to go on.
    """
    asked: dict[str, Any] = {
        "queries": dict(queries) if isinstance(queries, Mapping) else queries,
        "rows": rows,
        "by": by,
        "top": top,
    }
    asked |= {"target": target, "full": full, "index": index, "index_parameters": index_parameters}
    request = ScoreConfig.checked(asked).located()
    folder = f"scores/{_name(request) if name is None else name}"
    if not re.fullmatch(r"scores/\w[\w.-]*", folder):
        raise ConfigError(f"name {name!r} is not the name of a folder. Give letters, digits, '-', '_' and '.'.")
    if request.index is not None:
        _make_index(run, request, overrides, address, progress)
    job = _Job(run, folder, request.model_dump(mode="json"), overrides, address, fresh)
    return job.run(progress, lambda stages, blocks: stages.score(request, blocks), write_scores, request)


def _make_index(
    run: str, request: ScoreConfig, overrides: Sequence[str], address: str | None, progress: Progress | None
) -> None:
    """Make the index that is asked for, as far as it is not there."""
    settings = {"by": request.by, "index": request.index}
    job = _Job(run, index_folder(request), settings, overrides, address, fresh=False)
    asked = ScoreConfig(queries="shallow", by=request.by)
    job.run(progress, lambda stages, _: stages.index(request), None, asked)


def audit(
    run: str,
    *,
    top: int = 1000,
    address: str | None = None,
    overrides: Sequence[str] = (),
    fresh: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """List the training samples of a finished run whose labels look wrong, on Ray; what was begun goes on.

    Each sample is judged by the ridge regression on Fisher features that was fitted to all the others, in closed form.

    Args:
        run: the run folder.
        top: how many are listed, the most suspected first.
        address: as for :func:`score`.
        overrides: as for :func:`score`.
        fresh: as for :func:`score`.
        progress: as for :func:`score`.

    Returns:
        ``place`` of the folder ``RUN/audit``, which holds ``suspects.parquet``, ``rows.zarr`` (all samples) and
        ``report.html``; ``num_rows``; ``num_against``: how many another class is suggested for; ``shown``: the first
        few; ``seconds``.

    Raises:
        RequestError: if the request is wrong, or the run has not come so far.
        DataError: if a row or a store is wrong.
        StoppedError: if it ended early; ask again to go on.
    """
    request = AuditConfig.checked({"top": top})

    job = _Job(run, AUDIT, request.model_dump(mode="json"), overrides, address, fresh)
    return job.run(progress, lambda stages, _: stages.audit(request), write_audit, None)


def _name(request: ScoreConfig) -> str:
    """Return a name that tells what is asked, and is another one for everything else that may be."""
    settings = request.model_dump(mode="json", exclude_defaults=True)
    told = {key: settings.pop(key, None) for key in ("queries", "rows", "by")}
    queries = request.queries if isinstance(request.queries, str) else f"elsewhere-{_short_hash(told['queries'])}"
    rows = [] if request.rows is None else [f"{request.rows[0]}-{request.rows[1]}"]
    return "-".join([queries, *rows, request.by, *([_short_hash(settings)] if settings else [])])


def _short_hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


class _Job:
    """One question to a run.

    Args:
        run: the run folder.
        folder: of the answer, in it.
        settings: what is asked, in plain values.
        overrides: of ``runtime`` keys.
        address: of a Ray cluster.
        fresh: whether to start anew.
    """

    def __init__(
        self,
        run: str,
        folder: str,
        settings: dict[str, Any],
        overrides: Sequence[str],
        address: str | None,
        fresh: bool,
    ) -> None:
        self._url, self._folder, self._settings = run.rstrip("/"), folder, settings
        self._overrides, self._session, self._fresh = overrides, Session(address), fresh

    def run(
        self,
        progress: Progress | None,
        work: Callable[[AttributionStages, list[range]], dict[str, Any]],
        write: Callable[..., None] | None,
        request: ScoreConfig | None,
    ) -> dict[str, Any]:
        """Do the work, and write the page of it, if it has one."""
        if progress is None:
            with show_progress(new_console()) as shown:
                return self.run(shown, work, write, request)
        document = read_run(Storage(self._url))
        config = self._config(document)
        needed = ["base", "metric", "features/train"]
        needed += ["features/test"] if request is not None and request.queries == "test" else []
        needed += ["linear"] if request is None or request.by == "ridge" else []
        _refuse_unfinished(self._url, document, config, needed)
        facts, own_classes = inspect_request(config), None
        _refuse_unfit(config, facts, "ridge" if request is None else request.by, request)
        _refuse_others(self._url, document, facts)
        if request is not None and not isinstance(request.queries, str):
            require_network(Storage(self._url), document["stages"]["base"]["result"]["fingerprint"])
            config, facts, own_classes = inspect_queries(config, facts, request)
        blocks = [] if request is None else self._blocks(request, facts)
        place, storage = f"{self._url}/{self._folder}", Storage(f"{self._url}/{self._folder}")
        refuse_foreign(storage)
        with Claim(place, progress.note, another="name") as claim:
            told = {"identity": self._settings, "fingerprints": {**facts.fingerprints, **_sealed(document)}}
            journal = Journal.open(storage, told, fresh=self._fresh, check=claim.check, own=OWN, another="name")
            for name, value in document["decisions"].items():
                journal.decide(name, value)
            results = {name: stage["result"] for name, stage in document["stages"].items() if stage.get("sealed")}
            with crewed(self._session, config, facts, journal, storage, progress) as (facts, crew, note):
                given = (config, facts, journal, self._session, crew, claim, progress, note, self._folder, results)
                found = work(AttributionStages(*given), blocks)
            if own_classes is not None:  # whose labels are others than the training samples'
                found |= {"query_classes": [*own_classes], "pairs": None}
            claim.check()
            if write is not None:
                write(storage, found, self._settings, facts.class_names, partial(_picture, storage))
        names = None if facts.class_names is None else list(facts.class_names)
        return {"place": place, "class_names": names, **found}

    def _blocks(self, request: ScoreConfig, facts: Facts) -> list[range]:
        split = "shallow" if request.queries == "shallow" else "test"  # whose place other queries take
        store = open_features(f"{self._url}/features/train.zarr")
        return query_blocks(request, facts.num_rows[split], store.row_bytes("features"))

    def _config(self, document: dict[str, Any]) -> Config:
        if wrong := [item for item in self._overrides if not item.startswith("runtime.")]:
            raise ConfigError(f"--set {wrong[0]}: of a finished run, keys of 'runtime' alone can be replaced.")
        config = Config.from_dict(document["config"], [*self._overrides, f"output={json.dumps(self._url)}"]).located()
        if config.identity()["runtime"] != document["identity"]["runtime"]:
            raise ConfigError(
                "--set: of a finished run, keys of 'runtime' that the last bits of results depend on (cpus_per_worker, "
                "unit_rows, micro_batch, memory_bytes) cannot be replaced. Leave them out."
            )
        return config


def _picture(storage: Storage, name: str) -> bytes:
    return storage.read_bytes(f"{PICTURES}/{name}.png")


def _sealed(document: dict[str, Any]) -> dict[str, Any]:
    """Return what changes when the run's features do."""
    stages = document["stages"]
    found = {"metric": stages["metric"]["result"]["fingerprint"], "network": stages["base"]["result"]["fingerprint"]}
    linear = stages.get("linear", {}).get("result") or {}
    return {**found, "linear": json.dumps({key: linear.get(key) for key in ("penalty", "rank", "damping")})}


def _refuse_unfinished(url: str, document: dict[str, Any], config: Config, needed: Sequence[str]) -> None:
    if config.linear.model == "gradnet":
        raise RequestError(f"{url} has GradNet alone, and no Fisher features. Run with linear.model: ridge.")
    for name in needed:
        if not document["stages"].get(name, {}).get("sealed"):
            raise RequestError(f"{url} has no finished stage {name!r}, which this needs. Run it again; it goes on.")


def _refuse_unfit(config: Config, facts: Facts, by: str, request: ScoreConfig | None) -> None:
    """Refuse what the run's features do not allow."""
    if by == "ridge" and config.linear.num_stacked is not None:
        raise RequestError(
            "linear.view_mode stack: the views of a sample are rows of their own, and leaving out one of them is not "
            "leaving out the sample. Run with linear.view_mode: average."
        )
    if by == "influence" and not has_label_scores(config, facts.num_classes):
        labels, buckets = config.scores.labels, config.scores.class_buckets
        what = f"of {labels} labels" if buckets is None else f"of {buckets} buckets of classes"
        raise RequestError(
            f"the influence on the network takes the scores of known classes, and this run's are {what}. "
            "Ask for by: kernel, or run with scores: {labels: all, class_buckets: null}."
        )
    if by == "influence" and config.scores.labels == "true" and request is not None and request.target == "taken":
        raise RequestError(
            "this run's features are of the true labels alone, so there are none of what a query is taken for. Ask for "
            "target: label, or run with scores.labels: all."
        )


def _refuse_others(url: str, document: dict[str, Any], facts: Facts) -> None:
    before = document["fingerprints"]
    if changed := [name for name, value in facts.fingerprints.items() if before.get(name) != value]:
        raise ResumeMismatchError(
            f"{url} was made of another model or data: the fingerprint of {', '.join(changed)} differs. Put back what "
            "it was made of."
        )
