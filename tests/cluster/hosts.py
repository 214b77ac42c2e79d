"""Hosts made of namespaces: each has processes, network, /tmp, /dev/shm, home and names of its own, and an sshd.

They share the machine's other files. Nothing of them has a name on the machine itself, so that several sets of hosts do
not meet, and the kernel removes them with their first process, which dies with the one that made them.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.integration.processes import alive, descendants, started, wait_for

SUBNET = "10.86.0"
START_S = 20.0
_NUMBERS = itertools.count(1)
PATH = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
TOOLS = ("ip", "mount", "nsenter", "rsync", "setpriv", "ssh", "ssh-keygen", "sshd", "unshare")

_BOOT = """
set -eu
hostname "$NAME"
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount --rbind /tmp /mnt
mount -t tmpfs -o mode=1777 tmpfs /tmp
for path in "$@"; do
  mkdir -p "$path"
  mount --rbind "/mnt/${path#/tmp/}" "$path"
done
umount --recursive --lazy /mnt
resolv=$(readlink -m /etc/resolv.conf)  # often a link to somewhere below /run
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs -o mode=755 tmpfs /var/log
mkdir -p /run/sshd "$(dirname "$resolv")"
: >/run/utmp >/var/log/lastlog
[ -e "$resolv" ] || : >"$resolv"
mount --bind "$FOLDER/etc/resolv.conf" "$resolv"
for name in hosts passwd shadow; do mount --bind "$FOLDER/etc/$name" "/etc/$name"; done
ip link set lo up
exec "$(command -v sshd)" -D -e -f "$FOLDER/etc/sshd_config"
"""
"""Where nothing else is bound, /tmp is empty: Ray, ssh and the autoscaler keep state under fixed names there."""

_SSHD = """
AuthorizedKeysFile {key}.pub
HostKey {folder}/etc/host_key
PasswordAuthentication no
PermitRootLogin yes
PidFile none
StrictModes no
UseDNS no
UsePAM no
"""


class CommandError(Exception):
    """A command on a host failed or took too long; the message holds its output and the hosts' logs."""


@dataclass(frozen=True)
class Host:
    """One host, while it is up.

    Attributes:
        name: its own and the others' name for it.
        address: of its one link.
        folder: what it keeps, seen from the machine.
        process: what ends it when killed.
        pid: its first process, seen from the machine.
    """

    name: str
    address: str
    folder: Path
    process: subprocess.Popen[bytes]
    pid: int

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def command(self, *command: str, cwd: Path | None = None) -> list[str]:
        """What to start on the machine so that ``command`` runs on this host."""
        spaces = ["--mount", "--net", "--uts", "--ipc", "--pid"]
        return ["nsenter", f"--target={self.pid}", *spaces, "env", f"--chdir={cwd or self.home}", *command]

    def environment(self, **more: str) -> dict[str, str]:
        """Variables as after a login, and ``more``; nothing of this process's own."""
        return {"HOME": str(self.home), "PATH": PATH, "TERM": "dumb", "LANG": "C.UTF-8", **more}

    def processes(self) -> dict[int, str]:
        """Command lines of what runs here besides sshd and its shells, by process id on the machine."""
        found = {}
        own = os.readlink(f"/proc/{self.pid}/ns/pid")
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and os.readlink(entry / "ns" / "pid") == own and alive(int(entry.name)):
                    found[int(entry.name)] = entry.joinpath("cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue  # it ended meanwhile, or is not ours to look at
        return {pid: line for pid, line in found.items() if not line.startswith(("sshd:", "/usr/sbin/sshd "))}

    def logs(self, lines: int = 15) -> str:
        """The ends of the host's logs: its sshd's, and those of Ray's parts that start and watch others."""
        sessions = sorted(Path(f"/proc/{self.pid}/root/tmp/ray").glob("session_2*"))  # session_latest leads elsewhere
        names = ("monitor.out", "monitor.log", "monitor.err", "gcs_server.out", "raylet.out", "raylet.err")
        paths = [session / "logs" / name for session in sessions[-1:] for name in names]
        return "\n".join(tail(path, lines) for path in (self.folder / "log", *paths) if path.exists())


@dataclass(frozen=True)
class Running:
    """A command on one of the hosts.

    Attributes:
        text: the command.
        process: on the machine.
        output: where it writes.
        network: the hosts.
    """

    text: str
    process: subprocess.Popen[bytes]
    output: Path
    network: Network

    def wait(self, timeout_s: float) -> str:
        """Wait for its end.

        Returns:
            Its output.

        Raises:
            CommandError: if it fails, or is not done in time.
        """
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise CommandError(self.told(f"not done within {timeout_s} s")) from None
        if code:
            raise CommandError(self.told(f"exit code {code}"))
        return self.so_far()

    def until(self, condition: Callable[[], Any], deadline_s: float, what: str) -> None:
        """Wait for a condition that comes true while this runs.

        Raises:
            CommandError: if it ends before, or it is not true in time.
        """

        def true_or_ended() -> bool:
            return bool(condition()) or self.process.poll() is not None

        try:
            wait_for(true_or_ended, deadline_s, what)
        except TimeoutError as error:
            raise CommandError(self.told(str(error))) from None
        if not condition():
            raise CommandError(self.told(f"ended before {what}"))

    def so_far(self) -> str:
        """What it has written."""
        return self.output.read_text(errors="replace")

    def told(self, what: str) -> str:
        """Say what happened to it, with the ends of its output and of the hosts' logs."""
        logs = [f"-- on {name}\n{host.logs()}" for name, host in self.network.hosts.items()]
        return "\n".join([f"{self.text}: {what}", *logs, tail(self.output, 60)])


@dataclass(frozen=True)
class Network:
    """Hosts on one switch, which stands beside the first.

    Attributes:
        folder: theirs; every host sees it.
        key: private key that all of them let in.
        hosts: by name, the first one at the switch.
    """

    folder: Path
    key: Path
    hosts: Mapping[str, Host]

    @contextmanager
    def started(
        self, host: str, *command: str, cwd: Path | None = None, environment: Mapping[str, str]
    ) -> Iterator[Running]:
        """A command on a host, which is killed when the context ends."""
        output = self.folder / f"output-{next(_NUMBERS)}"
        inside = self.hosts[host].command(*command, cwd=cwd)
        with output.open("wb") as stream:
            options = {"stdin": subprocess.DEVNULL, "stdout": stream, "stderr": stream, "env": environment}
            with started(*inside, **options) as process:
                yield Running(f"{' '.join(command)} (on {host})", process, output, self)

    def cut(self, name: str) -> None:
        """Take a host's link down at the switch: the host itself sees no more than packets that do not come."""
        self._at_switch("link", "set", name, "down")

    def join(self, name: str) -> None:
        """Take a host's link up again."""
        self._at_switch("link", "set", name, "up")

    def _at_switch(self, *arguments: str) -> None:
        _ip(next(iter(self.hosts.values())).pid, *arguments)


@contextmanager
def network(folder: Path, names: Sequence[str], visible: Sequence[Path]) -> Iterator[Network]:
    """Hosts with these names, a first one to give commands from and others to obey, until the context ends.

    Args:
        folder: for all that they keep; each sees it under the same path.
        names: of the hosts.
        visible: what else they are to see of the machine's /tmp, as far as it is there.
    """
    key = folder / "key"
    _keygen(key)
    hosts: dict[str, Host] = {}
    try:
        for number, name in enumerate(names, 1):
            hosts[name] = _boot(folder / name, name, f"{SUBNET}.{number}", names, key, [folder, *visible])
        _connect(list(hosts.values()))
        yield Network(folder, key, hosts)
    finally:
        for host in hosts.values():
            _end(host.process)


def _boot(folder: Path, name: str, address: str, names: Sequence[str], key: Path, visible: Sequence[Path]) -> Host:
    etc = folder / "etc"
    etc.mkdir(parents=True)
    (folder / "home").mkdir(mode=0o700)
    _keygen(etc / "host_key")
    known = [f"{SUBNET}.{number} {other}\n" for number, other in enumerate(names, 1)]
    (etc / "hosts").write_text("127.0.0.1 localhost\n" + "".join(known))
    (etc / "resolv.conf").write_text("")  # nobody is asked, so that nobody has to be waited for
    others = [line for line in Path("/etc/passwd").read_text().splitlines() if not line.startswith("root:")]
    (etc / "passwd").write_text("\n".join([f"root:x:0:0:root:{folder / 'home'}:/bin/bash", *others, ""]))
    (etc / "shadow").write_text("root:*:19000:0:99999:7:::\n")
    (etc / "sshd_config").write_text(_SSHD.format(key=key, folder=folder))

    spaces = ["--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "--net", "--uts", "--ipc"]
    below = {str(path.resolve()) for path in visible if path.resolve().is_relative_to("/tmp")}
    command = ["setpriv", "--pdeathsig=KILL", "unshare", *spaces, "sh", "-c", _BOOT, "boot", *sorted(below)]
    environment = {"PATH": PATH, "NAME": name, "FOLDER": str(folder)}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_for(lambda: _listens(process, folder / "log"), START_S, f"the sshd of {name}")
    except BaseException:
        _end(process)
        raise
    return Host(name, address, folder, process, descendants(process.pid)[0])


def _listens(process: subprocess.Popen[bytes], log: Path) -> bool:
    if process.poll() is not None:
        raise CommandError(f"a host did not start:\n{tail(log, 20)}")
    return "Server listening on 0.0.0.0" in log.read_text()


def _connect(hosts: Sequence[Host]) -> None:
    first = hosts[0]
    _ip(first.pid, "link", "add", "switch", "type", "bridge")
    _ip(first.pid, "address", "add", f"{first.address}/24", "dev", "switch")
    _ip(first.pid, "link", "set", "switch", "up")
    for host in hosts[1:]:
        peer = ("peer", "name", "eth0", "netns", str(host.pid))
        _ip(first.pid, "link", "add", host.name, "type", "veth", *peer)
        _ip(first.pid, "link", "set", host.name, "master", "switch", "up")
        _ip(host.pid, "address", "add", f"{host.address}/24", "dev", "eth0")
        _ip(host.pid, "link", "set", "eth0", "up")


def _ip(pid: int, *arguments: str) -> None:
    command = ["nsenter", f"--target={pid}", "--net", "ip", *arguments]
    done = subprocess.run(command, env={"PATH": PATH}, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        raise CommandError(f"{' '.join(command)}: {done.stderr}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a host: its first process follows at once, and with that all others in its namespace."""
    family = descendants(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait(20)
    wait_for(lambda: not any(map(alive, family)), 20, "the end of a host's processes")


def _keygen(path: Path) -> None:
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)]
    subprocess.run(command, check=True, timeout=20, stdin=subprocess.DEVNULL)


def tail(path: Path, lines: int) -> str:
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return f"{path.name}: not there"
    return "\n".join([f"{path.name}, last lines:", *text.splitlines()[-lines:]])


def lack() -> str | None:
    """Why no hosts can be made here; None if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]:
        return f"not installed: {', '.join(missing)}"
    tried = subprocess.run(["unshare", "--net", "--pid", "--fork", "--mount", "true"], capture_output=True, check=False)
    return f"no namespaces: {tried.stderr.decode().strip()}" if tried.returncode else None
