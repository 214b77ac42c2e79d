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
FAULTS_A_RUN = 12
FAULTS = ("worker killed", "node lost", "driver killed", "sums lost", "worker stopped")


@dataclass
class Tally:
    """What was done and what came of it."""

    faults: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)


class Bench:
    """A Ray cluster of a head and two machines of one core, in one process tree."""

    def __init__(self, folder: Path) -> None:
        """Start it."""
        self.folder = folder
        (folder / "slow.py").write_text(SLOW)
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        self.nodes = [self.cluster.add_node(num_cpus=1) for _ in range(2)]

    def start(self, output: Path, *overrides: str) -> subprocess.Popen[bytes]:
        """Start, or start again, a run."""
        command = [
            sys.executable,
            "-m",
            "tests.cluster.driver",
            str(output),
            self.cluster.address,
            *OVERRIDES,
            *overrides,
        ]
        root = str(Path(__file__).parents[2])
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(self.folder), root])}
        with output.with_suffix(".log").open("ab") as log:
            return subprocess.Popen(command, cwd=self.folder, env=environment, stdout=log, stderr=log)

    def workers(self) -> list[int]:
        """The processes of the run's workers."""
        return [pid for pid in descendants(os.getpid()) if _title(pid).startswith("ray::Worker")]

    def strike(
        self, fault: str, driver: subprocess.Popen[bytes], output: Path, chance: random.Random, stop_s: float
    ) -> bool:
        """Let a fault happen; returns whether there was anything for it to happen to."""
        if fault == "driver killed":
            driver.kill()
            driver.wait(30)
        elif fault == "sums lost":
            return self._lose_sums(output)
        elif fault == "node lost":
            self.lose(chance.choice(self.nodes))
            self.add()
        else:
            if not (workers := self.workers()):
                return False
            pid = chance.choice(workers)
            if fault == "worker killed":
                os.kill(pid, signal.SIGKILL)
            else:
                os.kill(pid, signal.SIGSTOP)
                end = time.monotonic() + stop_s
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
            self.lose(holding[0])
            self.add()
        return bool(holding)

    def lose(self, node: Any) -> None:
        """Lose a machine at once."""
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    def add(self) -> None:
        """Have another machine."""
        self.nodes.append(self.cluster.add_node(num_cpus=1))


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


@contextmanager
def bench(folder: Path) -> Iterator[Bench]:
    """A bench that is shut down at the end."""
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    found = Bench(folder)
    try:
        yield found
    finally:
        found.cluster.shutdown()


def run_through(
    at: Bench,
    output: Path,
    faults: list[str],
    chance: random.Random,
    tally: Tally,
    stop_s: float,
    say: Callable[[str], None],
) -> None:
    """Run to the end, with these faults on the way, one every few seconds; those left over stay in the list."""
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
                if not at.strike(fault, driver, output, chance, stop_s):
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


def survive(at: Bench, whole: Path, num_faults: int, seed: int, stop_s: float, say: Callable[[str], None]) -> Tally:
    """Run again and again until so many faults have happened; every run ends with the bytes of ``whole``."""
    chance, tally = random.Random(seed), Tally()
    left = [FAULTS[number % len(FAULTS)] for number in range(num_faults)]
    chance.shuffle(left)
    wanted, number = bits(whole), 0
    assert {name.partition("/")[0] for name in wanted} >= {"metric.zarr", "features", "linear"}
    while left:
        number += 1
        output, faults = at.folder / f"run-{number}", left[:FAULTS_A_RUN]
        run_through(at, output, faults, chance, tally, stop_s, say)
        left = faults + left[FAULTS_A_RUN:]
        found = bits(output)
        assert found == wanted, f"{output} differs: {[name for name in wanted if found.get(name) != wanted[name]]}"
        say(f"run {number}: {tally.seconds[-1]:.1f} s, the same bytes")
        wait_for(lambda: not at.workers(), 60, "the workers' end")
    say(f"{sum(tally.faults.values())} faults in {number} runs: {dict(tally.faults)}; notes: {dict(tally.notes)}")
    return tally


def undisturbed(at: Bench, say: Callable[[str], None]) -> Path:
    """Run without a fault; returns the run folder."""
    output, tally = at.folder / "undisturbed", Tally()
    run_through(at, output, [], random.Random(0), tally, 0.0, say)
    say(f"undisturbed: {tally.seconds[0]:.1f} s")
    return output


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description="Runs under random faults, compared with an undisturbed one.")
    parser.add_argument("--faults", type=int, default=60, help="how many (60)")
    parser.add_argument("--seed", type=int, default=0, help="of their kinds and times (0)")
    parser.add_argument("--stop", type=float, default=20.0, help="seconds that a stopped worker stays so (20)")
    given = parser.parse_args()

    def say(text: str) -> None:
        print(text, flush=True)

    with tempfile.TemporaryDirectory() as folder, bench(Path(folder)) as at:
        start = time.monotonic()
        whole = undisturbed(at, say)
        alone_s = time.monotonic() - start
        tally = survive(at, whole, given.faults, given.seed, given.stop, say)
        say(f"{sum(tally.seconds) - len(tally.seconds) * alone_s:.0f} s more than as many undisturbed runs")


if __name__ == "__main__":
    main()
