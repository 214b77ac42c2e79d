"""Checking and mending what a run has left: its folder, or a store by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fisher_ray import store
from fisher_ray.errors import StoreError
from fisher_ray.journal import RUN_FILE, read_run, reopen
from fisher_ray.storage import Storage

STAGES = {
    "basis.zarr": "basis",
    "metric.zarr": "metric",
    "features/train.zarr": "features/train",
    "features/test.zarr": "features/test",
    "linear/weights.zarr": "linear",
    "linear/probe-ridge.zarr": "linear_probe",
    "linear/probe-logistic.zarr": "linear_probe",
    "linear/predictions.zarr": "report",
    "features/gradnet.zarr": "gradnet/entries",
    "gradnet/ranges.zarr": "gradnet/ranges",
    "gradnet/weights.zarr": "gradnet",
    "gradnet/predictions.zarr": "gradnet/test",
}
"""The stores of a run folder, and the stage that writes each."""


@dataclass(frozen=True)
class Place:
    """A store, and the run folder that it belongs to.

    Attributes:
        url: of the store.
        run: of the run folder; None if it is in none.
        name: within the run folder.
    """

    url: str
    run: str | None = None
    name: str = ""


def stores_at(url: str) -> list[Place]:
    """Return the stores of a run folder that its finished stages have written, or the store at ``url`` alone.

    Raises:
        ConfigError: if a run folder's ``run.json`` is not this program's.
        StorageError: if storage does not answer.
    """
    whole, storage = url.rstrip("/"), Storage(url)
    if storage.exists(RUN_FILE):
        stages = read_run(storage)["stages"]
        names = [name for name, stage in STAGES.items() if stages.get(stage, {}).get("sealed")]
        return [Place(f"{whole}/{name}", whole, name) for name in names]
    for name in STAGES:
        run = whole.removesuffix(f"/{name}")
        if run != whole and Storage(run).exists(RUN_FILE):
            return [Place(whole, run, name)]
    return [Place(whole)]


def verify(url: str) -> dict[str, list[str]]:
    """Return the problems of every store at ``url``, by the store's URL: see :func:`fisher_ray.store.verify`.

    Raises:
        StoreError: if there is no store of this program.
        StorageError: if storage does not answer.
    """
    return {place.url: _problems(place) for place in [*stores_at(url), *_answers(url)]}


def _answers(url: str) -> list[Place]:
    """Return the sealed stores of scores and of an audit in a run folder; none of what is no run folder."""
    storage = Storage(url)
    if not storage.exists(RUN_FILE):
        return []
    names = [name for folder in ("audit", "scores") for name in storage.list(folder)]
    sealed = [name.removesuffix(f"/{store.SEAL}") for name in names if name.endswith(f".zarr/{store.SEAL}")]
    return [Place(f"{url.rstrip('/')}/{name}") for name in sorted(sealed)]


def repair(url: str, note: Callable[[str], None]) -> dict[str, store.Repair]:
    """Have what is damaged at ``url`` written again by the next start of its run: see :func:`fisher_ray.store.repair`.

    Args:
        url: a run folder, or a store in one.
        note: told what a user may want to know.

    Raises:
        StoreError: if the store is damaged and belongs to no run, which could write it again.
        ClaimedError: if a driver is at work on the run.
        StorageError: if storage does not answer.
    """
    from fisher_ray.runtime import Claim  # and with it Ray, which checking alone does not need

    places = stores_at(url)
    if places and places[0].run is None:
        if problems := _problems(places[0]):
            raise StoreError(
                f"{url} belongs to no run folder, so nothing can write it again: {problems[0]}"
                f"{f' and {len(problems) - 1} more' if len(problems) > 1 else ''}. Restore it from a copy."
            )
        return {}
    run = str(places[0].run) if places else url
    with Claim(run, note):
        found = {place: _repair(place) for place in places}
        reopen(Storage(run), [STAGES[place.name] for place, done in found.items() if done.needed])
    return {place.url: done for place, done in found.items() if done.problems}


def _problems(place: Place) -> list[str]:
    try:
        return store.verify(place.url)
    except StoreError:
        if place.run is None or Storage(place.url).list():
            raise
        return ["missing as a whole"]  # of a finished stage


def _repair(place: Place) -> store.Repair:
    if not Storage(place.url).list():
        return store.Repair(["missing as a whole"], None, [])
    return store.repair(place.url)
