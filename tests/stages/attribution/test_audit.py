import io
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from fisher_ray.data import plan_units
from fisher_ray.linear import ridge_path
from fisher_ray.stages import shallow
from fisher_ray.stages.attribution import audit
from fisher_ray.stages.attribution.ridge import RIDGE, load_ridge
from fisher_ray.storage import Storage
from fisher_ray.store import StoreWriter, create_store, open_features, seal
from tests.reference import attribution as reference
from tests.stages.attribution.asking import (
    FOLDER,
    PENALTY,
    Refits,
    balanced,
    columns,
    featured,
    fit_system,
    stored,
    train_units,
)
from tests.stages.small_runs import NUM_CLASSES, small_config

TEMPERATURE = 0.4


def audited(bench, folder=FOLDER):
    """Write the audit's rows, and return them."""
    url = bench.url(f"{folder}/{audit.ROWS}")
    create_store(url, audit.audit_spec(bench.train_store, bench.config, NUM_CLASSES))
    for unit in train_units(bench):
        receipt, nothing = audit.audit_rows(bench, unit, 1, folder=folder, temperature=TEMPERATURE)
        assert nothing is None
        assert receipt.unit == unit
        assert receipt.num_bytes > 0
    seal(url, len(train_units(bench)))
    return open_features(url)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    made = featured(tmp_path_factory.mktemp("bench"))
    fit_system(made)
    return made


@pytest.fixture(scope="module")
def rows(bench):
    return audited(bench)


def read(store):
    return store.read_kept([*store.arrays], 0, store.num_rows)


def assert_judged_by_refits(found, bench, refits):
    labels, at = stored(bench, "train")["labels"], np.arange(len(refits.z))
    without = np.stack([fitted(refits.z[row]) for row, fitted in enumerate(refits.without)])
    own, others = without[at, labels], np.where(np.eye(NUM_CLASSES, dtype=bool)[labels], -np.inf, without).max(axis=1)
    np.testing.assert_allclose(found["margin"], own - others, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(found["suggested"], without.argmax(axis=1))
    probability = reference.softmax(without / TEMPERATURE)[at, labels]
    np.testing.assert_allclose(found["probability"], probability, rtol=0, atol=1e-5)
    leverages = reference.leverages(refits.z, refits.counts, refits.ridge)
    np.testing.assert_allclose(found["leverage"], leverages, rtol=1e-5, atol=1e-6)


def test_a_row_is_judged_by_the_fit_to_all_others(bench, rows):
    found = read(rows)
    assert (len(found["margin"]), rows.chunk_rows, set(found)) == (70, 8, set(audit.COLUMNS))
    assert 0 < (found["margin"] < 0).sum() < 70
    assert_judged_by_refits(found, bench, Refits(bench))


def test_with_weighted_classes_too(tmp_path):
    bench = featured(tmp_path, linear={"class_weights": "balanced"})
    fit_system(bench)
    counts = balanced(stored(bench, "train")["labels"])
    assert len(set(counts)) == NUM_CLASSES
    assert_judged_by_refits(read(audited(bench)), bench, Refits(bench, counts=counts))


def test_of_the_network_the_loss_and_the_influence_on_itself_are_told(bench, rows):
    found, train = read(rows), stored(bench, "train")
    labels, at = train["labels"], np.arange(70)
    np.testing.assert_array_equal(found["label"], labels)
    np.testing.assert_array_equal(found["index"], at)
    loss = -np.log(reference.softmax(train["logits"])[at, labels])
    np.testing.assert_allclose(found["loss"], loss, rtol=1e-5, atol=1e-7)
    scores = reference.class_scores(train["features"], train["logits"], labels)
    np.testing.assert_allclose(found["self_influence"], (scores**2).sum(axis=1) / 70, rtol=1e-5)


def test_features_of_drawn_labels_have_no_influence_to_tell_of(tmp_path):
    bench = featured(tmp_path, scores={"labels": "sampled"})
    fit_system(bench)
    found = read(audited(bench))
    assert set(audit.COLUMNS) - set(found) == {"self_influence"}
    assert_judged_by_refits(found, bench, Refits(bench))


def test_of_true_labels_it_is_that_of_the_features_alone(tmp_path):
    bench = featured(tmp_path, scores={"labels": "true"})
    fit_system(bench)
    features = stored(bench, "train")["features"]
    found = read(audited(bench))["self_influence"]
    np.testing.assert_allclose(found, (features**2).sum(axis=1) / 70, rtol=1e-5)


def test_the_model_is_that_of_the_run(tmp_path):
    bench = featured(tmp_path, linear={"ranks": [10], "dampings": [0.3]})
    fit_system(bench, rank=10, damping=0.3)
    system, train = load_ridge(bench.url(f"{FOLDER}/{RIDGE}")), stored(bench, "train")
    x = torch.from_numpy(columns(train)).float()
    sums = [shallow.gram_sums(bench, unit, part) for unit in train_units(bench) for part in ("fit", "validation")]
    total = {name: sum(part[name] for part in sums) for name in sums[0]}
    (model,) = ridge_path(shallow.GramSum.from_arrays(total), [PENALTY], shallow.ridge_columns(bench, 10, 0.3))
    assert len(system.index) < x.shape[1]
    torch.testing.assert_close(system.scores(system.standardised(x)).float(), model.scores(x), rtol=0, atol=1e-5)


def test_rows_that_the_features_skip_are_skipped(tmp_path):
    gone = (3, *range(16, 32), 40)  # a unit of them
    bench = featured(tmp_path, bad=gone, data={"on_error": "skip"})
    fit_system(bench)
    store = audited(bench)
    assert sorted(store.skipped) == [*gone]
    assert store.skipped == bench.train_store.skipped
    found = read(store)
    assert found["index"].tolist() == [row for row in range(70) if row not in gone]
    assert_judged_by_refits(found, bench, Refits(bench))
    listed = audit.list_suspects(bench, folder=FOLDER, top=70, num_shown=3)
    assert listed["num_rows"] == 52


def suspects(bench, folder=FOLDER):
    return pq.read_table(io.BytesIO(bench.storage.read_bytes(f"{folder}/{audit.SUSPECTS}"))).to_pydict()


@pytest.mark.parametrize("top", [1, 5, 8, 33, 70, 1000])
def test_suspects_are_the_rows_whose_labels_have_the_smallest_probabilities(bench, rows, top):
    found = read(rows)
    listed = audit.list_suspects(bench, folder=FOLDER, top=top, num_shown=6)

    order = np.lexsort((found["index"], found["probability"]))[:top]
    table = suspects(bench)
    assert [*table] == ["row", *[name for name in audit.COLUMNS if name != "index"]]
    for name, values in table.items():
        assert values == found["index" if name == "row" else name][order].tolist()
    against = [row for row in order.tolist() if found["suggested"][row] != found["label"][row]]
    assert (listed["num_rows"], listed["num_against"]) == (70, int((found["margin"] < 0).sum()))
    assert [line["index"] for line in listed["shown"]] == against[:6]
    assert all(line == {name: found[name][line["index"]].item() for name in audit.COLUMNS} for line in listed["shown"])


def handwritten(folder, probabilities, chunk_rows=4):
    """Return what lists suspects, of rows whose labels have these probabilities; those below a half are against it."""
    bench = SimpleNamespace(url=lambda name: f"{folder}/{name}", storage=Storage(str(folder)))
    train = SimpleNamespace(num_rows=len(probabilities), chunk_rows=chunk_rows)
    url = bench.url(f"audit/{audit.ROWS}")
    config = small_config(folder, runtime={"unit_rows": chunk_rows}, store={"chunk_rows": chunk_rows})
    create_store(url, audit.audit_spec(train, config, NUM_CLASSES))
    units = plan_units(len(probabilities), chunk_rows)
    for unit in units:
        index = np.arange(unit.start, unit.stop)
        arrays = {name: np.zeros(len(unit), dtype) for name, dtype in audit.COLUMNS.items()}
        probability = np.float32(probabilities)[index]
        margin = np.where(probability < 0.5, -1, 1).astype(np.float32)
        arrays |= {"index": index, "probability": probability, "margin": margin, "suggested": (margin < 0).astype(int)}
        StoreWriter(url).write_unit(unit, arrays)
    seal(url, len(units))
    return bench


@pytest.mark.parametrize("top", range(1, 12))
def test_of_equal_probabilities_the_lower_row_comes_first(tmp_path, top):
    probabilities = [0.75, 0.25, 0.75, 0.25, 0.75, 0.75, 0.25, 1, 0, 0.75, 0.25]
    bench = handwritten(tmp_path, probabilities)
    listed = audit.list_suspects(bench, folder="audit", top=top, num_shown=2)
    assert suspects(bench, "audit")["row"] == np.lexsort((np.arange(11), probabilities))[:top].tolist()
    assert (listed["num_rows"], listed["num_against"]) == (11, 5)
    assert [line["index"] for line in listed["shown"]] == [8, 1][:top]
