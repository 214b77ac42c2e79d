import json

import pytest

from fisher_ray.errors import ConfigError, ResumeMismatchError
from fisher_ray.journal import Journal, read_run
from fisher_ray.storage import Storage

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


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize(
    "content", [{"thesis.txt": b"mine"}, {"run.json": b"{"}, {"run.json": b'{"program": "other"}'}]
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
