"""Fits through Ray Train, which starts a group of workers, and starts it again when it loses one."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
import torch
import torch.distributed as dist
from ray.train.torch import TorchConfig, get_device
from ray.train.v2.api.callback import UserCallback
from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError
from ray.train.v2.torch.torch_trainer import TorchTrainer

from fisher_ray.config import Config
from fisher_ray.errors import DataError, FisherRayError, StoppedError, WorkersLostError
from fisher_ray.runtime.exchange import TorchExchange
from fisher_ray.runtime.failures import reason
from fisher_ray.runtime.resources import fitting, free_resources, needs, wanted
from fisher_ray.runtime.session import Session
from fisher_ray.stages import Facts, Workbench, logistic, minibatch
from fisher_ray.stages.gradnet.checkpoint import PROGRESS_FILE
from fisher_ray.stages.gradnet.training import fit_gradnet as train_gradnet
from fisher_ray.storage import Storage

START_TIMEOUT_S = 60.0
"""How long a group waits for its places before it is tried with fewer workers."""
MAX_FAILED_STARTS = 10
"""Groups that may fail to start, one after the other."""
POLL_S = 0.5
"""How often Ray Train looks at its workers."""
TOLD_S = 2.0
"""How often the progress of a training is looked up."""

_STARTUP_ERRORS = (
    "WorkerGroupStartupTimeoutError",
    "WorkerGroupStartupFailedError",
    "InsufficientClusterResourcesError",
)
"""Ray Train's errors for a group without places or with a worker dead on arrival; by name, as they are not public."""


class _NotStartedError(Exception):
    """A group had no places, or a worker of it died in starting."""


class _FitError(Exception):
    """A worker's own failure that is none of ours; the message is made of plain text, so it always pickles."""


@dataclass(frozen=True)
class Fit:
    """A fit that the workers of a group do together.

    Attributes:
        name: in messages.
        task: called by every rank; rank 0 returns plain values. Started again after a lost worker.
    """

    name: str
    task: Callable[[Workbench, TorchExchange], dict[str, Any] | None]


@dataclass(frozen=True)
class ToldFit(Fit):
    """A fit whose rank 0 writes how far it is.

    Attributes:
        progress_file: where, in the run folder.
        counted: what it counts, in messages.
    """

    progress_file: str
    counted: str


GRADNET = ToldFit("training of GradNet", train_gradnet, PROGRESS_FILE, "steps")
MINIBATCH = ToldFit("logistic fit", minibatch.fit_minibatch, minibatch.PROGRESS_FILE, "epochs")
"""With fewer workers than before it starts anew, and fits other bits."""


def fit_logistic(
    session: Session, config: Config, facts: Facts, num_workers: int, gpus: float, note: Callable[[str], None]
) -> dict[str, Any]:
    """Run :func:`fisher_ray.stages.logistic.fit_logistic`, see :func:`fit`.

    After a lost worker it starts from the beginning; a fit that did not converge is told to ``note``.
    """
    result = fit(session, config, facts, num_workers, gpus, note, Fit("logistic fit", logistic.fit_logistic))
    _note_unconverged(result, note)
    return result


def fit_told(
    session: Session,
    config: Config,
    facts: Facts,
    num_workers: int,
    gpus: float,
    note: Callable[[str], None],
    advanced: Callable[[int, int, str], None],
    asked: ToldFit,
) -> dict[str, Any]:
    """Run a fit that tells of its progress, see :func:`fit`; after a lost worker it goes on from its last checkpoint.

    Args:
        session: as of :func:`fit`, like those up to ``note``.
        config: the run's.
        facts: what the first look found.
        num_workers: ranks.
        gpus: of each.
        note: told what a user may want to know.
        advanced: told of what is done, of all, and the loss, now and then.
        asked: what is done: :data:`GRADNET` or :data:`MINIBATCH`.
    """
    with _told(Storage(config.output), asked.progress_file, asked.counted, advanced):
        return fit(session, config, facts, num_workers, gpus, note, asked)


def fit(
    session: Session,
    config: Config,
    facts: Facts,
    num_workers: int,
    gpus: float,
    note: Callable[[str], None],
    asked: Fit,
) -> dict[str, Any]:
    """Run a fit on the workers of a Ray cluster.

    The workers' places have to be free. If they cannot be had, the fit goes on with fewer workers; if one is lost, the
    task is started again. Neither changes a bit of the result, unless the task says so.

    Args:
        session: the connection.
        config: the run's, its paths absolute.
        facts: what the first look at the request found.
        num_workers: ranks, if there are places for them.
        gpus: of each.
        note: told of lost workers, and of fewer workers.
        asked: what is done.

    Returns:
        What rank 0 returned.

    Raises:
        FisherRayError: a worker's own, at once.
        DataError: if the fit failed by itself ``runtime.max_attempts`` times.
        WorkersLostError: if workers were lost as often, or could not be had for ``runtime.wait_s``.
    """
    session.connect()
    runtime, attempts, failed_starts, waited_s = config.runtime, config.runtime.max_attempts, 0, 0.0
    while True:
        start_s, losses = time.monotonic(), list[str]()
        try:
            return _run_group(session, config, facts, num_workers, gpus, attempts, losses, asked)
        except _NotStartedError as error:
            lap_s = min(time.monotonic() - start_s, START_TIMEOUT_S)
            failed_starts, waited_s = (1, lap_s) if losses else (failed_starts + 1, waited_s + lap_s)
            if waited_s >= runtime.wait_s or failed_starts >= MAX_FAILED_STARTS:
                raise WorkersLostError(
                    f"no worker could be had for the {asked.name} in {waited_s:.0f} s and {failed_starts} tries: "
                    f"{error} ({wanted(config, gpus)}). Add machines, or ask for less under 'runtime', then run again."
                ) from error
            attempts -= len(losses)
            num_workers = max(1, min(num_workers - 1, fitting(config, gpus, free_resources())))
            note(f"the {asked.name} did not start ({error}); it is tried with workers: {num_workers}")
        finally:
            for loss in losses:
                note(f"an attempt at the {asked.name} ended: {loss}")


def _run_group(
    session: Session,
    config: Config,
    facts: Facts,
    num_workers: int,
    gpus: float,
    attempts: int,
    losses: list[str],
    asked: Fit,
) -> dict[str, Any]:
    """Run one group to its end; ``losses`` is filled with what ended an attempt.

    Raises:
        _NotStartedError: if it did not start, or not again.
        FisherRayError: as :func:`fit`.
    """
    threads = config.runtime.cpus_per_worker
    with tempfile.TemporaryDirectory(prefix="fisher-ray-train-") as folder:
        record = Path(folder, "losses")
        kind: Any = _EmbeddedTrainer if session.embedded else TorchTrainer
        trainer = kind(
            _loop,
            train_loop_config={
                "config": config,
                "facts": facts,
                "threads": threads,
                "gpus": gpus > 0,
                "task": asked.task,
            },
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ScalingConfig(
                num_workers=num_workers,
                use_gpu=gpus > 0,
                resources_per_worker=needs(config, gpus),
            ),
            run_config=RunConfig(
                name=asked.name.replace(" ", "-"),
                storage_path=folder,  # nothing is stored: results come back as return values
                failure_config=FailureConfig(max_failures=attempts - 1, controller_failure_limit=0),
                worker_runtime_env={"env_vars": session.worker_environment()},
                logging_config=LoggingConfig(log_level="ERROR"),
                callbacks=[_LossRecord(record)],
            ),
        )
        try:
            with _settings(config), _interruptible(), _hushed():
                returned: Any = trainer.fit().return_value
        except TrainingFailedError as error:
            raise _translated(error, config, asked.name) from error
        except ray.exceptions.RayActorError as error:
            raise WorkersLostError(f"Ray Train's controller died: {reason(error)}. Run again.") from error
        finally:
            losses += record.read_text().splitlines() if record.exists() else []
    if "error" in returned:
        raise returned["error"]
    return dict(returned["fitted"])


def _translated(error: TrainingFailedError, config: Config, name: str) -> Exception:
    """Return the error that the caller is to see."""
    if isinstance(error, ControllerError):
        cause = error.controller_failure
        if type(cause).__name__ in _STARTUP_ERRORS:
            return _NotStartedError(str(cause).split(". ")[0].rstrip("."))
        return FisherRayError(f"Ray Train failed in the {name}: {reason(cause)}")
    failures = list(error.worker_failures.values()) if isinstance(error, WorkerGroupError) else []
    times = f"{config.runtime.max_attempts} times (runtime.max_attempts)"
    for failure in failures:
        if isinstance(failure, _FitError):
            return DataError(f"the {name} failed {times}; the last time: {failure}")
        if isinstance(failure, FisherRayError) and not isinstance(failure, WorkersLostError):
            return failure
    last = _telling(failures) if failures else str(error)
    return WorkersLostError(f"the {name} lost workers {times}. The last time: {last}. Run again.")


def _telling(failures: list[Exception]) -> str:
    """Describe the failure that the others follow from: ranks that lost contact do not know why."""
    first = next((failure for failure in failures if not isinstance(failure, WorkersLostError)), failures[0])
    return str(first) if isinstance(first, _FitError) else reason(getattr(first, "health_check_failure", first))


def _note_unconverged(result: dict[str, Any], note: Callable[[str], None]) -> None:
    fits = [*result["path"], result]
    if open_fits := [f"{fit['penalty']:g}" for fit in fits if not fit["converged"]]:
        note(
            f"logistic fits that ended before they converged, by penalty: {', '.join(open_fits)}. "
            "Raise linear.max_steps if the validation accuracy is to be trusted to the last digit."
        )


# -- around Ray Train, in the driver


class _EmbeddedTrainer(TorchTrainer):
    """Leaves out Ray Train's guard against a dead controller's leftovers, where Ray ends with this process anyway.

    The guard asks the dashboard, and without one every fit would end with 12 s of waiting for its answer.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [item for item in callbacks if type(item).__name__ != "PlacementGroupCleanerCallback"]


class _LossRecord(UserCallback):
    """Writes a line for every attempt that failed; runs in Ray Train's controller, on the driver's machine."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Add a line."""
        with self._path.open("a") as file:
            file.write(_telling(list(worker_exceptions.values())).replace("\n", " ") + "\n")


@contextmanager
def _settings(config: Config) -> Iterator[None]:
    """Set what Ray Train takes from the environment alone, unless the user has set it."""
    wanted = {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(POLL_S),
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(min(START_TIMEOUT_S, config.runtime.wait_s)),
    }
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Keep Ctrl-C's meaning: Ray Train puts a handler of its own there for good, which exits with code 0."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:  # only a signal's handler raises it in here, and its code is sometimes lost in Ray
        raise KeyboardInterrupt from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


@contextmanager
def _hushed() -> Iterator[None]:
    """Ignore what Ray Data says of its own defaults, for which Ray Train asks it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"ray\.data\.context")
        yield


@contextmanager
def _told(storage: Storage, name: str, unit: str, advanced: Callable[[int, int, str], None]) -> Iterator[None]:
    """Pass on what rank 0 writes of its progress into the file ``name``: Ray Train's workers cannot call the driver."""
    over = threading.Event()

    def read() -> bytes | None:
        try:
            return storage.read_bytes(name)
        except (FileNotFoundError, StoppedError):  # not yet; or storage does not answer, which the workers tell
            return None

    before = read()  # of a training that was interrupted

    def watch() -> None:
        nonlocal before
        while not over.wait(TOLD_S):
            if (raw := read()) is not None and raw != before:
                before, told = raw, json.loads(raw)
                seen = told["validation"]
                shown = "" if seen is None else f", {100 * seen:.1f} % of the validation rows"
                advanced(told["done"], told["total"], f"{unit}, loss {told['loss']:.3f}{shown}")

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


# -- in the workers


def _loop(settings: dict[str, Any]) -> dict[str, Any] | None:
    """Take part in the fit; rank 0 returns ``fitted``, or as ``error`` one that another attempt would not mend."""
    torch.set_num_threads(settings["threads"])
    device = get_device() if settings["gpus"] and torch.cuda.is_available() else torch.device("cpu")
    try:
        bench = Workbench(settings["config"], settings["facts"], str(device))
        fitted = settings["task"](bench, TorchExchange(device))
    except WorkersLostError:
        raise
    except FisherRayError as error:
        if dist.get_rank():
            raise
        return {"error": error}
    except Exception as error:
        raise _FitError(reason(error)) from error
    return {"fitted": fitted}
