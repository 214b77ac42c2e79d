"""A process that is connected to one cluster is not asked for another in silence."""

from __future__ import annotations

import socket

import pytest
import ray

from fisher_ray.errors import ConfigError, WorkersLostError
from fisher_ray.runtime.session import Session

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]


@pytest.mark.parametrize("host", [None, "127.0.0.1", "localhost"])
def test_the_address_of_the_cluster_that_it_is_connected_to_is_right(host):
    own_host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")

    Session(f"{host or own_host}:{port}").connect()

    assert ray.is_initialized()


def test_another_cluster_than_the_one_that_it_is_connected_to_is_refused():
    with (
        socket.create_server(("127.0.0.1", 0)) as another,
        pytest.raises(ConfigError, match="is not the cluster that this process is connected to"),
    ):
        Session(f"127.0.0.1:{another.getsockname()[1]}").connect()


def test_an_address_that_nobody_listens_at_is_refused_though_it_is_connected():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    with pytest.raises(WorkersLostError, match="nobody listens"):
        Session(f"127.0.0.1:{port}").connect()


@pytest.mark.parametrize("address", [None, "auto", "local"])
def test_no_address_of_one_cluster_means_the_one_that_it_is_connected_to(address):
    Session(address).connect()

    assert ray.is_initialized()


def test_a_loopback_address_is_this_machines_and_no_others(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        context = type("Context", (), {"gcs_address": f"192.0.2.7:{port}"})
        monkeypatch.setattr(ray, "get_runtime_context", context)
        with pytest.raises(ConfigError, match=rf"connected to, 192\.0\.2\.7:{port}"):
            Session(f"localhost:{port}").connect()


@pytest.mark.parametrize("host", ["a..b", "x" * 70])
def test_a_host_that_cannot_be_one_is_told(host):
    with pytest.raises(WorkersLostError, match="nobody listens"):
        Session(f"{host}:6379").connect()
