"""What a run takes on up to 4,096 workers: ``python -m tests.simulation.scale --output FOLDER``.

Every figure of the simulated world is an option (``--samples-s 2000``); see :class:`costs.Costs`.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, fields
from pathlib import Path

from tests.simulation.scale.costs import Costs
from tests.simulation.scale.running import Found, run_scenario
from tests.simulation.scale.scenarios import growing, troubled, unit_sizes
from tests.simulation.scale.showing import draw, table

WORKERS = (1, 4, 16, 64, 256, 1024, 4096)
LONGEST_S = 20_000.0
"""A pass that would take longer is left out: nobody would wait for it."""


def main() -> None:
    """Run the scenarios, and print and write what they took."""
    parser = argparse.ArgumentParser(description="Runs on simulated workers, and what they take.")
    parser.add_argument("--workers", type=_numbers, default=list(WORKERS))
    parser.add_argument("--rows", type=_numbers, default=[10**8, 10**9])
    parser.add_argument("--unit-rows", type=_numbers, default=[8192, 65536], help="of a unit, for each of --rows")
    parser.add_argument("--growing-only", action="store_true", help="not one size under all kinds of trouble")
    parser.add_argument("--output", type=Path, default=Path("scale"))
    for field in fields(Costs):
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, type=type(field.default), default=field.default)
    given = parser.parse_args()
    costs = Costs(**{field.name: getattr(given, field.name) for field in fields(Costs)})
    lines = [
        scenario
        for rows, unit_rows in zip(given.rows, given.unit_rows, strict=True)
        for scenario in growing(costs, given.workers, rows, unit_rows)
        if scenario.ideal_s < LONGEST_S
    ]
    others = [] if given.growing_only else unit_sizes(costs, given.rows[0], (4096, 16384))
    others += [] if given.growing_only else troubled(costs, given.rows[0], given.unit_rows[0])
    found: list[Found] = []
    given.output.mkdir(parents=True, exist_ok=True)
    for scenario in lines + others:
        one, measured = run_scenario(scenario)
        found.append(one)
        told = " ".join(f"{name}={value:.3g}" for name, value in asdict(measured).items())
        print(f"{table([one]).splitlines()[-1]}  {told}", file=sys.stderr, flush=True)
        document = {"costs": asdict(costs), "found": [asdict(each) for each in found]}
        (given.output / "scale.json").write_text(json.dumps(document, indent=1) + "\n")
    draw(found[: len(lines)], given.output)
    print(table(found))


def _numbers(text: str) -> list[int]:
    return [int(float(item)) for item in text.split(",")]


if __name__ == "__main__":
    main()
