"""A run on two hosts, launched from ``cluster/on_premises.yaml``, and again with a link cut in the middle.

``python -m tests.cluster.two_hosts --data FOLDER`` does so with ``jobs/configs/cifar10.yaml``, 4,000 rows of CIFAR-10.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.cluster.hosts import Running, lack
from tests.cluster.launcher import HEAD, ROOT, WORKER, Cluster, cluster
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
    "trained_on=null",
    "linear.views=1",
)
COUNTED = """
import socket
import time
from pathlib import Path
from {module} import {name} as inner

READ = Path({folder!r}, socket.gethostname())

def transform(image, generator):
    with READ.open("ab") as file:
        file.write(b".")
    time.sleep({pause_s} if generator is None else 0)
    return inner(image, generator)
"""
"""Counts what each host has read."""
MIDDLES = {"metric": "sums/metric/*/*.zarr/seal.json", "features": "features/train.zarr/manifest/unit-*.json"}
"""What has come to be in the run folder when the middle of a pass is reached."""
RUN_S = 200.0


def exercise(
    folder: Path, config: str, transform: str, pause_s: float, overrides: Sequence[str], during: str = "features"
) -> Cluster:
    """Bring two hosts up, run through ``ray submit``, again as a job whose other host is cut off, and take them down.

    Args:
        folder: empty; for everything.
        config: a configuration in the clone, by its path there.
        transform: its ``data.transform``.
        pause_s: for each clean sample, so that there is a middle.
        overrides: of its keys, without blanks or quotes, which ``ray submit`` does not keep from the shell.
        during: the pass in which the link is cut, of :data:`MIDDLES`.

    Returns:
        The cluster, with the seconds of each step.

    Raises:
        AssertionError: if the run whose link was cut has other bytes than the one that nothing befell.
    """
    hosts, work, read = folder / "hosts", folder / "hosts" / "clone", folder / "hosts" / "read"
    shutil.copytree(ROOT / "jobs", work / "jobs", ignore=shutil.ignore_patterns("__pycache__"))
    read.mkdir()
    module, _, name = transform.partition(":")
    counted = COUNTED.format(module=module, name=name, folder=str(read), pause_s=pause_s)
    (work / "counted.py").write_text(counted)
    keys = ("data.transform=counted:transform", "runtime.num_workers=2", *overrides)
    options = [word for override in keys for word in ("--set", override)]
    whole, cut = hosts / "whole", hosts / "cut"
    with cluster(hosts, {"PYTHONPATH": str(work)}) as found:
        found.up()
        with found.step("a run through ray submit"):
            arguments = ["--config", str(work / config), "--address", "auto", "--output", str(whole), *options]
            found.submit(work / "jobs" / "run.py", *arguments, timeout_s=RUN_S)
        command = ["python", "jobs/run.py", "--config", config, "--output", str(cut), *options]
        with found.tunnel(), found.job(work, *command) as job:
            with found.step("a job until its link is cut"):
                _await_middle(job, cut, MIDDLES[during], read / WORKER)
            with found.step("from there to its end"):
                found.hosts.cut(WORKER)
                job.wait(RUN_S)
        with found.step("until the host is back in the cluster"):
            found.hosts.join(WORKER)
            found.await_hosts(2)
        found.down()
    assert workers_of(whole) == workers_of(cut) == {HEAD, WORKER}
    notes = [line.get("text", "") for line in events(cut)]
    assert [note for note in notes if note.startswith(f"lost the worker on {WORKER} ")], notes
    assert bits(cut) == bits(whole)
    return found


def _await_middle(job: Running, output: Path, sign: str, read: Path) -> None:
    """Wait until the sign is in the run folder, and the host that counts in ``read`` reads on."""
    job.until(lambda: any(output.glob(sign)), RUN_S, f"there was {sign}")
    before = read.stat().st_size
    job.until(lambda: read.stat().st_size > before, 30, f"{read.name} had read more")


def events(output: Path) -> list[dict[str, Any]]:
    """A run's events."""
    return [json.loads(line) for line in (output / "events.jsonl").read_text().splitlines()]


def workers_of(output: Path) -> set[str]:
    """The hosts whose workers have finished units of a run."""
    return {line["worker"].split()[0] for line in events(output) if line["event"] == "unit done"}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description="CIFAR-10 on two hosts in network namespaces.")
    parser.add_argument("--data", required=True, help="folder with train-*.parquet and test-*.parquet")
    parser.add_argument("--during", choices=MIDDLES, default="features", help="pass in which the link is cut")
    given = parser.parse_args()
    if reason := lack():
        parser.error(reason)
    with tempfile.TemporaryDirectory() as folder:
        overrides = (f"data.root={Path(given.data).resolve()}", *CIFAR10)
        transform = "fisher_ray.models:paper_transform"
        exercise(Path(folder), "jobs/configs/cifar10.yaml", transform, 0.0, overrides, given.during)


if __name__ == "__main__":
    main()
