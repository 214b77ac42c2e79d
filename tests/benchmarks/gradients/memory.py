"""Peak memory of exact gradients beyond their output, over what a plain forward and backward takes.

python -m tests.benchmarks.gradients.memory W1
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

from tests.benchmarks.gradients.methods import exact, plain
from tests.benchmarks.gradients.workloads import workload

PAGE_BYTES = resource.getpagesize()


def main(name: str) -> None:
    """Measure one workload; this process must be new."""
    work = workload(name)
    unit = plain(work)
    for _ in range(2):
        unit()
    before = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES
    run = exact(work)
    for _ in range(3):
        output = run()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    size = output.numel() * output.element_size()
    print(f"{name}: output {size / 1e6:.0f} MB, beyond it {(peak - before - size) / 1e6:.0f} MB")


if __name__ == "__main__":
    main(sys.argv[1])
