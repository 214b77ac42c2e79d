"""A run on two hosts, launched from ``cluster/on_premises.yaml``, and again with a link cut in the middle.

``python -m tests.cluster.two_hosts --data FOLDER`` does so with ``jobs/configs/cifar10.yaml``, 4,000 rows of CIFAR-10.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from tests.cluster.launcher import ROOT, WORKER, Cluster, cluster
from tests.integration.processes import wait_for
from tests.integration.runs import bits

CIFAR10 = (
    "data.train.rows=[0,5000]",
    "data.shallow.rows=[25000,27000]",
    "data.test.rows=[0,2000]",
    "base.steps=200",
    "compression.dim=512",
    "metric.rank=128",
    "metric.fraction=1.0",
    "store.chunk_rows=128",
    "runtime.unit_rows=128",
    "runtime.num_workers=2",
    "trained_on=null",
    "linear.views=1",
)
"""Without blanks or quotes, which ``ray submit`` does not keep from the shell."""
RUN_S = 240.0


def exercise(folder: Path, config: str, overrides: tuple[str, ...], modules: dict[str, str]) -> Cluster:
    """Bring two hosts up, run twice, and take them down.

    Args:
        folder: empty; for everything.
        config: a configuration in the clone, by its path there.
        overrides: of its keys.
        modules: sources of modules that the configuration names, by name.

    Returns:
        The cluster, with the seconds of each step.

    Raises:
        AssertionError: if the run whose link was cut has other bytes than the one that nothing befell.
    """
    work = folder / "hosts" / "clone"
    shutil.copytree(ROOT / "jobs", work / "jobs", ignore=shutil.ignore_patterns("__pycache__"))
    for name, source in modules.items():
        (work / f"{name}.py").write_text(source)
    options = [word for override in overrides for word in ("--set", override)]
    whole, cut = folder / "hosts" / "whole", folder / "hosts" / "cut"
    with cluster(folder / "hosts", {"PYTHONPATH": str(work)}) as found:
        found.up()
        arguments = ["--config", str(work / config), "--address", "auto", "--output", str(whole)]
        with found.step("a run through ray submit"):
            found.submit(work / "jobs/run.py", *arguments, *options, timeout_s=RUN_S)
        command = ["python", "jobs/run.py", "--config", config, "--output", str(cut), *options]
        with found.tunnel(), found.step("a job whose link is cut"), found.job(work, *command) as job:
            manifests = cut / "features" / "train.zarr" / "manifest"
            wait_for(lambda: any(manifests.glob("unit-*.json")) or job.process.poll() is not None, RUN_S, "a unit")
            found.hosts.cut(WORKER)
            job.wait(RUN_S)
        found.hosts.join(WORKER)
        found.down()
    assert bits(cut) == bits(whole)
    notes = [json.loads(line).get("text", "") for line in (cut / "events.jsonl").read_text().splitlines()]
    assert [note for note in notes if note.startswith(f"lost the worker on {WORKER} ")], notes
    return found


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description="CIFAR-10 on two hosts in network namespaces.")
    parser.add_argument("--data", required=True, help="folder with train-*.parquet and test-*.parquet")
    data = Path(parser.parse_args().data).resolve()
    with tempfile.TemporaryDirectory() as folder:
        exercise(Path(folder), "jobs/configs/cifar10.yaml", (f"data.root={data}", *CIFAR10), {})


if __name__ == "__main__":
    main()
