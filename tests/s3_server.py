"""An S3 server on loopback, for tests marked ``s3``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

KEY, SECRET = "testing-key", "testing-secret"


class S3Server:
    """moto's server in a process of its own; ``kill`` takes it away."""

    def __init__(self) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
        memory = {**os.environ, "MOTO_S3_DEFAULT_KEY_BUFFER_SIZE": str(2**26)}  # larger objects lie in files
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=memory
        )
        watchdog = threading.Timer(60, self.process.kill)
        watchdog.start()
        self.endpoint = self._endpoint()
        watchdog.cancel()
        # else the server stops when the pipe is full
        self._drain = threading.Thread(target=self.process.stderr.read, daemon=True)
        self._drain.start()

    def _endpoint(self) -> str:
        for line in self.process.stderr:
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                return found[0]
        raise RuntimeError("moto's server ended before it listened")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._drain.join()
        self.process.stderr.close()


def s3_environment(endpoint: str) -> dict[str, str]:
    """What a process needs that is to use the server."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def set_environment(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_environment(endpoint).items():
        monkeypatch.setenv(name, value)


def make_bucket(endpoint: str, name: str) -> str:
    import s3fs

    files = s3fs.S3FileSystem(key=KEY, secret=SECRET, endpoint_url=endpoint)
    if not files.exists(name):
        files.mkdir(name)
    return f"s3://{name}"


@pytest.fixture(scope="module")
def s3_server() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.kill()


@pytest.fixture
def s3_url(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    set_environment(monkeypatch, s3_server.endpoint)
    bucket = make_bucket(s3_server.endpoint, "bucket")
    return f"{bucket}/{re.sub('[^a-z0-9]', '-', request.node.name.lower())}"
