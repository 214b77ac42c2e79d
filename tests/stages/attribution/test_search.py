import numpy as np
import pytest

from fisher_ray.config import ScoreConfig
from fisher_ray.errors import ConfigError, DataError
from fisher_ray.stages.attribution import search
from fisher_ray.store import open_features
from tests.reference import attribution as reference
from tests.stages.attribution.asking import (
    Refits,
    all_scores,
    columns,
    featured,
    fit_system,
    full_scores,
    prepare,
    searched,
    stored,
    train_units,
)
from tests.stages.small_runs import NUM_CLASSES

BY = ("kernel", "cosine", "class_gap", "influence", "ridge")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return featured(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def refits(bench):
    return Refits(bench)


def flat(rows):
    return rows["features"].reshape(len(rows["labels"]), -1)


def classes_of(rows, target):
    return rows["labels"] if target == "label" else rows["logits"].argmax(axis=1)


def gap_features(train):
    """What turns features of length one into those of the coordinates in which classes differ, of length one."""
    gap = reference.gaps(reference.unit_length(flat(train)), train["labels"])
    assert 0 < (gap > 0).sum() < len(gap)
    return lambda rows: reference.unit_length(reference.unit_length(flat(rows)) * np.sqrt(gap.clip(min=0)))


def lost(refits, queries, classes):
    """By how much half the squared error at each query is larger when a training row was not fitted to, ``(Q, N)``."""
    z, wanted = refits.standardised(columns(queries)), np.eye(NUM_CLASSES)[classes]
    before = 0.5 * ((refits.whole(z) - wanted) ** 2).sum(axis=1)
    return np.stack([0.5 * ((fitted(z) - wanted) ** 2).sum(axis=1) - before for fitted in refits.without], axis=1)


def expected_scores(bench, by, name="test", target="label", refits=None):
    train, queries = stored(bench, "train"), stored(bench, name)
    classes = classes_of(queries, target)
    if by == "ridge":
        return lost(refits, queries, classes)
    if by == "influence":
        scores = [
            reference.class_scores(rows["features"], rows["logits"], which)
            for rows, which in ((queries, classes), (train, train["labels"]))
        ]
        return scores[0] @ scores[1].T / len(train["labels"])
    made = {"kernel": flat, "cosine": lambda rows: reference.unit_length(flat(rows))}
    make = made[by] if by in made else gap_features(train)
    return make(queries) @ make(train).T


def assert_close(found, expected):
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.nanmax(np.abs(expected)))


@pytest.mark.parametrize(("by", "target"), [*((by, "label") for by in BY), ("influence", "taken"), ("ridge", "taken")])
def test_scores_of_all_units_are_those_of_whole_matrices(bench, refits, by, target):
    prepare(bench, by)
    expected = expected_scores(bench, by, target=target, refits=refits)
    assert len(train_units(bench)) == 5
    assert_close(all_scores(bench, by=by, target=target), expected)


def test_the_targets_differ_where_the_network_is_wrong(bench, refits):
    test = stored(bench, "test")
    wrong = classes_of(test, "label") != classes_of(test, "taken")
    assert 0 < wrong.sum() < len(wrong)
    for by in ("influence", "ridge"):
        one, other = (expected_scores(bench, by, target=target, refits=refits) for target in ("label", "taken"))
        np.testing.assert_array_equal((one != other).any(axis=1), wrong)


@pytest.mark.parametrize("by", BY)
def test_a_training_row_is_not_compared_with_itself(bench, refits, by):
    prepare(bench, by)
    expected = expected_scores(bench, by, "train", refits=refits)
    np.fill_diagonal(expected, np.nan)
    assert_close(all_scores(bench, queries="shallow", by=by), expected)


@pytest.mark.parametrize("by", BY)
def test_the_best_are_the_first_and_the_last_of_all(bench, by):
    prepare(bench, by)
    (found,) = searched(bench, by=by, top=4, rows=(3, 30))
    scores, labels = all_scores(bench, by=by, rows=(3, 30)), stored(bench, "train")["labels"]
    for end, sign in (("highest", -1), ("lowest", 1)):
        expected = reference.best(scores, np.arange(len(labels)), labels, 4, sign)
        for name, values in expected.items():
            np.testing.assert_array_equal(found[f"{end}-{name}"], values)


@pytest.mark.parametrize("queries", ["test", "shallow"])
@pytest.mark.parametrize("by", ["cosine", "class_gap"])
def test_pairs_are_counted_by_their_cosine(bench, by, queries):
    prepare(bench, by)
    (found,) = searched(bench, by=by, queries=queries)
    name = {"test": "test", "shallow": "train"}[queries]
    cosines, rows = expected_scores(bench, by, name), stored(bench, name)
    alike = rows["labels"][:, None] == stored(bench, "train")["labels"]
    meant = np.full(alike.shape, True) if queries == "test" else ~np.eye(len(alike), dtype=bool)
    expected = np.stack([np.histogram(cosines[pairs & meant], 100, (-1, 1))[0] for pairs in (alike, ~alike)])
    assert found["pairs"].sum(axis=1).tolist() == expected.sum(axis=1).tolist()
    assert np.abs(found["pairs"] - expected).sum() <= 4  # two pairs beside an edge, in float32


def test_only_cosines_are_counted(bench):
    prepare(bench, "ridge")
    assert [by for by in BY if "pairs" in searched(bench, by=by)[0]] == ["cosine", "class_gap"]


def test_rows_that_count_more_change_more(tmp_path):
    bench = featured(tmp_path, linear={"class_weights": {1: 2.5, 2: 0.5}})
    counts = np.array([1, 2.5, 0.5])[stored(bench, "train")["labels"]]
    fit_system(bench)
    expected = expected_scores(bench, "ridge", refits=Refits(bench, counts=counts))
    assert_close(all_scores(bench, by="ridge"), expected)


def test_without_the_last_hidden_layer_the_features_alone_are_refitted(tmp_path):
    bench = featured(tmp_path, linear={"hidden": False})
    fit_system(bench)
    train, test = stored(bench, "train"), stored(bench, "test")
    z = reference.standardised(flat(train), np.ones(70))
    targets, wanted = (np.eye(NUM_CLASSES)[rows["labels"]] for rows in (train, test))
    both = reference.standardised(np.concatenate([flat(train), flat(test)]), np.repeat([1.0, 0.0], [70, 42]))
    errors = [
        0.5 * ((reference.fit(z, targets, np.ones(70), 0.02 * 70, row)(both[70:]) - wanted) ** 2).sum(axis=1)
        for row in (None, 0, 33, 69)
    ]
    expected = np.stack([error - errors[0] for error in errors[1:]], axis=1)
    assert_close(all_scores(bench, by="ridge")[:, [0, 33, 69]], expected)


def test_of_stacked_views_the_mean_is_compared(tmp_path):
    bench = featured(tmp_path, linear={"views": 2, "view_mode": "stack"})
    train, test = (stored(bench, name)["features"] for name in ("train", "test"))
    assert train.shape[1] == 2
    train, test = (x.mean(axis=1).reshape(len(x), -1) for x in (train, test))
    assert_close(all_scores(bench, by="kernel"), test @ train.T)
    assert_close(all_scores(bench, by="cosine"), reference.unit_length(test) @ reference.unit_length(train).T)
    prepare(bench, "class_gap")
    gap = reference.gaps(reference.unit_length(train), stored(bench, "train")["labels"]).clip(min=0)
    train, test = (reference.unit_length(reference.unit_length(x) * np.sqrt(gap)) for x in (train, test))
    assert_close(all_scores(bench, by="class_gap"), test @ train.T)


@pytest.mark.parametrize("by", ["kernel", "ridge"])
@pytest.mark.parametrize("rows", [None, (5, 41)])
def test_queries_in_blocks_are_those_in_one(bench, monkeypatch, by, rows):
    prepare(bench, by)
    whole = all_scores(bench, by=by, rows=rows)
    store = open_features(bench.url("features/test.zarr"))
    copies = {"kernel": 1, "ridge": search.SOLVED_COPIES}[by]
    monkeypatch.setattr(search, "QUERY_BYTES", 10 * copies * store.row_bytes("features"))

    blocks = search.query_blocks(
        ScoreConfig.checked({"by": by, "rows": rows}), store.num_rows, store.row_bytes("features")
    )

    first, last = rows or (0, 42)
    assert [row for block in blocks for row in block] == [*range(first, last)]
    assert {len(block) for block in blocks[:-1]} == {10}
    assert_close(all_scores(bench, by=by, rows=rows), whole)


def test_a_query_that_is_too_large_for_a_block_is_one_of_its_own(bench, monkeypatch):
    monkeypatch.setattr(search, "QUERY_BYTES", 1)
    store = open_features(bench.url("features/test.zarr"))
    blocks = search.query_blocks(ScoreConfig.checked({"rows": (2, 5)}), store.num_rows, store.row_bytes("features"))
    assert blocks == [range(2, 3), range(3, 4), range(4, 5)]


@pytest.mark.parametrize(("queries", "num_rows"), [("test", 42), ("shallow", 70)])
def test_rows_beyond_the_queries_are_refused(bench, queries, num_rows):
    request = ScoreConfig.checked({"queries": queries, "rows": (10, num_rows + 1)})
    with pytest.raises(ConfigError, match=rf"rows \[10, {num_rows + 1}\) go beyond the queries' {num_rows}"):
        search.query_blocks(request, search.query_store(bench, request, "scores/asked").num_rows, 4)


@pytest.mark.parametrize("queries", ["test", "shallow"])
def test_all_scores_are_kept_when_that_is_asked_for(bench, queries):
    name = {"test": "test", "shallow": "train"}[queries]
    expected = expected_scores(bench, "influence", name)
    kept = full_scores(bench, f"scores/full-{queries}", len(expected), by="influence", queries=queries)
    assert_close(kept.read("scores", 0, 70).T.astype(np.float64), expected)  # a row's own too
    assert kept.read("index", 0, 70).tolist() == [*range(70)]


GONE = (3, *range(16, 32), 40)
"""Training rows that are skipped: a unit of them, too."""


@pytest.fixture(scope="module")
def lacking(tmp_path_factory):
    return featured(tmp_path_factory.mktemp("lacking"), bad=GONE, data={"on_error": "skip"})


def test_rows_that_the_features_skip_have_no_scores(lacking):
    bench, gone = lacking, GONE
    expected = expected_scores(bench, "kernel")
    rows = [row for row in range(70) if row not in gone]
    found = all_scores(bench, by="kernel")
    assert_close(found[:, rows], expected)
    assert np.isnan(found[:, gone]).all()

    kept = full_scores(bench, "scores/full", 42, by="kernel")

    assert sorted(kept.skipped) == [*gone]
    assert kept.skipped == bench.train_store.skipped
    read = kept.read_kept(["scores", "index"], 0, 70)
    assert read["index"].tolist() == rows
    assert_close(read["scores"].T.astype(np.float64), expected)
    expected = expected_scores(bench, "kernel", "train")
    np.fill_diagonal(expected, np.nan)
    assert_close(all_scores(bench, by="kernel", queries="shallow")[:, rows], expected)


def test_queries_that_were_all_skipped_are_refused(lacking):
    with pytest.raises(DataError, match=r"of the queries \[17, 20\) none is left"):
        searched(lacking, queries="shallow", rows=(17, 20))


def test_features_of_true_labels_are_scores_of_them(tmp_path):
    bench = featured(tmp_path, scores={"labels": "true"})
    train, test = (stored(bench, name)["features"] for name in ("train", "test"))
    assert train.ndim == 2
    assert_close(all_scores(bench, by="influence"), test @ train.T / 70)


def test_features_in_float16_give_the_scores_of_what_is_stored(tmp_path):
    bench = featured(tmp_path, store={"dtype": "float16"})
    for by in ("kernel", "influence"):
        assert_close(all_scores(bench, by=by), expected_scores(bench, by))


def spoil(monkeypatch, rows, value):
    """Have some training rows' vectors be of a value."""
    vectors = search.vectors

    def spoiled(*arguments):
        made = vectors(*arguments).clone()
        made[np.isin(arguments[2]["index"].numpy(), rows)] = value
        return made

    monkeypatch.setattr(search, "vectors", spoiled)


@pytest.mark.parametrize("top", [2, 70])
@pytest.mark.parametrize("value", [3e38, -3e38, np.nan])
@pytest.mark.parametrize("rows", [[20], [0, 69], range(70)])
def test_a_score_that_is_no_number_is_refused(bench, monkeypatch, rows, value, top):
    spoil(monkeypatch, rows, value)
    with pytest.raises(DataError, match="a score is NaN or infinite"):
        searched(bench, by="kernel", queries="shallow", rows=(18, 22), top=top)
