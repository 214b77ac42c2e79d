"""Real workers, and what they do, for the tests of passes over units."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import ray

from fisher_ray.records import Receipt, Unit
from fisher_ray.runtime import Crew, Pool, Session
from fisher_ray.runtime.pool import Sum
from fisher_ray.runtime.slices import join
from tests.integration.runs import digits

FACTS = SimpleNamespace(micro_batch=1, micro_batch_gpu=1)


@contextmanager
def workers(output: Path, *overrides: str, notes: list[str] | None = None) -> Iterator[Pool]:
    config = digits(output, "runtime.num_workers=2", *overrides)
    note = (notes if notes is not None else []).append
    with closing(Session()) as session, closing(Crew(session, config, FACTS, note, lambda _, value: value)) as crew:
        yield Pool(crew, config, note, lambda: None)


def whole(total: Sum) -> dict[str, np.ndarray]:
    """The sum's arrays, which only tests bring to the driver."""
    return join(ray.get(total.refs))


def rows(bench: Any, unit: Unit, attempt: int, *, folder: str) -> tuple[Receipt, dict[str, np.ndarray]]:
    """The sum of the unit's rows, and a file that says that it was computed."""
    wanted = [row for row in range(unit.start, unit.stop) if row not in dict(unit.excluded)]
    Path(folder, f"{unit.start}-{unit.stop}-{attempt}-{os.getpid()}").touch()
    total = float(sum(wanted))
    return Receipt(unit, attempt, skipped=dict(unit.excluded)), {
        "sum": np.array(total),
        "matrix": np.outer(np.arange(1.0, 6), [1, total]),
    }


def failing(bench: Any, unit: Unit, attempt: int, *, folder: str, poison: list[int]) -> tuple[Receipt, Any]:
    """As :func:`rows`; but a poisonous row is an error that names nothing."""
    if set(poison) & set(range(unit.start, unit.stop)) - set(dict(unit.excluded)):
        raise ZeroDivisionError("division by zero")
    return rows(bench, unit, attempt, folder=folder)


def count(bench: Any, sums: dict[str, np.ndarray]) -> int:
    """How many arrays there are."""
    return len(sums)
