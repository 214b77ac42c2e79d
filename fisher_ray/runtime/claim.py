"""One driver at a time on a run folder: a claim with a heartbeat, which expires when its driver is dead.

No clock is compared with another, and no conditional write is relied on, which is not a lock on every store: a claim
is alive if it changes while one looks at it. Should two drivers take a dead one's claim at the same moment, the later
write holds, and the other finds out when it reads back, or at its next heartbeat. What both write meanwhile are the
same bits.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from fisher_ray.errors import ClaimedError, StorageError
from fisher_ray.journal import CLAIM_FILE
from fisher_ray.storage import Storage

BEAT_S = 5.0
"""How often a driver says that it is there."""
EXPIRY_S = 30.0
"""How long it may be silent."""
SETTLE_S = {True: 1.0, False: 0.05}
"""How long after its write a claim is read back, on remote and on local storage."""


_HELD: set[str] = set()
"""Tokens of the claims that this process holds."""


class Claim:
    """The claim on one run folder; a context in which it is held.

    Args:
        url: the run folder.
        note: told when another's claim has to expire first.
        beat_s: seconds between heartbeats.
        expiry_s: seconds of silence after which a claim is dead.
        another: what a user gives for another folder.
    """

    def __init__(
        self,
        url: str,
        note: Callable[[str], None],
        *,
        beat_s: float = BEAT_S,
        expiry_s: float = EXPIRY_S,
        another: str = "output",
    ) -> None:
        """Touch nothing yet."""
        self._another = another
        self._note, self._beat_s, self._expiry_s = note, beat_s, expiry_s
        self._storage, self._quick = Storage(url), Storage(url, retry_s=beat_s)
        self._mine: dict[str, Any] = {"token": uuid.uuid4().hex, **_this_process()}
        self._beats = 0
        self._loss, self._sure_s = "", 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="fisher-ray-claim", daemon=True)

    def __enter__(self) -> Claim:
        """Take the claim, after a dead driver's has expired.

        Raises:
            ClaimedError: if another driver is at work, naming it.
            StorageError: if storage does not answer.
        """
        self._await_expiry()
        _HELD.add(self._mine["token"])
        try:
            self._write(self._storage)
            time.sleep(SETTLE_S[self._storage.remote])
            holder = _read(self._storage)
            self._sure_s = _awake_or_not_s()
            if not self._is_mine(holder):
                raise ClaimedError(self._refusal(holder))
            self._thread.start()
        except BaseException:
            self._let_go()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Let the claim go, if it is still this driver's."""
        self._over.set()
        self._thread.join()
        self._let_go()

    def _let_go(self) -> None:
        _HELD.discard(self._mine["token"])
        try:
            if not self._loss and self._is_mine(_read(self._quick)):
                self._quick.remove(CLAIM_FILE)
        except StorageError as failure:
            self._note(f"the claim on {self._storage.url} could not be removed, and will expire: {failure}")

    def check(self) -> None:
        """Return if the claim is still this driver's.

        Raises:
            ClaimedError: if another driver has taken it over, or somebody has removed it, or the heartbeat has ended.
            StorageError: if the heart has not beaten for long, and storage does not say whose claim it is.
        """
        if not self._loss and _awake_or_not_s() - self._sure_s > self._expiry_s:  # as after the machine slept
            self._make_sure(self._storage)
        if self._loss:
            raise ClaimedError(self._loss)
        if not self._thread.is_alive():
            raise ClaimedError(f"{self._storage.url}: the claim on it is not renewed any more. Run again to resume.")

    def _await_expiry(self) -> None:
        seen, end = _read(self._storage), time.monotonic() + self._expiry_s
        if seen is None or _is_gone(seen):
            return
        if _is_here(seen):
            raise ClaimedError(self._refusal(seen))
        self._note(
            f"{self._storage.url} is claimed by {_named(seen)}; waiting {self._expiry_s:.0f} s for a sign of life"
        )
        while time.monotonic() < end:
            time.sleep(min(1.0, self._beat_s))
            asked_s = time.monotonic()
            now = _read(self._storage)
            end += time.monotonic() - asked_s  # while storage is silent, nobody can be heard
            if now is None:
                return
            if now != seen:
                raise ClaimedError(self._refusal(now))
        self._note(f"the claim of {_named(seen)} has expired")

    def _keep(self) -> None:
        while not self._over.wait(self._beat_s):
            try:
                if not self._make_sure(self._quick):
                    return
                self._write(self._quick)
            except StorageError:  # whoever works with this storage is told; the next beat may come through
                continue

    def _make_sure(self, storage: Storage) -> bool:
        """Read whose the claim is."""
        asked_s, holder = _awake_or_not_s(), _read(storage)
        if self._is_mine(holder):
            self._sure_s = asked_s
            return True
        what = "its claim was removed" if holder is None else f"{_named(holder)} has taken it over"
        self._loss = f"{self._storage.url}: {what}, so this driver stops. Run again to resume."
        return False

    def _is_mine(self, holder: dict[str, Any] | None) -> bool:
        return holder is not None and holder.get("token") == self._mine["token"]

    def _write(self, storage: Storage) -> None:
        self._beats += 1
        heard = datetime.now(UTC).isoformat(timespec="seconds")
        content = {**self._mine, "heard": heard, "beats": self._beats}
        storage.write_bytes(CLAIM_FILE, (json.dumps(content) + "\n").encode())

    def _refusal(self, holder: dict[str, Any] | None) -> str:
        who = "another driver" if holder is None else _named(holder)
        return (
            f"{self._storage.url}: {who} works on this run. Wait for its end, stop it, or give another "
            f"{self._another}; if it is dead, its claim expires {self._expiry_s:.0f} s after its last sign of life."
        )


def _awake_or_not_s() -> float:
    """Seconds since the machine started, those in which it slept included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _read(storage: Storage) -> dict[str, Any] | None:
    try:
        content = json.loads(storage.read_bytes(CLAIM_FILE))
    except FileNotFoundError:
        return None
    except ValueError:
        content = None
    return content if isinstance(content, dict) else {}


def _named(holder: dict[str, Any]) -> str:
    where = f"process {holder.get('pid', '?')} on {holder.get('host', 'an unknown machine')}"
    return f"{where} (last heard at {holder.get('heard', 'an unknown time')})"


def _this_process() -> dict[str, Any]:
    """Say which process this is, so that another one on the same machine can tell whether it is still there."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "machine": _machine(), "started": _started(pid)}


def _machine() -> str:
    """Return what only processes that see each other under the same number have in common; "" if it is not told."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: int) -> str:
    """Return when a process started, in ticks since the machine did; "" if there is none, or it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def _same_machine(holder: dict[str, Any]) -> bool:
    return bool(holder.get("machine")) and holder["machine"] == _machine()


def _is_here(holder: dict[str, Any]) -> bool:
    """Whether the process is there; of this one, whether it still holds the claim, which it may have left behind."""
    if holder.get("pid") == os.getpid() and _same_machine(holder) and holder.get("token") not in _HELD:
        return False
    return _same_machine(holder) and _started(int(holder["pid"])) == holder.get("started")


def _is_gone(holder: dict[str, Any]) -> bool:
    return _same_machine(holder) and not _is_here(holder)
