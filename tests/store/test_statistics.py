import numpy as np
import pytest

from fisher_ray.store import bars, describe, glance, open_features
from tests.store.conftest import make_rows, write_store


def test_a_glance_tells_of_one_chunk(store):
    found = glance(open_features(store.url))
    assert found["rows"] == [12, 16]
    features = make_rows(12, 16)["features"]
    assert found["features"]["mean"] == pytest.approx(features.mean(), rel=1e-3)
    assert found["features"]["rms"] == pytest.approx(np.sqrt((features**2).mean()), rel=1e-3)
    assert found["features"]["smallest"] == features.min()
    assert found["features"]["largest"] == pytest.approx(features.max(), rel=1e-3)
    assert len(found["features"]["by_column"]) == 5
    assert set(found) == {"rows", "features", "logits"}


def test_a_description_tells_how_well_chunks_are_compressed(tmp_path, codec):
    write_store(str(tmp_path), codec)
    found = describe(str(tmp_path))["arrays"]["features"]
    files = [path for path in (tmp_path / "features/c").rglob("*") if path.is_file()]
    assert found["stored_bytes"] == sum(path.stat().st_size for path in files)
    assert found["compression_ratio"] == round(21 * 15 * 2 / found["stored_bytes"], 3)


@pytest.mark.parametrize(
    ("values", "drawn"),
    [([1, 10, 100], "▁▅█"), ([5.0], "█"), ([0, -1], "  "), ([], " "), ([1, 0, float("nan"), 1e3], "▁  █")],
)
def test_bars_are_on_a_log_scale(values, drawn):
    assert bars(values) == drawn


def test_many_values_are_drawn_in_a_row_of_limited_width():
    drawn = bars(list(np.logspace(0, -6, 1000)))
    assert len(drawn) == 40
    assert drawn[0] == "█"
    assert drawn[-1] == "▁"
    assert list(drawn) == sorted(drawn, reverse=True)
