import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fisher_ray.config import ScoreConfig
from fisher_ray.stages.attribution import listing
from tests.reference import attribution as reference
from tests.stages.attribution.asking import FOLDER, featured, searched, stored


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return featured(tmp_path_factory.mktemp("bench"), bad=(3, 40), data={"on_error": "skip"})


def listed(bench, **request):
    """Return what is told of the queries, and both tables."""
    (found,) = searched(bench, **request)
    start, stop = request.get("rows") or (0, 42)
    asked = ScoreConfig.checked(request).model_dump(mode="json")
    told = listing.list_best(bench, found, request=asked, folder=FOLDER, start=start, stop=stop)
    tables = [
        pq.read_table(io.BytesIO(bench.storage.read_bytes(f"{FOLDER}/{name}/{listing.block_name(start)}"))).to_pydict()
        for name in ("queries", "top")
    ]
    return told, *tables


def norms(bench, rows):
    """The whitened and the plain square norm of each sample."""
    plain = (bench.metric.eigvals + bench.metric.dampings).double().numpy()
    squares = rows["features"] ** 2
    return np.stack([squares.sum(axis=(1, 2)), (squares * plain).sum(axis=(1, 2))], axis=1)


def test_each_query_is_described(bench):
    told, queries, _ = listed(bench, rows=(4, 19))
    test = {name: values[4:19] for name, values in stored(bench, "test").items()}
    assert queries["row"] == [*range(4, 19)]
    assert queries["label"] == test["labels"].tolist()
    probabilities = reference.softmax(test["logits"])
    assert queries["taken"] == probabilities.argmax(axis=1).tolist()
    assert queries["probability"] == pytest.approx(probabilities.max(axis=1), rel=1e-6)
    assert queries["norm"] == pytest.approx(norms(bench, test)[:, 0], rel=1e-5)
    assert told["num_queries"] == 15
    assert [item["row"] for item in told["shown"]] == [*range(4, 4 + listing.NUM_SHOWN)]


@pytest.mark.parametrize("by", ["kernel", "cosine"])
def test_a_query_is_as_novel_as_its_norms_are_off_those_of_the_training_samples(bench, by):
    _, queries, _ = listed(bench, by=by)
    train, test = (np.log(norms(bench, stored(bench, name))) for name in ("train", "test"))
    apart, precision = test - train.mean(axis=0), np.linalg.inv(np.cov(train.T, bias=True))
    expected = np.sqrt(np.einsum("qi,ij,qj->q", apart, precision, apart))
    assert queries["novelty"] == pytest.approx(expected, rel=1e-3)
    assert max(expected) > 2


def test_training_samples_are_one_standard_deviation_in_each_direction_off_themselves(bench):
    _, queries, _ = listed(bench, queries="shallow", rows=(0, 70))
    assert queries["row"] == [row for row in range(70) if row not in (3, 40)]
    assert np.mean(np.square(queries["novelty"])) == pytest.approx(2, rel=1e-3)


def test_each_query_has_its_best_in_order(bench):
    told, _, top = listed(bench, top=6, rows=(0, 3))
    lines = [*zip(*top.values(), strict=True)]
    assert [*top] == ["query", "end", "place", "row", "label", "score"]
    assert {(query, end): [] for query, end, *_ in lines}.keys() == {
        (query, end) for query in range(3) for end in ("highest", "lowest")
    }
    labels = stored(bench, "train")["labels"]
    kept = [row for row in range(70) if row not in (3, 40)]
    for item in told["shown"]:
        for end in ("highest", "lowest"):
            mine = [(*rest,) for query, which, *rest in lines if (query, which) == (item["row"], end)]
            assert [place for place, *_ in mine] == [*range(6)]
            assert all(label == labels[kept.index(row)] for _, row, label, _ in mine)
            assert [score for *_, score in mine] == sorted((s for *_, s in mine), reverse=end == "highest")
            shown = [(near["row"], near["label"], near["score"]) for near in item[end]]
            assert shown == [(row, label, score) for _, row, label, score in mine[: listing.NUM_NEAR]]


def test_where_there_are_fewer_training_samples_there_are_fewer_lines(bench):
    _, _, top = listed(bench, top=100, rows=(7, 8))
    assert len(top["row"]) == 2 * 68
    assert sorted(top["row"][:68]) == [row for row in range(70) if row not in (3, 40)]


def test_the_pictures_are_those_of_the_samples(bench):
    assert listing.draw_shown(bench, shown=[["test", 3], ["shallow", 69]], folder=FOLDER) == {"drawn": True}
    for name in ("test-3", "shallow-69"):
        with Image.open(io.BytesIO(bench.storage.read_bytes(f"{FOLDER}/{listing.PICTURES}/{name}.png"))) as picture:
            assert picture.size == (3, 4)
