"""Look for a schedule of events that breaks an invariant: ``python -m tests.simulation --seeds 10000 [--first N]``."""

from __future__ import annotations

import argparse
import sys
import time

from tests.simulation.exploration import explore
from tests.simulation.invariants import BrokenError


def main() -> int:
    """Run every seed, and name those that break something."""
    parser = argparse.ArgumentParser(description="Runs under random trouble, on simulated workers.")
    parser.add_argument("--seeds", type=int, default=1000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("-v", "--verbose", action="store_true", help="print what happens")
    given = parser.parse_args()
    start, num_broken, num_events = time.perf_counter(), 0, 0
    for seed in range(given.first, given.first + given.seeds):
        try:
            events = explore(seed)
        except BrokenError as error:
            events, num_broken = error.events, num_broken + 1  # type: ignore[attr-defined]
            print(f"seed {seed}: {error}\n  python -m tests.simulation --first {seed} --seeds 1 -v", flush=True)
        num_events += len(events)
        if given.verbose:
            print("\n".join(events))
    seconds = time.perf_counter() - start
    print(f"{given.seeds} seeds, {num_events} events, {num_broken} broken")
    print(f"{seconds:.1f} s", file=sys.stderr)
    return 1 if num_broken else 0


if __name__ == "__main__":
    sys.exit(main())
