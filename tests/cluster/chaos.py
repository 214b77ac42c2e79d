"""Runs under random faults, compared byte by byte with one that nothing befell.

``python -m tests.cluster.chaos --faults 60`` prints a line for every fault and run, and a table at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from tests.integration.processes import alive, descendants, wait_for
from tests.integration.runs import bits

SLOW = """
import time
from fisher_ray.models import digits_transform

def transform(image, generator):
    time.sleep(0.01 if generator is None else 0)
    return digits_transform(image, generator)
"""
OVERRIDES = (
    "data.transform=slow:transform",
    "runtime.num_workers=2",
    "runtime.unit_rows=32",
    "runtime.checkpoint_units=4",
    "runtime.max_attempts=20",
    "store.chunk_rows=32",
    "compression.dim=256",
    "base.steps=400",
    "trained_on=null",
)
"""Many small units, slow to read, whose sums are too large to travel inside a reply."""
DEADLINE_S = 300.0
FAULTS = ("worker killed", "node lost", "driver killed", "sums lost", "worker stopped")


@dataclass
class Tally:
    """What was done and what came of it."""

    faults: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)


class Bench:
    """A Ray cluster of a head and two machines of one core, in one process tree."""

    def __init__(self, folder: Path, stop_s: float) -> None:
        """Start it."""
        self.folder, self.stop_s = folder, stop_s
        (folder / "slow.py").write_text(SLOW)
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        self.nodes = [self.cluster.add_node(num_cpus=1) for _ in range(2)]

    def start(self, output: Path) -> subprocess.Popen[bytes]:
        """Start, or start again, a run."""
        log = output.with_suffix(".log").open("ab")
        command = [sys.executable, "-m", "tests.cluster.driver", str(output), self.cluster.address, *OVERRIDES]
        root = str(Path(__file__).parents[2])
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(self.folder), root])}
        return subprocess.Popen(command, cwd=self.folder, env=environment, stdout=log, stderr=log)

    def workers(self) -> list[int]:
        """The processes of the run's workers."""
        return [pid for pid in descendants(os.getpid()) if _title(pid).startswith("ray::Worker")]

    def strike(self, fault: str, driver: subprocess.Popen[bytes], output: Path, chance: random.Random) -> bool:
        """Let a fault happen; returns whether there was anything for it to happen to."""
        if fault == "driver killed":
            driver.kill()
            driver.wait(30)
        elif fault == "sums lost":
            return self._lose_sums(output)
        elif fault == "node lost":
            self._replace(chance.choice(self.nodes))
        else:
            if not (workers := self.workers()):
                return False
            pid = chance.choice(workers)
            if fault == "worker killed":
                os.kill(pid, signal.SIGKILL)
            else:
                os.kill(pid, signal.SIGSTOP)
                end = time.monotonic() + self.stop_s
                while time.monotonic() < end and driver.poll() is None:
                    time.sleep(0.1)
                if alive(pid):
                    os.kill(pid, signal.SIGCONT)
        return True

    def _lose_sums(self, output: Path) -> bool:
        """Lose a machine whose object store has sums that wait to be merged."""
        try:
            found = Path(f"{output}.where").read_text()
        except FileNotFoundError:
            return False
        holding = [node for node in self.nodes if node.node_id == found]
        if holding:
            self._replace(holding[0])
        return bool(holding)

    def _replace(self, node: Any) -> None:
        """Lose a machine at once, and have another."""
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)
        self.nodes.append(self.cluster.add_node(num_cpus=1))


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


@contextmanager
def bench(folder: Path, stop_s: float) -> Iterator[Bench]:
    """A bench that is shut down at the end."""
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    found = Bench(folder, stop_s)
    try:
        yield found
    finally:
        found.cluster.shutdown()


def run_through(
    at: Bench, output: Path, faults: list[str], chance: random.Random, tally: Tally, say: Callable[[str], None]
) -> None:
    """Run to the end, with these faults on the way, one every few seconds."""
    start = time.monotonic()
    driver = at.start(output)
    due = time.monotonic() + chance.uniform(5, 12)
    try:
        while (code := driver.poll()) is None or code == -signal.SIGKILL:
            if time.monotonic() - start > DEADLINE_S:
                raise TimeoutError(f"{output} did not end: {output.with_suffix('.log').read_text()[-3000:]}")
            if code is not None:
                driver = at.start(output)
            time.sleep(0.05)
            if faults and time.monotonic() > due:
                fault = faults.pop(0)
                if not at.strike(fault, driver, output, chance):
                    faults.append(fault)  # it has nothing to happen to just now
                else:
                    tally.faults[fault] += 1
                    say(f"{time.monotonic() - start:6.1f} s: {fault}")
                    due = time.monotonic() + chance.uniform(1, 7)
        log = output.with_suffix(".log").read_text()
        assert code == 0, f"{output} ended with {code}: {log[-3000:]}"
    finally:
        if driver.poll() is None:
            driver.kill()
            driver.wait(30)
    tally.seconds.append(time.monotonic() - start)
    for line in (output / "events.jsonl").read_text().splitlines():
        event: dict[str, Any] = json.loads(line)
        if event["event"] == "note":
            tally.notes[_kind(event["text"])] += 1


def _kind(note: str) -> str:
    known = ("lost the worker", "a worker ended while it started", "computed again", "run twice", "tried again")
    known += ("are there already", "done before")
    return next((words for words in known if words in note), "other")


def survive(folder: Path, num_faults: int, seed: int, stop_s: float, say: Callable[[str], None]) -> Tally:
    """Run again and again until so many faults have happened; every run ends with an undisturbed one's bytes."""
    chance, tally, undisturbed = random.Random(seed), Tally(), Tally()
    left = [FAULTS[number % len(FAULTS)] for number in range(num_faults)]
    chance.shuffle(left)
    with bench(folder, stop_s) as at:
        run_through(at, folder / "undisturbed", [], chance, undisturbed, say)
        say(f"undisturbed: {undisturbed.seconds[0]:.1f} s")
        whole = bits(folder / "undisturbed")
        assert {name.partition("/")[0] for name in whole} >= {"metric.zarr", "features", "linear"}
        number = 0
        while left:
            number += 1
            output = folder / f"run-{number}"
            run_through(at, output, left, chance, tally, say)
            found = bits(output)
            assert found == whole, f"{output} differs: {[name for name in whole if found.get(name) != whole[name]]}"
            say(f"run {number}: {tally.seconds[-1]:.1f} s, the same bytes")
            wait_for(lambda: not at.workers(), 60, "the workers' end")
    say(f"{sum(tally.faults.values())} faults in {number} runs: {dict(tally.faults)}")
    say(f"notes: {dict(tally.notes)}")
    lost = sum(tally.seconds) - number * undisturbed.seconds[0]
    say(f"{lost:.0f} s more than {number} undisturbed runs of {undisturbed.seconds[0]:.1f} s")
    return tally


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description="Runs under random faults, compared with an undisturbed one.")
    parser.add_argument("--faults", type=int, default=60, help="how many (60)")
    parser.add_argument("--seed", type=int, default=0, help="of their kinds and times (0)")
    parser.add_argument("--stop", type=float, default=20.0, help="seconds that a stopped worker stays so (20)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        survive(Path(folder), given.faults, given.seed, given.stop, lambda text: print(text, flush=True))


if __name__ == "__main__":
    main()
