"""Peak memory of exact gradients beyond their output, over what a plain forward and backward takes.

python -m tests.benchmarks.gradients.memory W1
"""

from __future__ import annotations

import sys

from tests.benchmarks.gradients.methods import exact, plain
from tests.benchmarks.gradients.workloads import workload
from tests.benchmarks.process import memory


def main(name: str) -> None:
    """Measure one workload; this process must be new."""
    work = workload(name)
    unit = plain(work)
    for _ in range(2):
        unit()
    before = memory("VmRSS")
    run = exact(work)
    for _ in range(3):
        output = run()
    peak = memory("VmHWM")
    size = output.numel() * output.element_size()
    print(f"{name}: output {size / 1e6:.0f} MB, beyond it {(peak - before - size) / 1e6:.0f} MB")


if __name__ == "__main__":
    main(sys.argv[1])
