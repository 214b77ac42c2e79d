import hashlib
import json
import re
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import fisher_ray
from fisher_ray import attribution, pipeline, upkeep
from fisher_ray.cli import main
from fisher_ray.data.digits import digits as load
from fisher_ray.errors import ConfigError, DataError, RequestError, ResumeMismatchError, StoreError
from fisher_ray.models import digits_transform
from fisher_ray.stages.attribution import search
from fisher_ray.store import open_features, verify
from tests.integration.runs import Listening, digits
from tests.reference import attribution as reference

ASKED = {"by": "kernel", "rows": (0, 60), "top": 3, "full": True}
PIXEL = 15
"""Of a picture's 0 to 255, for each of a digit's 0 to 16."""


def transform(picture, generator):
    """Take pictures of digits for digits."""
    array = np.asarray(picture, np.float32)
    return digits_transform(array / (16 * PIXEL) if isinstance(picture, Image.Image) else array, generator)


def ask(run, *, heard=None, **asked):
    return attribution.score(str(run), **asked, progress=heard or Listening())


def exit_code(*arguments):
    with pytest.raises(SystemExit) as caught:
        main([*map(str, arguments)])
    return caught.value.code


@pytest.fixture(scope="module")
def finished(ray_session, tmp_path_factory):
    """A run up to its linear model."""
    output = tmp_path_factory.mktemp("finished") / "run"
    config = digits(output, "trained_on=null", f"data.transform={__name__}:transform")
    pipeline.run(config, until="linear", progress=Listening())
    return output


@pytest.fixture(scope="module")
def scored(finished):
    """The scores of some test rows, in the folder ``one``."""
    return ask(finished, **ASKED, name="one")


@pytest.fixture(scope="module")
def audited(finished):
    return attribution.audit(str(finished), top=50, progress=Listening())


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of pictures: of each digit the first one of the test split."""
    folder, rows = tmp_path_factory.mktemp("photos"), load("test")
    labels = [rows[row][1] for row in range(len(rows))]
    for label in range(10):
        write_picture(folder / str(label) / "picture.png", rows[labels.index(label)][0])
    return folder


def write_picture(path, picture):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray((picture * 16 * PIXEL).astype(np.uint8)).save(path)


def stored(run, name):
    store = open_features(str(run / f"features/{name}.zarr"))
    return {key: store.read(key, 0, store.num_rows) for key in store.arrays}


def label_scores(rows, classes):
    arrays = (rows[name].astype(np.float64) for name in ("features", "logits"))
    return reference.class_scores(*arrays, classes)


def flat(rows):
    return rows["features"].reshape(len(rows["labels"]), -1).astype(np.float64)


def table(place, name):
    return pq.read_table(f"{place}/{name}").to_pydict()


def assert_best(place, scores, query_rows, labels, top, rtol=1e-5):
    """Check the tables of the best against all scores ``(Q, N)``."""
    found = table(place, "top")
    assert [*found] == ["query", "end", "place", "row", "label", "score"]
    lines = {(query, end, place): rest for query, end, place, *rest in zip(*found.values(), strict=True)}
    assert len(lines) == len(found["query"]) == 2 * top * len(query_rows)
    for query, line in zip(query_rows, scores, strict=True):
        for end, sign in (("highest", -1), ("lowest", 1)):
            for number, value in enumerate(sorted(sign * line)[:top]):
                row, label, score = lines[query, end, number]
                assert label == labels[row]
                assert [sign * score, sign * line[row]] == pytest.approx([value] * 2, abs=rtol * np.abs(scores).max())


def digests(place):
    """Of what must not depend on workers and interruptions."""
    paths = sorted(path for path in place.rglob("*") if path.is_file() and "/manifest/" not in path.as_posix())
    kept = {path.relative_to(place).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    return {name: digest for name, digest in kept.items() if name.split("/")[0] in ("top", "queries", "scores.zarr")}


def test_the_tables_say_who_is_nearest_to_each_query(finished, scored):
    train, test, place = stored(finished, "train"), stored(finished, "test"), scored["place"]
    scores = flat(test)[:60] @ flat(train).T

    assert place == f"{finished}/scores/one"
    assert_best(place, scores, range(60), train["labels"], 3)
    queries = table(place, "queries")
    probabilities = reference.softmax(test["logits"][:60].astype(np.float64))
    assert [*queries] == ["row", "label", "taken", "probability", "norm", "novelty"]
    assert queries["row"] == [*range(60)]
    assert queries["label"] == test["labels"][:60].tolist()
    assert queries["taken"] == probabilities.argmax(axis=1).tolist()
    assert queries["probability"] == pytest.approx(probabilities.max(axis=1), rel=1e-5)
    assert queries["norm"] == pytest.approx((flat(test)[:60] ** 2).sum(axis=1), rel=1e-5)
    kept = open_features(f"{place}/scores.zarr")
    np.testing.assert_allclose(kept.read("scores", 0, 600), scores.T, rtol=0, atol=1e-5 * np.abs(scores).max())


def test_what_is_returned_is_written_with_what_was_asked(finished, scored):
    told = json.loads((finished / "scores/one/scores.json").read_text())

    assert (scored["num_queries"], scored["num_rows"], scored["drawn"], scored["pairs"]) == (60, 600, True, None)
    assert told == {
        "schema": 1,
        "asked": told["asked"],
        **{k: scored[k] for k in scored.keys() - {"place", "class_names"}},
    }
    assert {key: told["asked"][key] for key in ASKED} == {**ASKED, "rows": [0, 60]}
    found = table(scored["place"], "top")
    first = [(q, e, p, r) for q, e, p, r in zip(*(found[k] for k in ("query", "end", "place", "row")), strict=True)]
    for item in scored["shown"]:
        for end in ("highest", "lowest"):
            rows = [near["row"] for near in item[end]]
            assert [row for query, e, _, row in sorted(first) if (query, e) == (item["row"], end)] == rows
    assert [item["row"] for item in scored["shown"]] == [*range(12)]
    assert set(scored["seconds"]) == {"search/0", "pictures"}


def test_the_page_shows_pictures_and_needs_nothing_from_elsewhere(finished, scored):
    page = (finished / "scores/one/report.html").read_text()
    assert page.count("<img") == 12 * (1 + 2 * 3)  # of twelve queries, three at either end of each
    assert page.count("data:image/png;base64,") == page.count("<img")
    assert re.findall(r'(?:src|href)\s*=\s*["\']?https?:', page) == []
    assert "Nearest" in page
    assert "the dot product of Fisher features" in page


def test_what_was_asked_before_is_not_done_again(finished, scored):
    before, heard = digests(finished / "scores/one"), Listening()
    assert ask(finished, **ASKED, name="one", heard=heard) == scored
    assert (heard.stages, heard.receipts) == ([], [])
    assert digests(finished / "scores/one") == before


def test_something_else_in_the_same_folder_is_refused(finished, scored):
    with pytest.raises(ResumeMismatchError, match=r"top was 3, now 4"):
        ask(finished, **{**ASKED, "top": 4}, name="one")
    with pytest.raises(ResumeMismatchError, match=r'by was "kernel", now "cosine"'):
        ask(finished, **{**ASKED, "by": "cosine"}, name="one")


def test_two_workers_that_start_anew_write_the_bytes_of_one(finished, scored):
    whole, again = digests(finished / "scores/one"), finished / "scores/two"
    shutil.copytree(finished / "scores/one", again)
    shutil.rmtree(again / "scores.zarr/scores")
    (again / "top/000000000000.parquet").write_bytes(b"of before")
    (again / "top/000000000007.parquet").write_bytes(b"of before")
    heard = Listening()

    ask(finished, **ASKED, name="two", fresh=True, overrides=["runtime.num_workers=2"], heard=heard)

    assert heard.stages == ["search/0", "pictures"]
    assert digests(again) == whole
    assert {name.partition("/")[0] for name in whole} == {"top", "queries", "scores.zarr"}


def test_an_interrupted_search_resumes_to_the_same_bytes(finished, scored):
    def interrupt(name, receipt):
        if name == "search/0" and len(heard.receipts) == 3:
            raise KeyboardInterrupt

    heard, kept = Listening(interrupt), ["runtime.checkpoint_units=1"]
    with pytest.raises(KeyboardInterrupt):
        ask(finished, **ASKED, name="three", overrides=kept, heard=heard)
    assert not (finished / "scores/three/scores.json").exists()
    again = Listening()
    found = ask(finished, **ASKED, name="three", overrides=kept, heard=again)

    assert len([1 for name, _ in again.receipts if name == "search/0"]) <= 2
    assert digests(finished / "scores/three") == digests(finished / "scores/one")
    assert {**found, "place": "", "seconds": {}} == {**scored, "place": "", "seconds": {}}
    assert not (finished / "scores/three/sums").exists()


def test_pictures_from_elsewhere_are_scored_like_those_of_the_run(finished, photos, monkeypatch):
    source = {"format": "images", "path": str(photos)}
    width = open_features(str(finished / "features/test.zarr")).row_bytes("features")
    monkeypatch.setattr(search, "QUERY_BYTES", 4 * width)  # which makes three blocks

    found = ask(finished, queries=source, top=2, name="photos")

    place, train, test = found["place"], stored(finished, "train"), stored(finished, "test")
    assert sorted(path.name for path in (finished / "scores/photos/top").iterdir()) == [
        f"{start:012d}.parquet" for start in (0, 4, 8)
    ]
    queries, labels = table(place, "queries"), test["labels"].tolist()
    assert queries["row"] == [*range(10)]
    assert sorted(queries["label"]) == [*range(10)]
    rows = [labels.index(label) for label in queries["label"]]
    assert queries["norm"] == pytest.approx((flat(test)[rows] ** 2).sum(axis=1), rel=2e-3)
    assert_best(place, flat(test)[rows] @ flat(train).T, range(10), train["labels"], 2, rtol=2e-3)
    assert found["num_queries"] == 10
    page = (finished / "scores/photos/report.html").read_text()
    assert page.count("<img") == 4 * (1 + 2 * 2)  # those of the first block

    rows = load("test")
    write_picture(photos / "3" / "another.png", rows[500][0])
    with pytest.raises(ResumeMismatchError, match="fingerprint of test was"):
        ask(finished, queries=source, top=2, name="photos")
    (photos / "3" / "another.png").unlink()


def test_the_influence_on_what_pictures_are_taken_for_is_told_as_json(finished, photos, capsys):
    source = f"{{format: images, path: {photos}}}"
    asked = ["score", finished, "--queries", source, "--by", "influence", "--target", "taken", "--top", 4]
    asked += ["--rows", "2:9", "--name", "influence"]

    assert exit_code(*asked, "--json") == 0

    *events, done = map(json.loads, capsys.readouterr().out.splitlines())
    assert {event["event"] for event in events} >= {"stage started", "units done", "stage done"}
    assert [event["stage"] for event in events if event["event"] == "stage started"] == [
        *("queries", "search/2", "pictures")
    ]
    assert (done["event"], done["place"]) == ("done", f"{finished}/scores/influence")
    train, test = stored(finished, "train"), stored(finished, "test")
    queries, labels = table(done["place"], "queries"), test["labels"].tolist()
    assert queries["row"] == [*range(2, 9)]
    rows = [labels.index(label) for label in queries["label"]]
    targets = test["logits"].argmax(axis=1)
    assert queries["taken"] == targets[rows].tolist()
    scores = label_scores(test, targets)[rows] @ label_scores(train, train["labels"]).T / 600
    assert_best(done["place"], scores, range(2, 9), train["labels"], 4, rtol=2e-3)

    assert exit_code(*asked, "--quiet") == 0  # told again, without work
    shown = capsys.readouterr().out
    assert "most helpful" in shown
    assert "most harmful" in shown
    assert f"report: {finished}/scores/influence/report.html" in shown.replace("\n", "")


def test_ridge_scores_leave_no_system_behind(finished):
    found = ask(finished, by="ridge", rows=(5, 9), top=2)
    assert re.fullmatch(r"test-5-9-ridge-[0-9a-f]{8}", found["place"].rpartition("/")[2])
    assert set(found["seconds"]) == {"ridge", "search/5", "pictures"}
    assert not (finished / found["place"] / "ridge.zarr").exists()
    scores = table(found["place"], "top")
    assert all((score > 0) == (end == "highest") for score, end in zip(scores["score"], scores["end"], strict=True))


def test_cosines_where_classes_differ_have_a_figure(finished):
    found = ask(finished, queries="shallow", by="class_gap", rows=(0, 30), name="gap")
    train, counts = stored(finished, "train"), np.array(found["pairs"])
    alike = (train["labels"][:30, None] == train["labels"]).sum() - 30  # a sample and itself are no pair
    assert counts.sum(axis=1).tolist() == [alike, 30 * 599 - alike]
    centres = np.linspace(-0.99, 0.99, 100)
    within, between = (counts * centres).sum(axis=1) / counts.sum(axis=1)
    assert within > between + 0.2
    page = (finished / "scores/gap/report.html").read_text()
    assert page.count("<svg") == 1
    assert "Two histograms." in page
    lines = table(found["place"], "top")
    assert all(query != row for query, row in zip(lines["query"], lines["row"], strict=True))
    assert sorted(path.name for path in (finished / "scores/gap/figures").iterdir()) != []


def test_an_audit_lists_the_labels_that_look_wrong(finished, audited):
    place, train = finished / "audit", stored(finished, "train")
    rows = open_features(str(place / "rows.zarr"))
    found = {name: rows.read(name, 0, 600) for name in rows.arrays}

    assert audited["place"] == str(place)
    order = np.lexsort((found["index"], found["probability"]))[:50]
    suspects = table(place, "suspects.parquet")
    names = ["label", "suggested", "margin", "probability", "leverage", "loss", "self_influence"]
    assert [*suspects] == ["row", *names]
    assert suspects["row"] == order.tolist()
    assert all(suspects[name] == found[name][order].tolist() for name in names)
    np.testing.assert_array_equal(found["label"], train["labels"])
    against = int((found["suggested"] != found["label"]).sum())
    assert (audited["num_rows"], audited["num_against"]) == (600, against)
    assert [line["index"] for line in audited["shown"]] == [
        row for row in order.tolist() if found["suggested"][row] != found["label"][row]
    ][:24]
    told = json.loads((place / "audit.json").read_text())
    assert told == {
        "schema": 1,
        "asked": {"top": 50},
        **{k: audited[k] for k in audited.keys() - {"place", "class_names"}},
    }
    assert not (place / "ridge.zarr").exists()
    page = (place / "report.html").read_text()
    assert page.count("<img") == len(audited["shown"]) > 0
    assert re.findall(r'(?:src|href)\s*=\s*["\']?https?:', page) == []


def test_an_audit_is_made_once_and_told_as_a_table(finished, audited, capsys):
    heard = Listening()
    assert attribution.audit(str(finished), top=50, progress=heard) == audited
    assert heard.stages == []
    with pytest.raises(ResumeMismatchError, match="top was 50, now 51"):
        attribution.audit(str(finished), top=51, progress=Listening())
    assert exit_code("audit", finished, "--top", 50, "--quiet") == 0
    shown = capsys.readouterr().out
    assert f"{audited['num_against']:,} of 600 training samples are taken for another class" in shown
    assert f"report: {finished}/audit/report.html" in shown.replace("\n", "")
    assert exit_code("audit", finished, "--top", 50, "--json") == 0
    done = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert done["results"] == audited


def test_a_run_with_scores_in_it_is_whole_and_finished(finished, scored, audited, capsys):
    assert not any(upkeep.verify(str(finished)).values())
    assert exit_code("verify", finished) == 0
    told = capsys.readouterr().out.splitlines()
    assert {line.rpartition(": ")[2] for line in told} == {"whole"}
    assert f"{finished}/features/train.zarr: whole" in told
    for name in ("scores/one/scores.zarr", "audit/rows.zarr"):
        assert verify(str(finished / name)) == []
    heard = Listening()
    config = digits(finished, "trained_on=null", f"data.transform={__name__}:transform")
    pipeline.run(config, until="linear", progress=heard)
    assert heard.stages == []


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"by": "nearest"}, "by: Input should be 'kernel'"),
        ({"rows": (5, 5)}, r"rows \[5, 5\] are none"),
        ({"rows": (5,)}, "rows"),
        ({"rows": (0, 598)}, r"rows \[0, 598\) go beyond the queries' 597"),
        ({"queries": "shallow", "rows": (0, 601)}, "go beyond the queries' 600"),
        ({"top": 0}, "top: Input should be greater than 0"),
        ({"target": "best"}, "target: Input should be 'label' or 'taken'"),
        ({"queries": "train"}, "queries"),
        ({"queries": 12}, "queries"),
        ({"queries": {"format": "images"}}, "takes 'path'"),
        ({"queries": {"format": "images", "path": "nowhere"}}, "queries.path: there is no folder"),
        ({"queries": {"format": "images", "pth": "x"}}, "unknown key 'queries.*pth'"),
        ({"by": "influence", "index": "Flat"}, "an index finds the highest scores by kernel or cosine"),
        ({"overrides": ["metric.rank=3"]}, "--set metric.rank=3: of a finished run, keys of 'runtime' alone"),
        ({"overrides": ["runtime.unit_rows=64"]}, "keys of 'runtime' that the last bits of results depend on"),
        ({"overrides": ["runtime.num_wrkers=2"]}, "unknown key 'runtime.num_wrkers'"),
        ({"name": "a/b"}, "name 'a/b' is not the name of a folder"),
        ({"name": "../one"}, "is not the name of a folder"),
        ({"name": ".."}, "is not the name of a folder"),
        ({"name": "."}, "is not the name of a folder"),
    ],
)
def test_a_wrong_question_is_refused_and_leaves_nothing(finished, tmp_path, asked, words):
    shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("scores", "audit"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=words):
        ask(tmp_path / "run", **{"name": "wrong", **asked})
    assert sorted(tmp_path.rglob("*")) == before


def test_more_queries_than_can_be_kept_in_full_are_refused(finished, monkeypatch):
    monkeypatch.setattr(
        search, "QUERY_BYTES", 5 * open_features(f"{finished}/features/test.zarr").row_bytes("features")
    )
    with pytest.raises(ConfigError, match="full: 5 queries can be kept with all their scores, and there are more"):
        ask(finished, full=True, name="too-many")


def test_no_suspects_are_not_an_audit(finished):
    with pytest.raises(ConfigError, match="top: Input should be greater than or equal to 1"):
        attribution.audit(str(finished), top=0, progress=Listening())


def test_what_is_no_run_is_refused(tmp_path):
    for question in (ask, lambda run: attribution.audit(str(run), progress=Listening())):
        with pytest.raises(ConfigError, match=r"is no run folder: it has no run\.json"):
            question(tmp_path / "nowhere")
    assert [*tmp_path.iterdir()] == []


def changed(finished, folder, change):
    """Return a run folder that says what another one does, but for a change, and holds nothing else."""
    document = json.loads((finished / "run.json").read_text())
    change(document)
    (folder / "run").mkdir()
    (folder / "run/run.json").write_text(json.dumps(document))
    return folder / "run"


@pytest.mark.parametrize("stage", ["metric", "features/train", "features/test", "linear"])
def test_a_run_that_has_not_come_so_far_is_refused(finished, tmp_path, stage):
    run = changed(finished, tmp_path, lambda document: document["stages"].pop(stage))
    with pytest.raises(RequestError, match=f"no finished stage '{stage}', which this needs. Run it again"):
        ask(run, by="ridge")
    if stage != "features/test":
        with pytest.raises(RequestError, match=f"no finished stage '{stage}'"):
            attribution.audit(str(run), progress=Listening())
    assert [path.name for path in run.iterdir()] == ["run.json"]


def test_stacked_views_are_no_rows_to_leave_out(finished, tmp_path):
    stack = {"views": 2, "view_mode": "stack"}
    run = changed(finished, tmp_path, lambda document: document["config"]["linear"].update(stack))
    for question in (lambda: ask(run, by="ridge"), lambda: attribution.audit(str(run), progress=Listening())):
        with pytest.raises(RequestError, match=r"view_mode stack: .*Run with linear\.view_mode: average"):
            question()


@pytest.mark.parametrize(
    ("labels", "target", "words"),
    [
        ("sampled", "label", r"this run's are of sampled labels\. Ask for by: kernel"),
        ("uniform", "taken", r"this run's are of uniform labels\. Ask for by: kernel"),
        ("true", "taken", r"of the true labels alone.*Ask for target: label"),
    ],
)
def test_features_of_other_labels_have_no_influence(finished, tmp_path, labels, target, words):
    run = changed(finished, tmp_path, lambda document: document["config"]["scores"].update(labels=labels))
    with pytest.raises(RequestError, match=words):
        ask(run, by="influence", target=target)


def test_a_run_of_gradnet_alone_is_refused(finished, tmp_path):
    run = changed(finished, tmp_path, lambda document: document["config"]["linear"].update(model="gradnet"))
    with pytest.raises(RequestError, match="GradNet alone, and no Fisher features"):
        ask(run)


def test_pictures_of_another_shape_are_refused(finished, tmp_path):
    write_picture(tmp_path / "0/one.png", np.zeros((9, 9), np.float32))
    with pytest.raises(ConfigError, match=r"samples have shape \(1, 9, 9\), the run's \(1, 8, 8\)"):
        ask(finished, queries={"format": "images", "path": str(tmp_path)}, name="large")
    assert not (finished / "scores/large").exists()


@pytest.mark.parametrize("by", ["influence", "ridge"])
def test_labels_of_other_classes_are_no_target(finished, photos, by):
    with pytest.raises(ConfigError, match=r"classes of their own \('0', '1', '2'\).*Set target: taken"):
        ask(finished, queries={"format": "images", "path": str(photos)}, by=by, name="other")
    assert not (finished / "scores/other").exists()


def test_pictures_that_cannot_be_read_are_named(finished, tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "0/one.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"one\.png \(queries row 0\)"):
        ask(finished, queries={"format": "images", "path": str(tmp_path)}, name="broken")


def test_a_run_of_another_network_or_of_other_data_is_refused(finished, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("fisher_ray.models.digits_mlp", lambda: fisher_ray.models.mlp((64, 33, 10)))
        with pytest.raises(ResumeMismatchError, match="another model or data: the fingerprint of model differs"):
            ask(finished, name="another")
    with monkeypatch.context() as patch:
        made = transform  # which is then another
        patch.setattr(f"{__name__}.transform", lambda picture, generator: made(picture, generator) / 2)
        with pytest.raises(ResumeMismatchError, match="the fingerprint of transformed differs"):
            attribution.audit(str(finished), progress=Listening())
    assert not (finished / "scores/another").exists()


def test_a_network_with_other_weights_is_refused(finished, photos, tmp_path):
    shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("scores", "audit"))
    weights = tmp_path / "run/base/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\x00\x00\x80\x3f")
    with pytest.raises(RequestError, match="network"):
        ask(tmp_path / "run", queries={"format": "images", "path": str(photos)}, name="photos")


def test_what_is_missing_of_an_answer_is_told(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("scores", "audit"))
    ask(tmp_path / "run", rows=(0, 3), name="one")
    (tmp_path / "run/scores/one/top/000000000000.parquet").unlink()

    with pytest.raises(StoreError, match=r"top/000000000000\.parquet was there once.*--fresh"):
        ask(tmp_path / "run", rows=(0, 3), name="one")

    ask(tmp_path / "run", rows=(0, 3), name="one", fresh=True)


def test_a_damaged_answer_is_found_by_verify(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("scores", "audit"))
    ask(tmp_path / "run", rows=(0, 3), name="full", full=True)
    place = f"{tmp_path}/run/scores/full/scores.zarr"
    assert upkeep.verify(str(tmp_path / "run"))[place] == []
    chunk = tmp_path / "run/scores/full/scores.zarr/scores/c/0/0"
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"x")

    (problem,) = upkeep.verify(str(tmp_path / "run"))[place]

    assert "scores/c/0/0" in problem
