"""Tests that need a device or a tool are skipped with the reason; FISHER_RAY_REQUIRE=gpu,s3 makes that a failure."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

# Examples are timed by the machine's load as much as by the code.
settings.register_profile("default", deadline=None)
settings.load_profile("default")


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One embedded Ray of two cores for all tests: starting it costs seconds."""
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def _lack_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "no CUDA device"


def _lack_cluster() -> str | None:
    from tests.cluster.hosts import lack

    return lack()


def _lack_s3() -> str | None:
    if importlib.util.find_spec("moto") or shutil.which("swift-proxy-server"):
        return None
    return "no S3 server: neither moto[server] nor swift is installed"


def _lack_browser() -> str | None:
    found = any(shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    return None if found else "no browser: install chromium"


_LACKS = {"gpu": _lack_gpu, "cluster": _lack_cluster, "s3": _lack_s3, "browser": _lack_browser}
_REQUIRED = {name for name in os.environ.get("FISHER_RAY_REQUIRE", "").split(",") if name}


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a script's background; children would too
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if unknown := _REQUIRED - set(_LACKS):
        raise pytest.UsageError(f"FISHER_RAY_REQUIRE names {sorted(unknown)}; known: {sorted(_LACKS)}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    for name, lack in _LACKS.items():
        if item.get_closest_marker(name) is None:
            continue
        if (reason := lack()) is None:
            continue
        if name in _REQUIRED:
            pytest.fail(f"FISHER_RAY_REQUIRE names {name!r}, but: {reason}", pytrace=False)
        pytest.skip(f"{name}: {reason}")
