"""One library's turn, in a process of its own.

python -m tests.benchmarks.peers.turn LIBRARY WORK_FOLDER EMPTY_FOLDER THREADS
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

from tests.benchmarks.peers.task import Task
from tests.benchmarks.peers.work import OWN, Work, load


def way(library: str) -> Callable[[Work, Task], str]:
    """Return what does the work; only its own library is imported."""
    if library in OWN:
        from tests.benchmarks.peers import own

        return own.in_process if library == OWN[0] else own.on_ray
    from tests.benchmarks.peers import libraries

    found: Callable[[Work, Task], str] = getattr(libraries, library)
    return found


if __name__ == "__main__":
    library, folder, out, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    task = Task(Path(out))
    task.finish(way(library)(load(Path(folder)), task))
