"""A job with its workers: what a run and a question to one begin and end with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace

from fisher_ray.config import Config
from fisher_ray.journal import Journal
from fisher_ray.records import Progress
from fisher_ray.runtime import Crew, Session
from fisher_ray.stages import Facts
from fisher_ray.storage import Storage

SIZES = ("micro_batch", "micro_batch_gpu")
"""What the first look finds and the first start of a job decides, for results depend on it."""


@contextmanager
def crewed(
    session: Session, config: Config, facts: Facts, journal: Journal, storage: Storage, progress: Progress
) -> Iterator[tuple[Facts, Crew, Callable[[str], None]]]:
    """Yield the facts with what was decided, the workers, and what takes notes for user and journal.

    Files that killed workers have half written are removed before and after; the session is closed.

    Args:
        session: the connection to Ray.
        config: of the run.
        facts: what the first look at the request found.
        journal: of the job.
        storage: its folder.
        progress: hears how it goes.
    """
    storage.remove_partials()  # of workers that ended with an earlier driver
    facts = replace(facts, **{name: journal.decide(name, getattr(facts, name)) for name in SIZES})

    def note(text: str) -> None:
        progress.note(text)
        journal.event("note", text=text)

    with closing(session), closing(Crew(session, config, facts, note, journal.decide)) as crew:
        yield facts, crew, note
    storage.remove_partials()  # of workers that this job has lost
