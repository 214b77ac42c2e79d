"""The command as a process: Ctrl-C, a killed driver, and jobs on a Ray cluster of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.job_submission import JobStatus, JobSubmissionClient

from fisher_ray import pipeline
from tests.integration.processes import alive, descendants, free_ports, started, wait_for
from tests.integration.runs import DEMO as DIGITS
from tests.integration.runs import QUICK, bits, digits
from tests.s3_server import KEY, SECRET, S3Server, make_bucket, s3_environment

ROOT = Path(__file__).parents[2]
OVERRIDES = [word for override in QUICK for word in ("--set", override)]
RAY = str(Path(sys.executable).parent / "ray")
DEMO = [sys.executable, "-m", "fisher_ray", "demo"]
LONG = ["--set", "base.steps=1000000"]


SLOW = """
import time
from fisher_ray.models import digits_transform

def transform(image, generator):
    time.sleep(0.004 if generator is None else 0)
    return digits_transform(image, generator)
"""
METRICS: dict[str, str] = {}
"""Where the metrics of a Ray head are, by its address."""


def has_line(path: Path, text: str) -> bool:
    return path.exists() and text in path.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_ends_its_workers_and_exits_with_4(number, tmp_path):
    log = tmp_path / "log"
    command = [*DEMO, "--output", str(tmp_path / "run"), *OVERRIDES, *LONG]
    with log.open("wb") as stream, started(*command, stdout=stream, stderr=stream) as process:
        wait_for(lambda: has_line(log, "base: started"), 90, "the first stage")
        family = descendants(process.pid)
        process.send_signal(number)
        assert process.wait(30) == 4
        wait_for(lambda: not any(map(alive, family)), 30, "the end of Ray's processes")

    assert log.read_text().splitlines()[-1].startswith("error: interrupted before the end. Run the same command")
    assert "Traceback" not in log.read_text()


@pytest.mark.slow
def test_a_killed_driver_resumes_to_the_same_bytes(undisturbed, tmp_path):
    output = tmp_path / "run"
    # A transform that takes its time in the test split, so that the kill falls in the middle of the feature pass.
    (tmp_path / "slow.py").write_text(SLOW)
    command = [*DEMO, "--output", str(output), *OVERRIDES]
    command += ["--set", "data.transform=slow:transform"]
    manifests = output / "features" / "train.zarr" / "manifest"
    with started(*command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: manifests.exists() and any(manifests.glob("unit-*.json")), 120, "a finished unit")
        process.kill()
    assert not (output / "features" / "train.zarr" / "seal.json").exists()

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.syspath_prepend(str(tmp_path))
        pipeline.run(digits(output, "data.transform=slow:transform"), until="features")
    resumed, whole = bits(output), bits(undisturbed[0])
    features = [name for name in resumed if name.endswith("/c/0/0/0")]
    assert len(features) == 2
    assert {name: resumed[name] for name in features} == {name: whole[name] for name in features}


@pytest.fixture(scope="module")
def jobs_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Ray head on loopback with its dashboard, which takes jobs."""
    names = ("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port")
    names += ("dashboard-agent-grpc-port", "metrics-export-port", "runtime-env-agent-port")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    folder = tmp_path_factory.mktemp("ray")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # jobs find `python` where Ray was started
    environment = os.environ | {"PATH": path, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    options = [f"--{name}={port}" for name, port in ports.items()]
    command = [RAY, "start", "--head", "--block", "--num-cpus=2", "--include-dashboard=true", *options]
    log = folder / "log"
    command.append("--node-ip-address=127.0.0.1")
    with (
        log.open("wb") as stream,
        started(*command, stdout=stream, stderr=stream, env=environment),
    ):
        wait_for(lambda: has_line(log, "--block"), 120, "Ray's start")
        address = f"http://127.0.0.1:{ports['dashboard-port']}"
        METRICS[address] = f"http://127.0.0.1:{ports['metrics-export-port']}/metrics"
        yield address


def submit(address: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [RAY, "job", "submit", "--address", address, "--working-dir", "."]
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.run(
        [*command, "--", "python", "jobs/run.py", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory as a clone has it, as far as jobs go."""
    shutil.copytree(ROOT / "jobs", tmp_path / "clone" / "jobs", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "clone"


@pytest.mark.slow
def test_a_submitted_job_runs_the_pipeline(jobs_address, folder, tmp_path):
    output = tmp_path / "run"
    done = submit(jobs_address, folder, "--config", "jobs/configs/digits.yaml", "--output", str(output), *OVERRIDES)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCEEDED" in done.stdout + done.stderr or "succeeded" in done.stdout + done.stderr
    results = json.loads((output / "report" / "results.json").read_text())
    assert results["accuracy"]["fisher_linear"] >= results["accuracy"]["base"] + 0.03
    assert "linear model on Fisher features" in done.stdout


@pytest.mark.slow
def test_a_job_with_a_wrong_key_fails_and_its_log_ends_with_the_error(jobs_address, folder):
    done = submit(jobs_address, folder, "--config", "jobs/configs/digits.yaml", "--set", "metric.rnk=3")

    assert done.returncode != 0
    assert "failed" in (done.stdout + done.stderr).lower()
    assert "error: unknown key 'metric.rnk'; did you mean 'rank'?" in done.stdout


@pytest.mark.slow
def test_a_stopped_job_ends_within_seconds_and_the_same_job_resumes(jobs_address, folder, tmp_path):
    client = JobSubmissionClient(jobs_address)
    (folder / "slow.py").write_text(SLOW)
    arguments = ["--config", "jobs/configs/digits.yaml", "--output", str(tmp_path / "run"), *OVERRIDES]
    arguments += ["--set", "data.transform=slow:transform"]
    command = f"python jobs/run.py {' '.join(arguments)}"
    job = client.submit_job(entrypoint=command, runtime_env={"working_dir": str(folder)})
    manifests = tmp_path / "run" / "features" / "train.zarr" / "manifest"
    wait_for(lambda: manifests.exists() and any(manifests.glob("unit-*.json")), 120, "a finished unit")
    start = time.monotonic()
    client.stop_job(job)
    wait_for(lambda: client.get_job_status(job).is_terminal(), 30, "the job's end")
    assert client.get_job_status(job) == JobStatus.STOPPED
    wait_for(lambda: not (tmp_path / "run" / "claim.json").exists(), 10, "the claim's end")
    assert time.monotonic() - start < 10
    assert "error: interrupted before the end. Run the same command again to resume." in client.get_job_logs(job)

    done = submit(jobs_address, folder, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "base: done before" in done.stdout
    assert "units are there already" in done.stdout


@pytest.mark.slow
def test_prometheus_gets_what_the_workers_have_done(jobs_address, folder, tmp_path):
    (folder / "slow.py").write_text(SLOW)
    arguments = ["--config", "jobs/configs/digits.yaml", "--output", str(tmp_path / "run"), *OVERRIDES]
    arguments += ["--set", "data.transform=slow:transform"]
    client = JobSubmissionClient(jobs_address)
    command = f"python jobs/run.py {' '.join(arguments)}"
    job = client.submit_job(entrypoint=command, runtime_env={"working_dir": str(folder)})
    wanted = {"samples_total", "units_total", "written_bytes_total", "seconds_total", "waiting_units", "workers"}
    wait_for(lambda: wanted <= metrics(jobs_address), 180, "the metrics")
    client.stop_job(job)


def metrics(address: str) -> set[str]:
    """The names of this program's metrics at the endpoint of the only machine."""
    with urllib.request.urlopen(METRICS[address], timeout=10) as answer:
        return set(re.findall(r"^ray_fisher_ray_(\w+?)\{", answer.read().decode(), re.MULTILINE))


@pytest.mark.slow
@pytest.mark.s3
def test_features_written_to_s3_are_the_bytes_of_local_ones(undisturbed, tmp_path):
    import s3fs

    command = [sys.executable, "-m", "fisher_ray", "write-features", str(DIGITS)]
    server = S3Server()
    try:
        url = make_bucket(server.endpoint, "runs") + "/digits"
        log = tmp_path / "log"
        with (
            log.open("wb") as stream,
            started(
                *command,
                "--output",
                url,
                *OVERRIDES,
                stdout=stream,
                stderr=stream,
                env=os.environ | s3_environment(server.endpoint),
            ) as process,
        ):
            assert process.wait(240) == 0, log.read_text()
        files = s3fs.S3FileSystem(key=KEY, secret=SECRET, endpoint_url=server.endpoint)
        files.get(url, str(tmp_path / "copy"), recursive=True)
    finally:
        server.kill()

    copied, whole = bits(tmp_path / "copy"), bits(undisturbed[0])
    assert copied == {name: whole[name] for name in copied}
    assert {name.partition("/")[0] for name in copied} == {"base", "basis.zarr", "metric.zarr", "features"}
    everything = [path.read_bytes() for path in (tmp_path / "copy").rglob("*") if path.is_file()]
    assert not any(SECRET.encode() in content for content in [*everything, log.read_bytes()])
