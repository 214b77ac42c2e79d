from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from fisher_ray.errors import ClaimedError, StoppedError, StorageError
from fisher_ray.journal import CLAIM_FILE
from fisher_ray.runtime import Claim, claim
from fisher_ray.storage import Storage
from tests.integration.processes import wait_for
from tests.s3_server import s3_server, s3_url

__all__ = ["s3_server", "s3_url"]

HOLD = """
import sys, time
from fisher_ray.runtime import Claim
with Claim(sys.argv[1], print):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def elsewhere(monkeypatch):
    """Claims of this process look as if they came from another machine."""
    monkeypatch.setattr(claim, "_machine", lambda: "")


def forge(url, **values):
    path = url / CLAIM_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"token": "other", "host": "far", "pid": 7, "machine": "m", "started": "1", "heard": "noon", "beats": 1}
    path.write_text(json.dumps({**content, **values}))


def test_a_claim_is_there_while_it_is_held_and_gone_afterwards(tmp_path):
    with Claim(str(tmp_path), print) as held:
        held.check()
        assert json.loads((tmp_path / CLAIM_FILE).read_text())["beats"] == 1
    assert list(tmp_path.iterdir()) == []


def test_a_heart_beats_while_a_claim_is_held(tmp_path):
    with Claim(str(tmp_path), print, beat_s=0.05):
        wait_for(lambda: json.loads((tmp_path / CLAIM_FILE).read_text())["beats"] > 3, 10, "three heartbeats")


def test_a_living_process_on_this_machine_is_named_at_once(tmp_path):
    started = time.monotonic()
    with Claim(str(tmp_path), print), pytest.raises(ClaimedError, match=r"process \d+ on .* \(last heard at 20\d\d-"):
        Claim(str(tmp_path), print).__enter__()
    assert time.monotonic() - started < 10
    assert issubclass(ClaimedError, StoppedError)


def test_a_claim_elsewhere_is_refused_when_it_gives_a_sign_of_life(tmp_path, elsewhere):
    notes = []
    with (
        Claim(str(tmp_path), print, beat_s=0.1),
        pytest.raises(ClaimedError, match="works on this run"),
    ):
        Claim(str(tmp_path), notes.append, beat_s=0.1, expiry_s=20).__enter__()
    assert [note for note in notes if "waiting 20 s for a sign of life" in note]


def test_a_silent_claim_elsewhere_expires(tmp_path):
    forge(tmp_path)
    notes: list[str] = []
    with Claim(str(tmp_path), notes.append, beat_s=0.1, expiry_s=0.5) as held:
        held.check()
    assert notes[-1] == "the claim of process 7 on far (last heard at noon) has expired"


def test_a_damaged_claim_expires_too(tmp_path):
    (tmp_path / CLAIM_FILE).write_text("{")
    with Claim(str(tmp_path), lambda _: None, beat_s=0.1, expiry_s=0.5) as held:
        held.check()


def test_the_claim_of_a_killed_process_on_this_machine_is_taken_at_once(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ClaimedError, match=f"process {process.pid} on"):
            Claim(str(tmp_path), print).__enter__()
        process.kill()
    notes: list[str] = []
    with Claim(str(tmp_path), notes.append):
        assert notes == []


def test_who_was_silent_and_is_taken_over_stops(tmp_path):
    with Claim(str(tmp_path), print, beat_s=0.05) as held:
        forge(tmp_path, host="near")
        wait_for(lambda: held._loss, 10, "the loss")
        with pytest.raises(ClaimedError, match=r"process 7 on near .* has taken it over, so this driver stops"):
            held.check()
    assert json.loads((tmp_path / CLAIM_FILE).read_text())["token"] == "other"  # is not ours to remove


def test_a_removed_claim_stops_its_driver(tmp_path):
    with Claim(str(tmp_path), print, beat_s=0.05) as held:
        (tmp_path / CLAIM_FILE).unlink()
        wait_for(lambda: held._loss, 10, "the loss")
        with pytest.raises(ClaimedError, match="its claim was removed"):
            held.check()


def test_a_driver_that_was_stopped_for_long_asks_before_it_goes_on(tmp_path):
    with Claim(str(tmp_path), print, beat_s=60, expiry_s=0.01) as held:  # so that no heartbeat finds out
        held.check()
        forge(tmp_path, host="near")
        time.sleep(0.02)
        with pytest.raises(ClaimedError, match=r"process 7 on near .* has taken it over"):
            held.check()


def test_a_claim_that_is_not_renewed_any_more_stops_its_driver(tmp_path, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with Claim(str(tmp_path), print, beat_s=0.05) as held:
        monkeypatch.setattr(Claim, "_write", lambda *_: 1 / 0)
        wait_for(lambda: not held._thread.is_alive(), 10, "the heartbeat's end")
        with pytest.raises(ClaimedError, match="is not renewed any more"):
            held.check()


def test_a_claim_that_an_interrupted_call_of_this_process_left_behind_is_taken_at_once(tmp_path, monkeypatch):
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(claim.time, "sleep", interrupt)
        with pytest.raises(KeyboardInterrupt):
            Claim(str(tmp_path), print).__enter__()
    assert list(tmp_path.iterdir()) == []

    with monkeypatch.context() as patch:  # storage that does not answer at the end
        patch.setattr(Storage, "remove", refuse)
        with Claim(str(tmp_path), print):
            pass
    assert (tmp_path / CLAIM_FILE).exists()
    notes: list[str] = []
    with Claim(str(tmp_path), notes.append):
        assert notes == []


def refuse(self: Storage, name: str) -> None:
    raise StorageError("no answer")


def test_while_storage_is_silent_no_claim_expires(tmp_path, monkeypatch):
    forge(tmp_path)
    read = claim._read

    def slow(storage: Storage) -> dict[str, Any] | None:
        time.sleep(0.5)
        return read(storage)

    monkeypatch.setattr(claim, "_read", slow)
    watcher = Claim(str(tmp_path), lambda _: None, beat_s=0.2, expiry_s=1.0)
    started = time.monotonic()
    watcher._await_expiry()
    assert time.monotonic() - started > 3.0  # five looks of 0.2 s, and what they were kept waiting for


def race(url: str, beat_s: float) -> None:
    """Eight at once: in the end one holds the claim, and knows it."""
    entered: list[Claim] = []
    start, over = threading.Barrier(8), threading.Event()

    def compete() -> None:
        start.wait()
        try:
            with Claim(url, lambda _: None, beat_s=beat_s, expiry_s=1.0) as held:
                entered.append(held)
                over.wait(60)
        except ClaimedError:
            return

    threads = [threading.Thread(target=compete) for _ in range(8)]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: sum(thread.is_alive() for thread in threads) == len(entered) > 0, 60, "the losers' end")
        wait_for(lambda: sum(not held._loss for held in entered) == 1, 60, "one winner")
    finally:
        over.set()
        for thread in threads:
            thread.join()


def test_of_many_at_once_one_holds_the_claim(tmp_path, elsewhere):
    for number in range(3):
        race(str(tmp_path / str(number)), 0.1)


@pytest.mark.s3
def test_of_many_at_once_one_holds_the_claim_in_a_bucket(s3_url, elsewhere):
    race(s3_url + "/run", 0.5)
