"""A command's wall time, and the most memory that it and all that it starts hold at one time."""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil

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
            held = 0
            for one in _family(process.pid):
                with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):  # which has just ended
                    times = one.cpu_times()
                    cpu[one.pid] = times.user + times.system
                    held += one.memory_full_info().pss
            peak = max(peak, held)

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


def _family(pid: int) -> list[psutil.Process]:
    """Return a process and all that it started, if it is still there."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    return []
