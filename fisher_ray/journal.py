"""The run folder's memory: ``run.json``, which says how far a run came, and ``events.jsonl``, what happened."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

from fisher_ray.errors import ConfigError, ResumeMismatchError, StoppedError
from fisher_ray.storage import Storage

SCHEMA = 1
PROGRAM = "fisher_ray"
RUN_FILE, EVENTS_FILE, CLAIM_FILE = "run.json", "events.jsonl", "claim.json"
OWN = (
    "base",
    "basis.zarr",
    "metric.zarr",
    "features",
    "linear",
    "gradnet",
    "report",
    "sums",
    "scores",
    "audit",
    "indexes",
)
"""What a run writes into its folder, besides ``run.json`` and its events."""
EVENTS_EVERY_S = 30.0
"""Least time between two writes of the events, stages' ends apart."""

LAST_WORDS_S = 2.0
"""How long a stage that is interrupted tries to write down that it was."""


class Journal:
    """Stages of one run and their results; every change is on storage before the call returns.

    Args:
        storage: the run folder.
        document: the content of ``run.json``.
        events: lines of ``events.jsonl``.
        check: called before each write; raises if the folder is no longer this driver's to write to.
    """

    def __init__(
        self, storage: Storage, document: dict[str, Any], events: list[str], check: Callable[[], None]
    ) -> None:
        """Use :meth:`open`."""
        self._storage, self._document, self._events, self._check = storage, document, events, check
        self._written_s = time.monotonic()
        self._running: tuple[dict[str, Any], float] | None = None  # the stage's record, and when it counts from

    @classmethod
    def open(
        cls,
        storage: Storage,
        facts: dict[str, Any],
        *,
        fresh: bool = False,
        late: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
        check: Callable[[], None] = lambda: None,
        own: Iterable[str] = OWN,
        another: str = "output",
    ) -> Journal:
        """Take up the run in the folder, or start one there.

        Args:
            storage: the run folder.
            facts: ``identity`` and ``fingerprints``, which a run that is taken up must have had too; and whatever else
                is to be kept (``config``, ``versions``), which may have changed.
            fresh: remove what an earlier run left, and start anew.
            late: keys of the identity that may change until one of these stages is sealed.
            check: as the constructor's.
            own: what is in the folder, to be removed by ``fresh``.
            another: what a user gives for another folder.

        Raises:
            ResumeMismatchError: if the folder's run had another configuration, model or data, naming the difference.
            ConfigError: if the folder holds something else.
            StorageError: if storage does not answer.
        """
        document = _read(storage)
        if document is None:
            refuse_foreign(storage)
        elif fresh or document.get("clearing"):
            _clear(storage, own)
            document = None
        if document is None:
            journal = cls(storage, {**_empty(), **facts}, [], check)
            journal._save()
            return journal
        if differences := _differences(document, facts, late):
            raise ResumeMismatchError(
                f"{storage.url} holds a run of another configuration, model or data: {_listed(differences)}. "
                f"Give another {another}, or start anew in the same place with --fresh."
            )
        return cls(storage, {**document, **facts}, _read_events(storage), check)

    def sealed(self, stage: str) -> bool:
        """Whether a stage is finished."""
        return bool(self._stage(stage).get("sealed"))

    def result(self, stage: str) -> dict[str, Any]:
        """Return what a finished stage was sealed with."""
        return dict(self._stage(stage)["result"])

    def results(self) -> dict[str, dict[str, Any]]:
        """Return ``seconds`` and ``result`` of every finished stage."""
        stages = self._document["stages"]
        return {
            name: {"seconds": record["seconds"], "result": record["result"]}
            for name, record in stages.items()
            if record.get("sealed")
        }

    def seconds(self, stage: str) -> float:
        """Return the wall time that a stage took, over all attempts."""
        return float(self._stage(stage).get("seconds", 0.0))

    def decide(self, name: str, value: Any) -> Any:
        """Return what was decided under ``name`` when the run first came here: now, it is ``value``."""
        decisions = self._document["decisions"]
        if name not in decisions:
            decisions[name] = value
            self._save()
        return decisions[name]

    def exclude(self, split: str, rows: Mapping[int, str]) -> None:
        """Keep rows of a split that killed or failed whoever worked on them, with the reasons."""
        excluded = self._document.setdefault("excluded", {}).setdefault(split, {})
        excluded |= {str(row): reason for row, reason in rows.items()}
        self._save()

    def excluded(self, split: str) -> dict[int, str]:
        """Return what was given to :meth:`exclude`, over all starts of the run."""
        return {int(row): reason for row, reason in self._document.get("excluded", {}).get(split, {}).items()}

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Run a stage: what the caller puts into the yielded mapping is its result; an exception leaves it unsealed.

        The time spent is kept in either case.
        """
        record = self._document["stages"].setdefault(name, {"seconds": 0.0})
        self._running, result = (record, time.monotonic() - record["seconds"]), dict[str, Any]()
        self.event("stage started", stage=name)
        try:
            yield result
        except BaseException:
            with suppress(StoppedError):  # storage that does not answer, a lost claim: the first failure is to be told
                self._stop("stage interrupted", name, record, Storage(self._storage.url, retry_s=LAST_WORDS_S))
            raise
        record |= {"sealed": True, "result": result}
        self._stop("stage done", name, record, self._storage)

    def event(self, what: str, **values: Any) -> None:
        """Keep a line; it is on storage within :data:`EVENTS_EVERY_S` of the next one, or at the stage's end."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._events.append(json.dumps({"time": now, "event": what, **values}))
        if time.monotonic() - self._written_s > EVENTS_EVERY_S:
            self._clock()
            self._flush(self._storage)

    def total(self, what: str, key: str) -> int:
        """Return the sum of ``key`` over the events ``what`` so far, those of earlier starts of the run included."""
        return sum(int(event.get(key, 0)) for event in self.events(what))

    def events(self, what: str) -> Iterator[dict[str, Any]]:
        """Yield the events ``what`` so far, those of earlier starts of the run included."""
        yield from (event for event in map(json.loads, self._events) if event.get("event") == what)

    def _clock(self) -> None:
        if self._running is not None:
            record, since = self._running
            record["seconds"] = time.monotonic() - since

    def _stage(self, name: str) -> dict[str, Any]:
        return dict(self._document["stages"].get(name, {}))

    def _stop(self, outcome: str, name: str, record: dict[str, Any], storage: Storage) -> None:
        self._clock()
        self._running, self._written_s = None, time.monotonic()  # written once, below
        self.event(outcome, stage=name, seconds=round(record["seconds"], 3))
        self._flush(storage)

    def _flush(self, storage: Storage) -> None:
        self._check()
        storage.write_bytes(EVENTS_FILE, "".join(f"{line}\n" for line in self._events).encode())
        self._save(storage)
        self._written_s = time.monotonic()

    def _save(self, storage: Storage | None = None) -> None:
        self._check()
        (storage or self._storage).write_bytes(
            RUN_FILE, (json.dumps(self._document, indent=2, allow_nan=False) + "\n").encode()
        )


def read_run(storage: Storage) -> dict[str, Any]:
    """Return the content of a run folder's ``run.json``.

    Raises:
        ConfigError: if there is none.
    """
    document = _read(storage)
    if document is None:
        raise ConfigError(f"{storage.url} is no run folder: it has no {RUN_FILE}. Check the URL.")
    return document


def reopen(storage: Storage, stages: Iterable[str]) -> None:
    """Have the next start of a run do stages again that are sealed; what they find finished they keep.

    Raises:
        ConfigError: if there is no run.
    """
    document = read_run(storage)
    for stage in stages:
        if stage in document["stages"]:
            document["stages"][stage]["sealed"] = False
    storage.write_bytes(RUN_FILE, (json.dumps(document, indent=2, allow_nan=False) + "\n").encode())


def refuse_foreign(storage: Storage) -> None:
    """Return if the folder is a run's, or empty but for a claim.

    Raises:
        ConfigError: if it holds something else.
        StorageError: if storage does not answer.
    """
    if _read(storage) is not None:
        return
    if names := [name for name in storage.list() if name != CLAIM_FILE]:
        if names == [""]:
            raise ConfigError(f"output {storage.url} is a file. Give a folder, an empty or a new one.")
        raise ConfigError(
            f"output {storage.url} is not empty and no run folder: it holds {names[0]}. Give an empty or a new place."
        )


def _read(storage: Storage) -> dict[str, Any] | None:
    try:
        document = json.loads(storage.read_bytes(RUN_FILE))
    except FileNotFoundError:
        return None
    except ValueError:
        document = None
    if not isinstance(document, dict) or document.get("program") != PROGRAM:
        raise ConfigError(f"{storage.url}/{RUN_FILE} is not this program's. Give another output.")
    if document.get("schema") != SCHEMA:
        raise ConfigError(
            f"{storage.url} was written with schema {document.get('schema')}, this program writes {SCHEMA}. "
            "Give another output."
        )
    return document


def _empty() -> dict[str, Any]:
    return {"schema": SCHEMA, "program": PROGRAM, "stages": {}, "decisions": {}}


def _clear(storage: Storage, own: Iterable[str]) -> None:
    """Remove a run; if this is cut off, what is left says so, and is removed by the next one to open the folder."""
    document = {**_empty(), "clearing": True}
    storage.write_bytes(RUN_FILE, json.dumps(document).encode())
    for name in (*own, EVENTS_FILE):
        storage.remove(name)


def _read_events(storage: Storage) -> list[str]:
    try:
        return storage.read_bytes(EVENTS_FILE).decode().splitlines()
    except FileNotFoundError:
        return []


def _differences(
    document: dict[str, Any], facts: dict[str, Any], late: Mapping[str, tuple[str, ...]]
) -> dict[str, str]:
    sealed = {name for name, record in document["stages"].items() if record.get("sealed")}
    free = [key for key, stages in late.items() if not sealed.intersection(stages)]
    identity = {
        key: text
        for key, text in _compare(document.get("identity"), facts["identity"], "")
        if not any(key == start or key.startswith(f"{start}.") for start in free)
    }
    fingerprints = _compare(document.get("fingerprints"), facts["fingerprints"], "")
    return identity | {f"fingerprint of {key}": text for key, text in fingerprints}


def _listed(differences: dict[str, str]) -> str:
    return "; ".join(f"{key} {text}" for key, text in differences.items())


def _compare(before: Any, now: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yield each key, its parts joined by dots, whose value is not the same, and what happened to it."""
    if isinstance(before, dict) and isinstance(now, dict):
        for k in sorted(before.keys() | now.keys()):
            yield from _compare(before.get(k), now.get(k), f"{key}.{k}" if key else k)
    elif before != now:
        yield key, f"was {_short(before)}, now {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
