"""Ray on hosts of the tests' own, brought up and used as the files in ``cluster/`` say."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.hosts import Network, Running, network
from tests.integration.processes import wait_for

ROOT = Path(__file__).parents[2]
ON_PREMISES = ROOT / "cluster" / "on_premises.yaml"
LAUNCHER, HEAD, WORKER = "launcher", "head", "worker"
DASHBOARD = "127.0.0.1:8265"

HASTE = {
    "RAY_health_check_initial_delay_ms": 1000,
    "RAY_health_check_period_ms": 1000,
    "RAY_health_check_timeout_ms": 2000,
    "RAY_health_check_failure_threshold": 4,
    "RAY_gcs_rpc_server_reconnect_timeout_s": 15,
}
"""How soon Ray's parts take each other for lost: sooner than is wise where networks stutter, for short tests."""


class Cluster:
    """Ray on a head and a worker of one CPU each, and the host from which it is commanded.

    Args:
        hosts: the three.
        login: variables of every login.
    """

    def __init__(self, hosts: Network, login: Mapping[str, str]) -> None:
        self.hosts, self._login = hosts, login
        self.seconds: dict[str, float] = {}
        self._file = str(hosts.folder / ON_PREMISES.name)
        own = {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
        self._environment = hosts.hosts[LAUNCHER].environment(**own)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Take the time of something, and print it."""
        start = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - start
        print(f"{name}: {self.seconds[name]:.1f} s", flush=True)

    def up(self) -> None:
        """Bring Ray up; returns when the worker is in the cluster too."""
        self._run("ray", "get-auth-token", "--generate", timeout_s=60)
        Path(self._file).write_text(yaml.safe_dump(_for_these_hosts(self.hosts, self._login), sort_keys=False))
        with self.step("ray up"):
            self._run("ray", "up", "--yes", self._file, timeout_s=150)
        with self.step("until the worker has joined"):
            self.await_hosts(2)

    def await_hosts(self, count: int) -> None:
        """Return when so many hosts are alive in the cluster."""
        command = "ray list nodes --filter state=ALIVE"

        def there() -> bool:
            return f"Total: {count}\n" in self._run("ray", "exec", self._file, command, timeout_s=60).replace("\r", "")

        wait_for(there, 120, f"{count} hosts in the cluster")

    def submit(self, script: Path, *arguments: str, timeout_s: float) -> str:
        """Run a script through ``ray submit``; returns its output."""
        return self._run("ray", "submit", self._file, str(script), "--", *arguments, timeout_s=timeout_s)

    @contextmanager
    def job(self, folder: Path, *command: str) -> Iterator[Running]:
        """A command started through ``ray job submit``, ``folder`` being its working directory."""
        submit = ["ray", "job", "submit", f"--address=http://{DASHBOARD}", "--working-dir=.", "--", *command]
        with self.hosts.started(LAUNCHER, *submit, cwd=folder, environment=self._environment) as running:
            yield running

    @contextmanager
    def tunnel(self) -> Iterator[None]:
        """The head's dashboard at the same address on the launcher, through ssh."""
        trust = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-i", str(self.hosts.key)]
        forward = ["-v", "-N", "-o", "ExitOnForwardFailure=yes", "-L", f"{DASHBOARD}:{DASHBOARD}"]
        command = ["ssh", *trust, *forward, f"root@{self.hosts.hosts[HEAD].address}"]
        with self.hosts.started(LAUNCHER, *command, environment=self._environment) as running:
            running.until(lambda: "Entering interactive session" in running.so_far(), 30, "the tunnel was open")
            yield

    def down(self) -> None:
        """Take the cluster down; returns when no process of it is left on either host.

        Raises:
            TimeoutError: if some are, with their command lines.
        """
        with self.step("ray down"):
            self._run("ray", "down", "--yes", self._file, timeout_s=90)
        with self.step("until nothing is left"):
            try:
                wait_for(lambda: not self.left(), 150, "the end of Ray's processes")
            except TimeoutError as error:
                raise TimeoutError(f"{error}; left are: {self.left()}") from None

    def left(self) -> dict[str, list[str]]:
        """Command lines of what runs on head and worker, those without any left out."""
        found = {name: list(self.hosts.hosts[name].processes().values()) for name in (HEAD, WORKER)}
        return {name: lines for name, lines in found.items() if lines}

    def _run(self, *command: str, timeout_s: float) -> str:
        with self.hosts.started(LAUNCHER, *command, cwd=ROOT, environment=self._environment) as running:
            return running.wait(timeout_s)


@contextmanager
def cluster(folder: Path, login: Mapping[str, str]) -> Iterator[Cluster]:
    """Hosts that keep all they have in ``folder``, which they share, and Ray, not up yet."""
    visible = [ROOT, Path(sys.prefix), Path(sys.base_prefix)]
    with network(folder, [LAUNCHER, HEAD, WORKER], visible) as hosts:
        yield Cluster(hosts, login)


def _for_these_hosts(hosts: Network, login: Mapping[str, str]) -> dict[str, Any]:
    """Read the cluster's file, and change what a user would and what this machine's packages make needless.

    Each host's environment is a link to that of this process, and the package is imported from where the file puts it.
    """
    config = yaml.safe_load(ON_PREMISES.read_text())
    addresses = {name: hosts.hosts[name].address for name in (HEAD, WORKER)}
    config["provider"] |= {"head_ip": addresses[HEAD], "worker_ips": [addresses[WORKER]]}
    config["auth"] |= {"ssh_user": "root", "ssh_private_key": str(hosts.key)}

    made = [line for line in config["setup_commands"] if "-m venv" in line]
    installed = [line for line in config["setup_commands"] if "pip install" in line]
    (environment,) = re.findall(r"-m venv (~/\S+)", "\n".join(made))
    (package,) = [remote for remote, local in config["file_mounts"].items() if local == "fisher_ray"]
    path = [package.replace("~", "$HOME").rpartition("/")[0], *filter(None, [login.get("PYTHONPATH")])]
    variables = " ".join(f"{name}={value}" for name, value in {**login, **HASTE, "PYTHONPATH": ":".join(path)}.items())
    kept = [line for line in config["setup_commands"] if line not in made + installed]
    link = f"mkdir -p $(dirname {environment}) && ln -sfn {sys.prefix} {environment}"
    config["setup_commands"] = [link, *kept, f"echo 'export {variables}' >> ~/.bashrc"]

    for key, old, new in (
        ("head_start_ray_commands", "--num-cpus=0", "--num-cpus=1"),
        ("worker_start_ray_commands", "ray start ", "ray start --num-cpus=1 "),
    ):
        assert sum(command.count(old) for command in config[key]) == 1, f"{ON_PREMISES}: {key} has no {old!r}"
        config[key] = [command.replace(old, new) for command in config[key]]
    return dict(config)
