"""What a run would do, against what runs then do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisher_ray.config import Config
from fisher_ray.stages import Facts, planning
from fisher_ray.storage import Storage
from tests.integration.runs import digits
from tests.stages.small_runs import fit_metric, small_bench, write_features
from tests.test_config import minimal

SHAPES = {"conv0": (4, 28), "fc": (10, 101)}


def facts(shallow: int = 1000, test: int = 300, hidden: int | None = 100) -> Facts:
    num_parameters = sum(outputs * inputs for outputs, inputs in SHAPES.values())
    return Facts({"shallow": shallow, "test": test}, {}, (1, 8, 8), 10, hidden, SHAPES, num_parameters, 64, 64)


def config(**replaced) -> Config:
    return Config.from_dict(minimal(**replaced))


@given(
    st.integers(1, 10**6), st.integers(1, 64), st.integers(1, 16), st.integers(1, 40000), st.floats(0.001, 1), st.data()
)
def test_units_tile_the_rows(num_rows, chunk_rows, chunks, columns, fraction, data):
    given_config = config(
        store={"chunk_rows": 64 * chunk_rows},
        runtime={"unit_rows": 64 * chunk_rows * chunks},
        metric={"fraction": fraction},
        linear={"validation": 0.25},
    )
    found = facts(num_rows)
    units = planning.split_units(given_config, found, "shallow")
    parts = {"fit": 0.75, "validation": 0.25}
    linear = {part: planning.linear_units(given_config, found, columns, part) for part in parts}
    for made in (units, *linear.values()):
        assert [unit.index for unit in made] == list(range(len(made)))
        assert [unit.start for unit in made] == [0, *(unit.stop for unit in made[:-1])]
        assert made[-1].stop == num_rows
    assert all(unit.start % (64 * chunk_rows) == 0 for unit in units)  # whole chunks, which have one writer
    for part, share in parts.items():
        least = max(planning.MIN_LEAF_ROWS, columns // 2)
        number = len(linear[part])
        assert number & (number - 1) == 0  # workers end together, and so do merges
        assert len(linear[part][0]) - len(linear[part][-1]) <= number
        assert number == 1 or share * num_rows / number >= least / 2**0.5
        assert share * num_rows / number <= least * 2**0.5 + 1
    metric = planning.metric_units(given_config, found)
    assert set(metric) <= set(units)
    assert len(units) * fraction - 1e-6 <= len(metric) <= len(units) * fraction + 1
    assert data.draw(st.sampled_from(metric)) in units


@pytest.mark.parametrize(
    ("labels", "hidden", "use_hidden", "features", "columns"),
    [
        ("all", 100, True, 640, 740),
        ("all", 100, False, 640, 640),
        ("all", None, True, 640, 640),
        ("sampled", 100, True, 64, 164),
    ],
)
def test_columns_are_the_features_of_all_scores_and_the_hidden_layer(labels, hidden, use_hidden, features, columns):
    given_config = config(scores={"labels": labels}, linear={"hidden": use_hidden})

    assert planning.num_features(given_config, facts(hidden=hidden), 64) == features
    assert planning.num_columns(given_config, facts(hidden=hidden), 64) == columns


def test_a_plan_counts_what_a_run_then_writes(tmp_path):
    bench = small_bench(tmp_path, store={"dtype": "float16"}, compression={"dim": 12}, metric={"rank": 7})
    planned = planning.describe_run(bench.config, bench.facts)
    fit_metric(bench)
    for name, split in (("train", "shallow"), ("test", "test")):
        units = write_features(bench, name, split)
        assert planned["units"][f"features/{name}"] == len(units)

    assert bench.metric.rank == 7
    sizes = Storage(bench.url("features")).sizes()
    assert planned["feature_objects"] == len(sizes)
    assert planned["feature_bytes"] == (72 + 48) * (3 * 7 * 2 + 5 * 4 + 3 * 4 + 8 + 8)  # in chunks of eight rows
    chunks = [size for name, size in sizes.items() if "/c/" in name]
    assert planned["feature_bytes"] == sum(chunks) - 4 * len(chunks)  # a checksum each
    assert planned["linear_columns"] == 3 * 7 + 5
    assert (planned["compressed_coordinates"], planned["features_per_sample"]) == (12, 21)


@pytest.mark.parametrize(("kind", "dim"), [("kronecker", 64), ("kronecker", 4096), ("identity", 64)])
def test_a_plan_is_of_plain_values_and_leaves_torch_as_it_was(tmp_path, kind, dim):
    from fisher_ray.stages import inspect_request

    made = digits(
        tmp_path, f"compression={{kind: {kind}, dim: {dim}}}", "scores.parameters=fc1.*", "runtime.num_workers=4"
    )
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    found = inspect_request(made.located())
    planned = planning.describe_run(made, found)

    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert planned["parameters"] == 330
    assert planned["compressed_coordinates"] == (64 if (kind, dim) == ("kronecker", 64) else 330)
    assert planned["features_per_sample"] == 10 * min(64, planned["compressed_coordinates"])
    assert all(isinstance(value, int) and value > 0 for value in planned["worker_memory_bytes"].values())
    assert not list(tmp_path.iterdir())
