import sys
from functools import partial, reduce

import numpy as np
import pytest

from fisher_ray.config import ScoreConfig
from fisher_ray.errors import DataError, RequestError
from fisher_ray.stages.attribution import index, search
from tests.stages.attribution.asking import FOLDER, all_scores, featured, searched, train_units

pytest.importorskip("faiss")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return featured(tmp_path_factory.mktemp("bench"), bad=(3, *range(16, 32), 40), data={"on_error": "skip"})


def made(bench, by, factory="Flat"):
    """Make an index, and return its folder."""
    folder = f"indexes/{by}-{factory}"
    found = index.train_index(bench, factory=factory, by=by, folder=folder)
    assert found == {"dim": bench.metric.rank * 3, "trained_on": 52}
    for unit in train_units(bench):
        receipt, nothing = index.fill_index(bench, unit, 1, by=by, folder=folder)
        assert nothing is None
        assert receipt.num_bytes > 0
    return folder


def looked_up(bench, folder, start=0, stop=42, **request):
    """Search an index as :func:`searched` searches the store."""
    bench._kept.pop("queries", None)
    asked = ScoreConfig.checked({**request, "index": "Flat"}).model_dump(mode="json")
    given = {"request": asked, "folder": FOLDER, "start": start, "stop": stop, "index": folder}
    parts = [index.search_index(bench, unit, 1, **given)[1] for unit in train_units(bench)]
    return reduce(partial(search.merge_found, bench), parts)


@pytest.mark.parametrize("top", [1, 5, 60])
@pytest.mark.parametrize("queries", ["test", "shallow"])
@pytest.mark.parametrize("by", ["kernel", "cosine"])
def test_a_flat_index_finds_the_highest_of_all(bench, by, queries, top):
    stop = {"test": 42, "shallow": 70}[queries]
    found = looked_up(bench, made(bench, by), 0, stop, by=by, queries=queries, top=top)
    (exact,) = searched(bench, by=by, queries=queries, top=top)
    for name in ("rows", "labels"):
        np.testing.assert_array_equal(found[f"highest-{name}"], exact[f"highest-{name}"])
    np.testing.assert_allclose(found["highest-scores"], exact["highest-scores"], rtol=1e-5, atol=1e-5)
    assert (found["lowest-rows"] == -1).all()


def test_more_of_an_index_finds_more_of_the_highest(bench):
    folder = made(bench, "cosine", "IVF4,Flat")
    best = np.nanargmax(all_scores(bench, by="cosine"), axis=1)
    shares = []
    for probes in (1, 4):
        found = looked_up(bench, folder, by="cosine", top=1, index_parameters=f"nprobe={probes}")
        shares.append(float((found["highest-rows"][:, 0] == best).mean()))
    assert shares[0] < shares[1] == 1.0


@pytest.mark.parametrize("factory", ["Nonsense", "IVF64,Flat"])
def test_an_index_that_cannot_be_made_is_refused(bench, factory):
    with pytest.raises(
        RequestError, match=rf"FAISS makes no index '{factory}' of 72 dimensions, trained on 52 rows: \S"
    ):
        index.train_index(bench, factory=factory, by="kernel", folder="indexes/none")


def test_an_index_that_rows_cannot_be_added_to_is_refused(bench):
    with pytest.raises(RequestError, match="FAISS"):
        made(bench, "kernel", "IDMap,Flat")


def test_a_parameter_that_an_index_does_not_have_is_refused(bench):
    with pytest.raises(RequestError, match=r"index_parameters 'nprob=3': \S.*nprobe=16"):
        looked_up(bench, made(bench, "kernel"), by="kernel", index_parameters="nprob=3")


def test_a_part_of_other_rows_is_refused(bench):
    folder = made(bench, "kernel")
    first, second = (f"{folder}/{index.part_name(unit)}" for unit in (0, 1))
    bench.storage.write_bytes(first, bench.storage.read_bytes(second))
    with pytest.raises(DataError, match="has 0 rows of unit 0, the features 15"):
        looked_up(bench, folder, by="kernel")


def test_a_damaged_part_is_told_by_its_name(bench):
    folder = made(bench, "kernel", "IVF3,Flat")
    name = f"{folder}/{index.part_name(0)}"
    bench.storage.write_bytes(name, bench.storage.read_bytes(name)[:40])
    with pytest.raises(DataError, match=f"{name} is damaged: .*Remove {folder}; it is made anew"):
        looked_up(bench, folder, by="kernel")


def test_without_faiss_an_index_is_refused_with_advice(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(RequestError, match=r"pip install faiss-cpu; or search exactly, without --index"):
        index.train_index(bench, factory="Flat", by="kernel", folder="indexes/none")
