"""A command's wall time, and the most memory that it and all that it starts hold at one time."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SAMPLE_S = 0.25


@dataclass(frozen=True)
class Watched:
    """What a command took.

    Attributes:
        seconds: from its start to its end.
        cpu_seconds: of all its processes, as far as samples tell.
        peak_bytes: the largest sum, over its processes, of resident memory, of shared pages each process's part.
        output: what it printed.
        error: what it printed as errors.
        code: its exit status.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    output: str
    error: str
    code: int


def watch(command: Sequence[str], environment: Mapping[str, str], timeout_s: float) -> Watched:
    """Run a command to its end, and sample its processes' memory meanwhile."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command, env=dict(environment), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    peak, cpu, over = 0, dict[int, float](), threading.Event()

    def sample() -> None:
        nonlocal peak
        while not over.wait(SAMPLE_S):
            running = _with_children(process.pid)
            for pid in running:
                cpu[pid] = max(cpu.get(pid, 0.0), _cpu_seconds(pid))  # zero of one that has just ended
            peak = max(peak, sum(map(_resident_bytes, running)))

    sampling = threading.Thread(target=sample, daemon=True)
    sampling.start()
    try:
        output, error = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        output, error = process.communicate()
        error += f"\nended after {timeout_s} s"
    seconds = time.perf_counter() - start
    over.set()
    sampling.join()
    return Watched(seconds, sum(cpu.values()), peak, output, error, process.returncode)


def _with_children(pid: int) -> list[int]:
    parents = {}
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(place.name)] = int((place / "stat").read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for each in found:  # which grows meanwhile
        found += [child for child, parent in parents.items() if parent == each]
    return found


def _resident_bytes(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def _cpu_seconds(pid: int) -> float:
    with contextlib.suppress(OSError):
        parts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(parts[11]) + int(parts[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0
