"""The CIFAR-10 job with its data and its run folder on S3, beside the same job on the disk.

    python -m tests.benchmarks.object_storage [--data FOLDER] [--rows 25000] [--steps 1800]

A server on loopback holds everything. Prints each job's seconds by stage and accuracies, whether both left the same
bytes, and what ``fisher-ray verify`` says of the stores on S3.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.integration.runs import bits
from tests.s3_server import KEY, SECRET, S3Server, make_bucket, s3_environment


def job(config: str, data: str, output: str, overrides: list[str], environment: dict[str, str]) -> None:
    """Run the job to its end."""
    words = [sys.executable, "-m", "fisher_ray", "run", config, "--output", output, "--quiet"]
    for override in (f"data.root={data}", *overrides):
        words += ["--set", override]
    start = time.monotonic()
    subprocess.run(words, env=os.environ | environment, check=True)
    print(f"{output.partition('://')[0]}: {time.monotonic() - start:.0f} s", flush=True)


def tell(document: str) -> None:
    """Print seconds and accuracies of a job's results."""
    results: dict[str, Any] = json.loads(document)
    print(json.dumps({"seconds": results["seconds"], "accuracy": results["accuracy"]}), flush=True)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description="The CIFAR-10 job on S3 beside the disk.")
    parser.add_argument("--data", default="../shared/data/cifar10", help="folder of CIFAR-10's Parquet files")
    parser.add_argument("--config", default="jobs/configs/cifar10.yaml")
    parser.add_argument("--rows", type=int, default=25_000, help="of the half that the features are of")
    parser.add_argument("--steps", type=int, default=1800, help="of the base network")
    given = parser.parse_args()
    overrides = [f"data.shallow.rows=[25000, {25_000 + given.rows}]", f"base.steps={given.steps}", "trained_on=null"]
    import s3fs

    server = S3Server()
    try:
        environment, bucket = s3_environment(server.endpoint), make_bucket(server.endpoint, "cifar10")
        files = s3fs.S3FileSystem(key=KEY, secret=SECRET, endpoint_url=server.endpoint, use_listings_cache=False)
        for path in sorted(Path(given.data).glob("*.parquet")):
            files.put_file(str(path), f"{bucket}/data/{path.name}")
        with tempfile.TemporaryDirectory() as name:
            job(given.config, f"{bucket}/data", f"{bucket}/run", overrides, environment)
            tell(files.cat_file(f"{bucket}/run/report/results.json").decode())
            verify = [sys.executable, "-m", "fisher_ray", "verify", f"{bucket}/run"]
            found = subprocess.run(verify, env=os.environ | environment, capture_output=True, text=True, check=False)
            print(f"verify: exit code {found.returncode}; {found.stdout.strip().splitlines()[-1:]}", flush=True)
            files.get(f"{bucket}/run", f"{name}/s3", recursive=True)
            job(given.config, str(Path(given.data).resolve()), f"{name}/disk", overrides, {})
            tell(Path(name, "disk", "report", "results.json").read_text())
            remote, local = bits(Path(name, "s3")), bits(Path(name, "disk"))
            print(f"{len(local)} files, {'the same bytes' if remote == local else 'NOT the same bytes'}")
            shutil.rmtree(Path(name, "s3"))
    finally:
        server.kill()


if __name__ == "__main__":
    main()
