"""What the tests of whole runs share."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import fisher_ray
from fisher_ray.config import Config
from fisher_ray.records import Receipt, SilentProgress

DEMO = Path(fisher_ray.__file__).with_name("demo.yaml")
QUICK = ("base.steps=60", "compression.dim=128", "metric.rank=64", "trained_on.seconds=0.2", "runtime.num_workers=1")
"""Small, and with one worker, whose start costs the most: tests of several say so."""


class Listening(SilentProgress):
    """Keeps the notes and the receipts, and lets a test act on a receipt."""

    def __init__(self, on_receipt: Callable[[str, Receipt], None] | None = None) -> None:
        self.notes: list[str] = []
        self.receipts: list[tuple[str, Receipt]] = []
        self.stages: list[str] = []
        self._on_receipt = on_receipt

    def stage_started(self, name: str, total: int | None) -> None:
        self.stages.append(name)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def unit_done(self, stage: str, receipt: Receipt) -> None:
        self.receipts.append((stage, receipt))
        if self._on_receipt is not None:
            self._on_receipt(stage, receipt)


def digits(output: Path, *overrides: str) -> Config:
    return Config.from_yaml(DEMO, [*QUICK, f"output={output}", *overrides])


def worker_pid(receipt: Receipt) -> int:
    found = re.search(r"pid (\d+)", receipt.worker)
    assert found is not None
    return int(found[1])


def bits(output: Path) -> dict[str, str]:
    """Digest of every file whose bytes must not depend on workers and crashes: all but times, attempts and reports."""
    found = {}
    for path in sorted(output.rglob("*")):
        name = path.relative_to(output).as_posix()
        timed = name.startswith(("report/", "base/trained_on", "run.json", "events.jsonl")) or "/manifest/" in name
        if path.is_file() and not timed:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found
