"""A run that tells where its sums are: ``python -m tests.cluster.driver OUTPUT ADDRESS OVERRIDES…``.

After every unit, the file ``OUTPUT.where`` names a node whose object store has a sum that waits to be merged.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import ray
import typer
from ray.experimental import get_object_locations

from fisher_ray import pipeline
from fisher_ray.cli.exits import error_exits
from fisher_ray.progress import new_console, show_progress
from fisher_ray.records import Receipt
from fisher_ray.runtime.schedule import Schedule
from tests.integration.runs import digits


def tell(place: Path) -> None:
    """Write the file, or remove it if no sum waits."""
    schedules: list[Any] = [item for item in gc.get_objects() if type(item) is Schedule]
    sums = [refs for item in schedules for refs in item._results.values() if refs]
    results = [ref for refs in sums for ref in refs if isinstance(ref, ray.ObjectRef)]
    found = get_object_locations(results) if results else {}
    nodes = [node for places in found.values() for node in places["node_ids"]]
    if nodes:
        place.write_text(nodes[0])
    else:
        place.unlink(missing_ok=True)


def main() -> None:
    """Run until the linear model is there."""
    output, address, *overrides = sys.argv[1:]
    with error_exits(), show_progress(new_console()) as progress:
        heard = progress.unit_done

        def unit_done(stage: str, receipt: Receipt) -> None:
            heard(stage, receipt)
            tell(Path(f"{output}.where"))

        progress.unit_done = unit_done  # type: ignore[method-assign]
        pipeline.run(digits(Path(output), *overrides), address, until="linear", progress=progress)


if __name__ == "__main__":
    try:
        main()
    except typer.Exit as ended:
        sys.exit(ended.exit_code)
