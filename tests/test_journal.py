import errno
import json
import tempfile
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fisher_ray import journal as journal_module
from fisher_ray.config import Config
from fisher_ray.errors import ClaimedError, ConfigError, DataError, ResumeMismatchError
from fisher_ray.journal import OWN, Journal, read_run
from fisher_ray.storage import Storage
from fisher_ray.storage.local import LocalFiles
from tests.s3_server import s3_server, s3_url
from tests.test_config import minimal

__all__ = ["s3_server", "s3_url"]

FACTS = {"identity": {"metric": {"rank": 64}, "seed": 0}, "fingerprints": {"shallow": "aa"}, "config": {"output": "x"}}


@pytest.fixture
def storage(tmp_path):
    return Storage(str(tmp_path / "run"))


def test_what_is_sealed_is_there_when_the_folder_is_opened_again(storage):
    with Journal.open(storage, FACTS).stage("base") as result:
        result["fingerprint"] = "ff"

    again = Journal.open(storage, FACTS)
    assert again.sealed("base")
    assert again.result("base") == {"fingerprint": "ff"}
    assert again.results() == {"base": {"seconds": again.seconds("base"), "result": {"fingerprint": "ff"}}}
    assert not again.sealed("metric")


def test_a_failing_stage_stays_unsealed_and_its_time_is_kept(storage):
    journal = Journal.open(storage, FACTS)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), journal.stage("metric"):
            raise KeyboardInterrupt
        spent = journal.seconds("metric")
        journal = Journal.open(storage, FACTS)
        assert journal.seconds("metric") == spent > 0
        assert not journal.sealed("metric")

    with journal.stage("metric") as result:
        result["rank"] = 3
    assert journal.seconds("metric") > spent
    assert Journal.open(storage, FACTS).result("metric") == {"rank": 3}


def test_a_driver_that_has_lost_its_claim_writes_nothing_any_more(storage):
    lost: list[str] = []

    def check() -> None:
        if lost:
            raise ClaimedError(lost[0])

    def base() -> None:
        with journal.stage("base"):
            lost.append("taken over")

    journal = Journal.open(storage, FACTS, check=check)
    before = {name: storage.read_bytes(name) for name in storage.list()}
    lost.append("taken over")
    for act in (base, lambda: journal.decide("threads", 2), lambda: journal.exclude("test", {1: "bad"})):
        with pytest.raises(ClaimedError, match="taken over"):
            act()
    assert {name: storage.read_bytes(name) for name in storage.list()} == before


def test_what_interrupted_a_stage_is_told_and_soon_where_storage_does_not_answer(storage, monkeypatch):
    tries = []

    def silent(self, name, data, settle):
        tries.append(name)
        raise TimeoutError(errno.ETIMEDOUT, "no answer")

    journal = Journal.open(storage, FACTS)
    begun = time.monotonic()

    def base() -> None:
        with journal.stage("base"):
            monkeypatch.setattr(LocalFiles, "write", silent)
            raise DataError("row 7 is no picture")

    with pytest.raises(DataError, match="row 7"):
        base()
    assert time.monotonic() - begun < 10
    assert len(tries) > 1


@settings(max_examples=25)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.booleans()), max_size=8))
def test_a_stage_is_sealed_once_it_has_ended_well_whatever_happened_to_it_before(attempts):
    with tempfile.TemporaryDirectory() as folder:
        journal, done, spent = Journal.open(Storage(folder), FACTS), {}, dict.fromkeys("abc", 0.0)
        for number, (name, fails, reopened) in enumerate(attempts):
            journal = Journal.open(Storage(folder), FACTS) if reopened else journal
            if name in done:
                assert journal.result(name) == done[name]
                continue
            try:
                with journal.stage(name) as result:
                    result["number"] = number
                    if fails:
                        raise OSError
                done[name] = {"number": number}
            except OSError:
                assert not journal.sealed(name)
            assert journal.seconds(name) > spent[name]
            spent[name] = journal.seconds(name)
        again = Journal.open(Storage(folder), FACTS)
        assert {name: record["result"] for name, record in again.results().items()} == done
        assert {name: again.seconds(name) for name in "abc"} == spent


def test_what_a_killed_driver_had_spent_is_kept_as_of_its_last_event(storage, monkeypatch):
    monkeypatch.setattr(journal_module, "EVENTS_EVERY_S", 0.0)
    with Journal.open(storage, FACTS).stage("metric"):
        running = Journal.open(storage, FACTS)  # what another driver would find if this one were killed now
        assert running.seconds("metric") > 0
        assert not running.sealed("metric")
        assert json.loads(storage.read_bytes("events.jsonl"))["event"] == "stage started"


def test_between_two_writes_of_the_events_there_is_time(storage, monkeypatch):
    journal, written = Journal.open(storage, FACTS), []
    with journal.stage("metric"):
        monkeypatch.setattr(storage, "write_bytes", lambda name, data: written.append(name))
        for unit in range(100):
            journal.event("unit done", unit=unit)
        assert written == []
    assert written == ["events.jsonl", "run.json"]


def test_a_decision_is_made_once(storage):
    assert Journal.open(storage, FACTS).decide("threads", 2) == 2
    assert Journal.open(storage, FACTS).decide("threads", 64) == 2


def test_events_are_lines_that_go_on_after_a_resume(storage):
    for name in ("base", "metric"):
        journal = Journal.open(storage, FACTS)
        with journal.stage(name):
            journal.event("unit done", unit=0)

    events = [json.loads(line) for line in storage.read_bytes("events.jsonl").decode().splitlines()]
    words = ["stage started", "unit done", "stage done"]
    assert [(event["event"], event.get("stage", "")) for event in events] == [
        (word, "" if word == "unit done" else name) for name in ("base", "metric") for word in words
    ]
    assert all("time" in event for event in events)


def test_numbers_of_events_add_up_over_all_starts_of_a_run(storage):
    for name in ("base", "metric"):
        journal = Journal.open(storage, FACTS)
        with journal.stage(name):
            journal.event("unit done", num_halvings=2)
            journal.event("unit done", unit=1)
            journal.event("note", num_halvings=100)

    assert journal.total("unit done", "num_halvings") == 4
    assert Journal.open(storage, FACTS).total("unit done", "num_skipped") == 0


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"identity": {"metric": {"rank": 32}, "seed": 0}}, r"metric\.rank was 64, now 32"),
        ({"identity": {"metric": {"rank": 64}, "seed": 0, "new": 1}}, r"new was null, now 1"),
        ({"fingerprints": {"shallow": "bb"}}, r'fingerprint of shallow was "aa", now "bb"'),
    ],
)
def test_another_run_is_refused_with_the_difference(storage, changed, words):
    Journal.open(storage, FACTS)

    with pytest.raises(ResumeMismatchError, match=rf"{words}.*--fresh"):
        Journal.open(storage, FACTS | changed)
    assert read_run(storage)["identity"] == FACTS["identity"]


def facts_of(**replaced):
    return FACTS | {"identity": Config.from_dict(minimal(**replaced)).identity()}


@pytest.mark.parametrize(
    "runtime", [{"num_workers": 7}, {"gpus_per_worker": 0.5}, {"max_attempts": 9}, {"wait_s": 1.5}], ids=str
)
def test_how_many_workers_there_are_may_change(storage, runtime):
    with Journal.open(storage, facts_of(runtime={"num_workers": 2})).stage("base"):
        pass

    assert Journal.open(storage, facts_of(runtime=runtime)).sealed("base")


@pytest.mark.parametrize(
    ("replaced", "words"),
    [
        ({"runtime": {"unit_rows": 4096}}, r"runtime\.unit_rows was 2048, now 4096"),
        ({"runtime": {"cpus_per_worker": 2}}, r"runtime\.cpus_per_worker was 1, now 2"),
        ({"linear": {"penalties": [1.0]}}, r"linear\.penalties was \[0\.03, 0\.1, 0\.3, 1\.0, 3\.0\], now \[1\.0\]"),
        ({"seed": 3, "metric": {"rank": 8}}, r"metric\.rank was 1024, now 8; seed was 0, now 3"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_may_change_a_result_may_not_change(storage, replaced, words):
    Journal.open(storage, facts_of())

    with pytest.raises(ResumeMismatchError, match=words):
        Journal.open(storage, facts_of(**replaced))


LATE = {"linear.penalties": ("linear",), "trained_on": ("trained_on", "report")}


@pytest.mark.parametrize(
    ("sealed", "replaced", "refused"),
    [
        ("base", {"linear": {"penalties": [1.0]}}, None),
        ("linear", {"linear": {"penalties": [1.0]}}, r"linear\.penalties was .*, now \[1\.0\]\. Give"),
        ("base", {"linear": {"views": 2}}, r"linear\.views was 1, now 2\. Give"),
        ("linear", {"trained_on": None}, None),
        ("report", {"trained_on": None}, r"trained_on was \{.*, now null\. Give"),
        ("report", {"data": {**minimal()["data"], "on_error": "skip"}}, None),
    ],
    ids=str,
)
def test_what_no_sealed_stage_has_read_may_change(storage, sealed, replaced, refused):
    with Journal.open(storage, facts_of(), late=LATE).stage(sealed):
        pass

    if refused is None:
        assert Journal.open(storage, facts_of(**replaced), late=LATE).sealed(sealed)
        assert read_run(storage)["identity"] == facts_of()["identity"]  # nothing is written yet
    else:
        with pytest.raises(ResumeMismatchError, match=refused):
            Journal.open(storage, facts_of(**replaced), late=LATE)


def test_what_is_no_part_of_the_identity_may_change(storage):
    Journal.open(storage, FACTS)
    journal = Journal.open(storage, FACTS | {"config": {"output": "y"}})

    with journal.stage("base"):
        pass
    assert read_run(storage)["config"] == {"output": "y"}


def test_fresh_removes_all_that_is_this_programs_and_nothing_else(storage):
    with Journal.open(storage, FACTS).stage("base"):
        storage.write_bytes("base/model.safetensors", b"1")
    for name in ("features/train.zarr/zarr.json", "linear/weights.zarr/zarr.json", "notes.txt"):
        storage.write_bytes(name, b"2")

    journal = Journal.open(storage, FACTS | {"fingerprints": {"shallow": "bb"}}, fresh=True)
    assert not journal.sealed("base")
    assert storage.list() == ["notes.txt", "run.json"]


@pytest.mark.parametrize("killed_at", OWN)
def test_after_a_kill_while_starting_anew_nothing_of_the_old_run_is_believed(storage, killed_at, monkeypatch):
    with Journal.open(storage, FACTS).stage("base") as result:
        result["fingerprint"] = "old"
        for name in ("base/model.safetensors", "features/train.zarr/zarr.json"):
            storage.write_bytes(name, b"old")
    remove = storage.remove

    def break_off(name):
        if name == killed_at:
            raise KeyboardInterrupt
        remove(name)

    monkeypatch.setattr(storage, "remove", break_off)
    with pytest.raises(KeyboardInterrupt):
        Journal.open(storage, FACTS, fresh=True)
    monkeypatch.setattr(storage, "remove", remove)

    assert Journal.open(storage, FACTS).results() == {}
    assert storage.list() == ["run.json"]


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize(
    "content",
    [
        {"thesis.txt": b"mine"},
        {"base/model.safetensors": b"another program's"},
        {"run.json": b"{"},
        {"run.json": b"\xff\xfe"},
        {"run.json": b"[1]"},
        {"run.json": b'{"program": "other"}'},
    ],
)
def test_a_folder_of_something_else_is_refused_and_left_alone(storage, content, fresh):
    for name, raw in content.items():
        storage.write_bytes(name, raw)

    with pytest.raises(ConfigError, match="Give a"):
        Journal.open(storage, FACTS, fresh=fresh)
    assert {name: storage.read_bytes(name) for name in storage.list()} == content


def test_a_run_of_another_schema_is_refused(storage):
    storage.write_bytes("run.json", b'{"program": "fisher_ray", "schema": 99}')

    with pytest.raises(ConfigError, match="schema 99, this program writes 1"):
        Journal.open(storage, FACTS)


def test_a_folder_without_a_run_has_none_to_read(storage):
    with pytest.raises(ConfigError, match=r"no run folder: it has no run\.json"):
        read_run(storage)


@pytest.mark.s3
def test_a_run_in_s3_is_taken_up_started_anew_and_guarded(s3_url):
    storage = Storage(f"{s3_url}/run")
    with Journal.open(storage, FACTS).stage("base") as result:
        result["fingerprint"] = "ff"
        storage.write_bytes("base/model.safetensors", b"1")
    assert Journal.open(Storage(f"{s3_url}/run"), FACTS).result("base") == {"fingerprint": "ff"}
    assert len(storage.read_bytes("events.jsonl").splitlines()) == 2
    with pytest.raises(ResumeMismatchError, match=r'fingerprint of shallow was "aa", now "bb"'):
        Journal.open(storage, FACTS | {"fingerprints": {"shallow": "bb"}})

    storage.write_bytes("notes.txt", b"mine")
    assert not Journal.open(storage, FACTS, fresh=True).sealed("base")
    assert storage.list() == ["notes.txt", "run.json"]
    Storage(f"{s3_url}/other").write_bytes("thesis.txt", b"mine")
    with pytest.raises(ConfigError, match=r"no run folder: it holds thesis\.txt"):
        Journal.open(Storage(f"{s3_url}/other"), FACTS, fresh=True)
