import json
import os
import re
import signal
from functools import partial
from pathlib import Path

import pytest

import fisher_ray
from fisher_ray import pipeline
from fisher_ray.errors import ClaimedError, ConfigError, DataError, ModelError, ResumeMismatchError
from fisher_ray.runtime import Claim, Pool
from fisher_ray.store import verify
from tests.integration.runs import Listening, bits, digits, worker_pid

STAGES = ["base", "basis", "metric", "features/train", "features/test", "linear", "linear_probe", "trained_on"]


def test_the_shallow_model_beats_the_briefly_trained_network(undisturbed):
    output, results = undisturbed

    accuracy = results["accuracy"]
    assert accuracy["fisher_linear"] >= accuracy["base"] + 0.03
    assert accuracy["fisher_linear"] > accuracy["linear_probe"]
    assert (results["schema"], results["num_test"], results["num_features"]) == (1, 597, 640)
    assert set(results["seconds"]) == {"base", "metric", "features", "linear", "trained_on"}
    assert all(rate > 0 for rate in results["samples_per_second"].values())
    assert json.loads((output / "report" / "results.json").read_text()) == results
    page = (output / "report" / "report.html").read_text()
    assert "The linear model on Fisher features gets" in page
    assert page.count("<svg") == 6
    assert page.count("<img") == 3 * 6 * 4  # test pictures of three kinds, and three training pictures beside each


def test_every_stage_leaves_what_the_design_says(undisturbed):
    output, _ = undisturbed

    names = {path.name for path in output.iterdir()}
    assert {"run.json", "events.jsonl", "base", "metric.zarr", "features", "linear", "report"} <= names
    run = json.loads((output / "run.json").read_text())
    assert list(run["stages"]) == [*STAGES, "report"]
    assert all(record["sealed"] for record in run["stages"].values())
    assert run["config"]["compression"]["dim"] == 128
    assert set(run["fingerprints"]) == {"train", "shallow", "test", "model", "transformed"}
    events = [json.loads(line) for line in (output / "events.jsonl").read_text().splitlines()]
    units = [event for event in events if event["event"] == "unit done" and event["stage"] == "features/train"]
    assert sorted(event["unit"] for event in units) == [0, 1, 2, 3, 4]


def test_a_finished_run_is_written_for_tensorboard_when_that_is_asked_for(undisturbed, tmp_path):
    output, results = undisturbed
    heard, place = Listening(), tmp_path / "board"

    assert pipeline.run(digits(output, f"tensorboard={place}"), progress=heard) == results

    assert heard.stages == []
    assert len(list(place.rglob("events.out.tfevents.*"))) == 1


def test_a_place_for_tensorboard_that_cannot_be_is_told_before_anything_is_done(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="tensorboard: cannot make"):
        pipeline.run(digits(tmp_path / "run", f"tensorboard={tmp_path}/file/board"))
    assert not (tmp_path / "run").exists()


def test_every_event_has_what_is_documented_of_it(undisturbed):
    output, _ = undisturbed
    text = (Path(__file__).parents[2] / "cluster/README.md").read_text()
    rows = re.findall(r"^\| (`(?:stage|unit|note)[^|]*) \| (.*) \|$", text, flags=re.MULTILINE)
    documented = {
        name: set(re.findall(r"`(\w+)`", keys)) for names, keys in rows for name in re.findall("`([^`]+)`", names)
    }
    assert set(documented) == {"stage started", "stage done", "stage interrupted", "unit done", "note"}

    events = [json.loads(line) for line in (output / "events.jsonl").read_text().splitlines()]

    assert {event["event"] for event in events} >= {"stage started", "stage done", "unit done"}
    for event in events:
        told = {*event, *(event["seconds"] if event["event"] == "unit done" else [])}
        assert told <= {"time", "event"} | documented[event["event"]], event
    (stages,) = [keys for names, keys in rows if names == "`stage started`"]
    assert {event["stage"] for event in events if "stage" in event} <= set(re.findall(r"`([\w/]+)`", stages))


def test_a_finished_run_does_nothing_again(undisturbed):
    output, results = undisturbed
    before = bits(output)
    heard = Listening()

    assert pipeline.run(digits(output, "runtime.num_workers=1"), progress=heard) == results
    assert heard.stages == []
    assert bits(output) == before


@pytest.mark.parametrize("stage", ["metric", "features/train"])
def test_a_worker_killed_in_a_pass_changes_no_byte(stage, undisturbed, tmp_path):
    killed: list[int] = []

    def kill(name, receipt):
        if name == stage and not killed:
            killed.append(worker_pid(receipt))
            os.kill(killed[0], signal.SIGKILL)

    heard = Listening(kill)
    pipeline.run(digits(tmp_path / "run", "runtime.num_workers=2"), until="features", progress=heard)

    assert any(note.startswith("lost the worker on") and f"pid {killed[0]}" in note for note in heard.notes)
    disturbed, whole = bits(tmp_path / "run"), bits(undisturbed[0])
    assert disturbed == {name: whole[name] for name in disturbed}
    assert {name.partition("/")[0] for name in disturbed} == {"base", "basis.zarr", "metric.zarr", "features"}


def test_one_worker_writes_the_bytes_of_two(undisturbed, tmp_path):
    pipeline.run(digits(tmp_path / "run", "runtime.num_workers=1"), until="linear")

    alone, whole = bits(tmp_path / "run"), bits(undisturbed[0])
    assert alone == {name: whole[name] for name in alone}
    assert "linear/weights.zarr/weight/c/0/0" in alone


def test_sums_that_do_not_merge_by_adding_give_the_same_bytes_too(ray_session, tmp_path):
    asked = ["compression.layers={fc0: {kind: topk}}", "metric.estimator=frequent_directions", "metric.structure=block"]
    asked += ["metric.size=70", "metric.labels=sampled", "metric.draws=2", "metric.rank=48"]
    written = []
    for workers in (1, 2):
        config = digits(tmp_path / str(workers), f"runtime.num_workers={workers}", *asked)
        stages = pipeline.run(config, until="features")
        written.append(bits(tmp_path / str(workers)))
    assert written[0] == written[1]
    assert {layer["name"] for layer in stages["basis"]["result"]["layers"]} == {"fc0", "fc1"}
    assert [part["name"] for part in stages["metric"]["result"]["parts"]] == ["fc0", "fc1"]
    assert stages["metric"]["result"]["rank"] == 48


@pytest.mark.parametrize("stage", ["features/train", "linear"])
def test_an_interrupted_run_resumes_to_the_same_bytes(stage, undisturbed, tmp_path):
    def interrupt(name, receipt):
        if name == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.run(digits(tmp_path / "run"), progress=Listening(interrupt))
    heard = Listening()
    pipeline.run(digits(tmp_path / "run"), until="linear", progress=heard)

    resumed, whole = bits(tmp_path / "run"), bits(undisturbed[0])
    assert heard.stages == STAGES[STAGES.index(stage) : STAGES.index("linear_probe") + 1]
    assert resumed == {name: whole[name] for name in resumed}
    if stage == "features/train":
        assert len([1 for name, _ in heard.receipts if name == stage]) < 5


def test_another_configuration_is_refused_and_fresh_starts_anew(undisturbed, tmp_path):
    pipeline.run(digits(tmp_path / "run"), until="base")
    with pytest.raises(ResumeMismatchError, match=r"metric\.rank was 64, now 32.*--fresh"):
        pipeline.run(digits(tmp_path / "run", "metric.rank=32"), until="base")

    heard = Listening()
    pipeline.run(digits(tmp_path / "run", "metric.rank=32"), until="base", fresh=True, progress=heard)
    assert heard.stages == ["base"]


def test_another_network_transform_or_base_is_refused(ray_session, tmp_path, monkeypatch):
    (tmp_path / "halved.py").write_text(
        "from pathlib import Path\n"
        "from fisher_ray.models import digits_transform\n"
        "def transform(image, generator):\n"
        f"    return digits_transform(image, generator) / int(Path({str(tmp_path / 'divisor')!r}).read_text())\n"
    )
    (tmp_path / "divisor").write_text("1")
    monkeypatch.chdir(tmp_path)
    config = digits(tmp_path / "run", "data.transform=halved:transform", "model.factory=fisher_ray.models:digits_mlp")
    pipeline.run(config, until="base")

    (tmp_path / "divisor").write_text("2")
    with pytest.raises(ResumeMismatchError, match="fingerprint of transformed was"):
        pipeline.run(config, until="metric")
    (tmp_path / "divisor").write_text("1")
    monkeypatch.setattr("fisher_ray.models.digits_mlp", lambda: fisher_ray.models.mlp((64, 33, 10)))
    with pytest.raises(ResumeMismatchError, match="fingerprint of model was"):
        pipeline.run(config, until="metric")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    weights = tmp_path / "run" / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\x00\x00\x80\x3f")
    with pytest.raises(ModelError, match="is not, or no more, the network that this run was begun with"):
        pipeline.run(config, until="metric")


def test_a_second_driver_is_refused_while_the_first_is_at_work(ray_session, tmp_path):
    refusals: list[str] = []

    def meet(name, receipt):
        if not refusals:
            with pytest.raises(ClaimedError) as refused:
                pipeline.run(digits(tmp_path / "run"), progress=Listening())
            refusals.append(str(refused.value))

    pipeline.run(digits(tmp_path / "run"), until="metric", progress=Listening(meet))
    assert f"process {os.getpid()} on" in refusals[0]
    assert "last heard at 20" in refusals[0]
    assert not (tmp_path / "run" / "claim.json").exists()


def test_a_driver_whose_claim_is_taken_over_stops_and_the_run_resumes(undisturbed, tmp_path, monkeypatch):
    claim = tmp_path / "run" / "claim.json"

    def take_over(name, receipt):
        content = json.loads(claim.read_text())
        if name == "features/train" and content["token"] != "another":
            claim.write_text(json.dumps({**content, "token": "another", "host": "far away", "machine": "another"}))

    monkeypatch.setattr(pipeline, "Claim", partial(Claim, beat_s=0.05))
    with pytest.raises(ClaimedError, match=r"on far away .* has taken it over"):
        pipeline.run(digits(tmp_path / "run"), progress=Listening(take_over))
    claim.unlink()
    pipeline.run(digits(tmp_path / "run"), until="linear", progress=Listening())
    resumed, whole = bits(tmp_path / "run"), bits(undisturbed[0])
    assert resumed == {name: whole[name] for name in resumed}


def test_a_store_is_not_sealed_by_a_driver_whose_claim_is_lost(ray_session, tmp_path, monkeypatch):
    check, write, lost = Claim.check, Pool.map, list[str]()

    def refuse(claim):
        if lost:
            raise ClaimedError("another has it")
        check(claim)

    def write_then_lose(pool, stage, *arguments, **options):
        write(pool, stage, *arguments, **options)
        lost.append(stage)

    monkeypatch.setattr(Claim, "check", refuse)
    monkeypatch.setattr(Pool, "map", write_then_lose)
    with pytest.raises(ClaimedError, match="another has it"):
        pipeline.run(digits(tmp_path / "run"), until="features", progress=Listening())
    assert lost == ["features/train"]
    assert not (tmp_path / "run" / "features" / "train.zarr" / "seal.json").exists()


def test_a_row_that_kills_its_worker_is_left_out_and_listed(ray_session, tmp_path, monkeypatch):
    (tmp_path / "deadly.py").write_text(
        "import os\n"
        "import torch\n"
        "from fisher_ray.models import digits_transform\n"
        "from fisher_ray.data.digits import digits\n"
        "WORST = torch.as_tensor(digits_transform(digits('shallow')[300][0], None))\n"
        "def transform(image, generator):\n"
        "    found = digits_transform(image, generator)\n"
        "    if generator is None and torch.equal(found, WORST):\n"
        "        os._exit(1)\n"
        "    return found\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    asked = ("data.transform=deadly:transform", "data.on_error=skip", "runtime.max_attempts=1", "store.chunk_rows=32")
    heard = Listening()
    pipeline.run(digits(tmp_path / "run", *asked, "runtime.unit_rows=32"), until="features", progress=heard)
    assert len([note for note in heard.notes if "goes on without the rows" in note]) == 1  # later passes know of it
    skipped = fisher_ray.open_features(str(tmp_path / "run/features/train.zarr")).skipped
    assert list(skipped) == [300]
    assert "its worker died" in skipped[300]


def test_a_foreign_folder_is_refused_even_with_fresh(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    for fresh in (False, True):
        with pytest.raises(ConfigError, match=r"no run folder: it holds thesis\.txt"):
            pipeline.run(digits(tmp_path), fresh=fresh)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_features_of_true_labels_are_not_scored_on_the_test_rows(ray_session, tmp_path):
    with pytest.raises(ConfigError, match=r"scores\.labels true"):
        pipeline.run(digits(tmp_path / "run", "scores.labels=true"))
    assert not (tmp_path / "run").exists()


def test_drawn_labels_give_one_score_a_sample(ray_session, tmp_path):
    results = pipeline.run(digits(tmp_path / "run", "scores.labels=sampled", "trained_on=null"))

    assert results["num_features"] == fisher_ray.LowRankMetric.load(str(tmp_path / "run" / "metric.zarr")).rank
    store = fisher_ray.open_features(str(tmp_path / "run" / "features" / "train.zarr"))
    assert store.read("features", 0, 4).shape == (4, results["num_features"])
    assert results["accuracy"]["trained_on"] is None


def test_every_parameter_as_its_own_coordinate(ray_session, tmp_path):
    small = ("compression.kind=identity", "scores.parameters=fc1.*", "trained_on=null")
    results = pipeline.run(digits(tmp_path / "run", *small))

    assert results["accuracy"]["fisher_linear"] > results["accuracy"]["base"]


def test_the_classifier_of_a_run_predicts_as_the_stored_features_do(undisturbed):
    import torch

    from fisher_ray.data.digits import digits as load
    from fisher_ray.models import digits_mlp, digits_transform
    from fisher_ray.store import load_arrays

    output, results = undisturbed
    rows = load("test")
    inputs = torch.stack([digits_transform(rows[row][0], None) for row in range(len(rows))])
    labels = torch.tensor([rows[row][1] for row in range(len(rows))])
    classifier = fisher_ray.FisherClassifier.from_run(str(output))
    loaded = fisher_ray.FisherClassifier.load(str(output / "linear" / "classifier.safetensors"), digits_mlp())

    probabilities = classifier.predict_proba(inputs)
    assert torch.equal(loaded.predict_proba(inputs), probabilities)
    stored, _ = load_arrays(str(output / "linear" / "predictions.zarr"))
    torch.testing.assert_close(classifier(inputs), torch.from_numpy(stored["fisher_linear"]), rtol=0, atol=2e-3)
    right = int((probabilities.argmax(1) == labels).sum())
    assert abs(right / len(labels) - results["accuracy"]["fisher_linear"]) < 0.01


def test_a_wrong_row_stops_the_run_naming_it_or_is_left_out_and_listed(ray_session, tmp_path, monkeypatch):
    (tmp_path / "spoiled.py").write_text(
        "from fisher_ray.data.digits import Digits, digits\n"
        "def spoiled(split):\n"
        "    part = digits(split)\n"
        "    part._pictures[300] = float('nan')\n"
        "    return part\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    spoiled = ("data.shallow.factory=spoiled:spoiled", "trained_on=null")
    with pytest.raises(DataError, match=r"data\.shallow row 300.*NaN.*on_error: skip"):
        pipeline.run(digits(tmp_path / "run", *spoiled))

    results = pipeline.run(digits(tmp_path / "run", *spoiled, "data.on_error=skip"))
    assert results["accuracy"]["fisher_linear"] > results["accuracy"]["base"]
    assert "row 300" in (tmp_path / "run" / "report" / "report.html").read_text()


def test_a_wrong_model_or_file_is_refused_before_the_folder_is_made(tmp_path):
    for override, error, words in [
        ("model.factory=fisher_ray.models:paper_cnn", ModelError, "fails on samples of shape"),
        ("model.factory=nowhere:net", ConfigError, "model.factory"),
        ("data.test.factory=fisher_ray.data.digits:none", ConfigError, "data.test.factory"),
    ]:
        output = tmp_path / "run"
        with pytest.raises(error, match=words):
            pipeline.run(digits(output, override))
        assert not output.exists()


def test_a_plan_does_nothing(tmp_path):
    planned = pipeline.plan(digits(tmp_path / "run"))

    assert planned["units"] == {"metric": 5, "features/train": 5, "features/test": 5, "linear": 2}
    assert planned["feature_bytes"] == 2 * 640 * (640 * 2 + 4 * 32 + 4 * 10 + 8 + 8)  # ten chunks of 64 rows each
    assert planned["seconds"]["not_estimated"] == []
    assert list(tmp_path.iterdir()) == []
    assert Path(planned["output"]) == tmp_path / "run"


def test_a_run_with_shards_blosc_and_bfloat16(undisturbed, tmp_path):
    output = tmp_path / "run"
    how = ["store.dtype=bfloat16", "store.codec=blosc", "store.shard_rows=128"]
    results = fisher_ray.run(digits(output, *how))

    assert results["accuracy"]["fisher_linear"] == pytest.approx(undisturbed[1]["accuracy"]["fisher_linear"], abs=0.02)
    assert len([path for path in (output / "features/train.zarr/features/c").rglob("0") if path.is_file()]) == 5
    assert verify(str(output / "features/train.zarr")) == []
