"""The connection to Ray: a cluster by its address, or one inside this process."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from typing import Any

import ray
import ray.exceptions

from fisher_ray.errors import ConfigError, WorkersLostError

KNOCK_S = 5.0
"""How long a cluster's head may take to accept a connection."""
MALLOC = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {"arena_max": 1, "mmap_max": 0, "trim_threshold": 2**34, "top_pad": 2**28}.items()
)
"""Keeps glibc from giving memory back: on many machines a fresh page costs as much as the arithmetic in it. One arena,
since a worker's threads take turns."""


class Session:
    """Connects when first asked to, and ends only what it has started.

    Args:
        address: of a cluster (``host:port`` or ``auto``); by default ``RAY_ADDRESS``, else Ray is started here.
    """

    def __init__(self, address: str | None = None) -> None:
        """See the class.

        Raises:
            ConfigError: if the address is of a kind that cannot be used.
        """
        self._asked = address
        self._address = address or os.environ.get("RAY_ADDRESS")
        self._own = False
        if (self._address or "").startswith(("ray://", "http://", "https://")):
            raise ConfigError(
                f"--address {self._address!r} is not a cluster's own address (host:port or auto). From outside the "
                "cluster submit a job: ray job submit --working-dir . -- python jobs/run.py --config CONFIG"
            )

    @property
    def embedded(self) -> bool:
        """Whether Ray runs, or would run, inside this process alone."""
        return self._address in (None, "local")

    def connect(self) -> None:
        """Connect, unless this process is connected already.

        Raises:
            ConfigError: if it is connected to another cluster than ``address``.
            WorkersLostError: if no cluster answers at the address.
        """
        if ray.is_initialized():
            self._require_same()
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # a failed unit's arrays are never asked for
        with _own_sigterm():
            self._init()
        self._own = True

    def _init(self) -> None:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if self.embedded:
            ray.init(address="local", include_dashboard=False, **quiet)
        else:
            self._knock()
            try:
                ray.init(address=self._address, **quiet)
            except ValueError as error:
                raise ConfigError(
                    f"--address {self._address!r} is no address: {error}. Give host:port or auto."
                ) from error
            except (ConnectionError, ray.exceptions.RaySystemError, TimeoutError) as error:
                raise WorkersLostError(
                    f"no Ray cluster answers at {self._address!r}: {error}. Start it, correct --address or "
                    "RAY_ADDRESS, or leave both out to run in this process."
                ) from error

    def _require_same(self) -> None:
        """Refuse to run elsewhere than was asked, where this process is connected already."""
        host, colon, port = (self._asked or "").rpartition(":")
        if not (colon and port.isdigit()):
            return
        self._knock()
        connected = ray.get_runtime_context().gcs_address
        its_host, _, its_port = connected.rpartition(":")
        if port != its_port or _numeric(host) != _numeric(its_host):
            raise ConfigError(
                f"--address {self._asked!r} is not the cluster that this process is connected to, {connected}. Leave "
                "the address out, or call ray.shutdown() first."
            )

    def _knock(self) -> None:
        """Refuse an address that nobody listens at; Ray itself would wait for minutes."""
        host, colon, port = (self._address or "").rpartition(":")
        if not (colon and port.isdigit()):
            return
        try:
            socket.create_connection((host.strip("[]"), int(port)), KNOCK_S).close()
        except (OSError, OverflowError, UnicodeError) as error:
            raise WorkersLostError(
                f"nobody listens at {self._address!r}: {error}. Start the cluster, correct --address or RAY_ADDRESS, "
                "or leave both out to run in this process."
            ) from error

    def close(self) -> None:
        """Disconnect, or end the embedded Ray."""
        if self._own:
            ray.shutdown()
            self._own = False

    def worker_environment(self) -> dict[str, str]:
        """Return the environment variables that every worker process needs from its start."""
        found = {"GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", MALLOC)}
        if self.embedded:  # in a job, Ray puts the job's working directory there by itself
            parts = [os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])]
            found["PYTHONPATH"] = os.pathsep.join(parts)
        return found


def _numeric(host: str) -> str:
    """Return a host's address, that of this machine for a loopback one, or its name where it has none."""
    try:
        found = str(socket.getaddrinfo(host.strip("[]"), None)[0][4][0])
    except (OSError, UnicodeError):
        return host
    if ip_address(found).is_loopback:
        return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
    return found


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Put the process's handler of SIGTERM back: Ray's ends the process by an abort, with its workers left behind."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if callable(before) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)
