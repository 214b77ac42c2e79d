from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import fisher_ray
from fisher_ray.config import Config
from fisher_ray.errors import ConfigError

CONFIGS = Path(__file__).parents[1] / "jobs" / "configs"
CIFAR10 = CONFIGS / "cifar10.yaml"
DEMO = Path(fisher_ray.__file__).with_name("demo.yaml")


def minimal(**replaced: Any) -> dict[str, Any]:
    source = {"path": "x.parquet"}
    values = {
        "output": "out",
        "data": {"train": source, "shallow": source, "test": source},
        "model": {"factory": "module:function"},
        "base": {"steps": 1},
    }
    return values | replaced


def test_cifar10_configuration_is_the_recipe():
    config = Config.from_yaml(CIFAR10)

    assert config.data.train is not None
    assert (config.data.train.rows, config.data.shallow.rows, config.data.test.rows) == (
        (0, 25000),
        (25000, 50000),
        None,
    )
    assert config.base is not None
    assert (config.base.steps, config.base.batch_size, config.base.lr) == (1800, 64, 0.05)
    assert (config.scores.parameters, config.compression.dim, config.metric.rank) == ("conv1.*", 2048, 512)
    assert (config.linear.model, config.linear.views) == ("ridge", 2)


def test_digits_configuration_is_the_one_that_demo_runs():
    assert Config.from_yaml(CONFIGS / "digits.yaml") == Config.from_yaml(DEMO)


def test_demo_has_several_units_for_several_workers():
    config = Config.from_yaml(DEMO)

    assert config.runtime.unit_rows < 600 / 2


def test_keys_left_out_take_the_documented_defaults():
    config = Config.from_dict(minimal())

    assert (config.scores.labels, config.compression.kind, config.metric.estimator) == ("all", "kronecker", "exact")
    assert config.scores.precision == "float32"
    assert (config.store.dtype, config.store.codec, config.data.on_error) == ("float16", "none", "stop")
    assert (config.runtime.num_workers, config.runtime.max_attempts, config.runtime.wait_s) == ("auto", 3, 600.0)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("metric.rnk=3", ["'metric.rnk'", "'rank'"]),
        ("nope=1", ["'nope'", "known keys", "output"]),
        ("data.train.pth=x", ["'data.train.pth'", "'path'"]),
        ("linear.views=3", ["linear.views", "1 or 2", "3"]),
        ("metric.rank=0", ["metric.rank", "greater than 0", "0"]),
        ("metric.fraction=1.5", ["metric.fraction", "1.5"]),
        ("linear.penalties=[1, 0]", ["linear.penalties.1", "0"]),
        ("base.lr=.nan", ["base.lr", "nan"]),
        ("seed=many", ["seed", "'many'"]),
        ("compression.kind=magic", ["compression.kind", "'kronecker'", "'magic'"]),
        ("data.train.rows=[5, 2]", ["data.train", "[5, 2]", "0 <= start < stop"]),
        ("data.train.factory=m:f", ["data.train", "'path'", "'factory'"]),
        ("data.train.format=torch", ["data.train", "'factory'"]),
        ("data.shallow=3", ["data.shallow", "3"]),
        ("runtime.unit_rows=1000", ["runtime.unit_rows 1000", "store.chunk_rows 1024"]),
        ("base=null", ["base", "model.checkpoint"]),
        ("model.checkpoint=x.safetensors", ["base", "model.checkpoint"]),
        ("data.train=null", ["'base'", "'data.train'"]),
        ("metric.damping=x", ["metric.damping", "'auto'", "'x'"]),
        ("metric.damping={absolut: 1}", ["'metric.damping.absolut'", "'absolute'"]),
        ("metric.damping={absolute: -1}", ["metric.damping.absolute", "-1"]),
        ("compression.layers={'a*': {knd: topk}}", ["'compression.layers.a*.knd'", "'kind'"]),
        ("compression.layers={'a*': {kind: tpk}}", ["compression.layers.a*.kind", "'topk'", "'tpk'"]),
        ("metric={structure: adjacent, estimator: nystrom}", ["'nystrom'", "global or block", "'adjacent'"]),
        ("metric={size: 2048}", ["size", "'exact'"]),
        ("metric={size: 20, rank: 30, estimator: nystrom}", ["size 20", "rank 30"]),
        ("metric={centered: true, estimator: frequent_directions}", ["mean", "centered"]),
        ("metric.centered=true", ["centered", "zero"]),
        ("linear.ranks=[4096]", ["linear.ranks", "4096", "metric.rank 512"]),
        ("linear.ranks=[]", ["linear.ranks"]),
        ("linear={model: logistic, ranks: [4]}", ["ranks", "'ridge'", "'logistic'"]),
        ("linear={solver: minibatch}", ["minibatch", "'logistic'", "'ridge'"]),
        ("linear={model: gradnet, view_mode: stack}", ["view_mode", "'stack'", "'gradnet'"]),
        ("linear.dampings=[-1]", ["linear.dampings", "-1"]),
        ("linear.class_weights={-1: 2}", ["linear.class_weights", "-1"]),
        ("linear.class_weights=equal", ["linear.class_weights", "'balanced'", "'equal'"]),
        ("metric={draws: 3, labels: true}", ["draws 3", "'true'"]),
    ],
)
def test_a_wrong_key_is_named_with_its_path_and_value(override, words):
    with pytest.raises(ConfigError) as caught:
        Config.from_yaml(CIFAR10, [override])

    assert [word for word in words if word not in str(caught.value)] == []


def test_every_wrong_key_is_named_at_once():
    with pytest.raises(ConfigError, match=r"metric\.rnk.*linear\.views"):
        Config.from_yaml(CIFAR10, ["metric.rnk=3", "linear.views=5"])


def test_missing_keys_are_named():
    with pytest.raises(ConfigError, match=r"missing key 'data\.test'"):
        Config.from_dict(minimal(data={"train": {"path": "x"}, "shallow": {"path": "x"}}))


@pytest.mark.parametrize("override", ["a", "=1", "seed.a=1", "seed=[1", "seed=!!python/name:os.system"])
def test_an_override_that_cannot_be_applied_is_quoted(override):
    with pytest.raises(ConfigError, match="--set") as caught:
        Config.from_yaml(CIFAR10, [override])

    assert override in str(caught.value)


def test_later_overrides_win_and_sections_left_out_are_made():
    config = Config.from_yaml(CIFAR10, ["seed=1", "seed=2", "model.kwargs.num_classes=7"])

    assert config.seed == 2
    assert config.model.kwargs == {"num_classes": 7}


@given(st.integers(0, 2**31), st.floats(1e-6, 1.0), st.booleans())
def test_overrides_equal_the_same_values_in_the_file(seed, fraction, hidden):
    overrides = [f"seed={seed}", f"metric.fraction={yaml.safe_dump(fraction).split()[0]}", f"linear.hidden={hidden}"]
    values = yaml.safe_load(CIFAR10.read_text())
    values["seed"], values["metric"]["fraction"], values["linear"]["hidden"] = seed, fraction, hidden

    assert Config.from_yaml(CIFAR10, overrides) == Config.from_dict(values)


@pytest.mark.parametrize("text", ["", "[1]", "a: [", "1: 2", "? [1]\n: 3", "!!python/object:os.system x", "\0"])
def test_a_file_that_is_no_configuration_is_refused(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)

    with pytest.raises(ConfigError):
        Config.from_yaml(path)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\xff\xfe\xff")

    with pytest.raises(ConfigError, match=r"config\.yaml is not YAML"):
        Config.from_yaml(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.yaml: No such file"):
        Config.from_yaml(tmp_path / "gone.yaml")


def test_a_configuration_is_frozen():
    config = Config.from_dict(minimal())

    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3


def test_a_configuration_survives_json():
    config = Config.from_yaml(CIFAR10)

    assert Config.model_validate_json(config.model_dump_json()) == config


def test_the_order_of_the_layers_globs_is_part_of_what_results_depend_on():
    one, other = (
        Config.from_yaml(CIFAR10, [f"compression.layers={{{globs}}}"]).identity()
        for globs in ("'c*': {kind: topk}, '*': {kind: random}", "'*': {kind: random}, 'c*': {kind: topk}")
    )
    assert one != other


@pytest.mark.parametrize("shard", [1536, 4096])
def test_a_shard_that_two_writers_would_share_is_refused(tmp_path, shard):
    with pytest.raises(ConfigError, match=rf"store\.shard_rows {shard} is not a multiple of store\.chunk_rows 1024"):
        Config.from_yaml(Path(__file__).parents[1] / "jobs/configs/cifar10.yaml", [f"store.shard_rows={shard}"])


def test_gradnets_defaults_are_the_papers_protocol():
    section = Config.from_dict(minimal(gradnet={})).gradnet

    assert section is not None
    assert (section.parameters, section.share, section.normalise, section.power) == ("*weight", 0.15, True, 0.5)
    assert (section.structure, section.init_std, section.batch_size, section.lr) == ("block", 0.02, 25, 0.01)
    assert (section.draws, section.momentum, section.weight_decay, section.range_fraction) == (1, 0.0, 0.0, 1.0)


def test_gradnet_is_run_where_it_is_asked_for():
    assert Config.from_dict(minimal()).gradnet is None
    for without in ({}, {"gradnet": None}):
        assert Config.from_dict(minimal(linear={"model": "gradnet"}, **without)).gradnet is not None
    assert Config.from_dict(minimal(gradnet={"steps": 7}, linear={"model": "gradnet"})).gradnet_section.steps == 7
    with pytest.raises(ValueError, match="no section 'gradnet'"):
        _ = Config.from_dict(minimal()).gradnet_section


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"shares": 0.1}, r"unknown key 'gradnet\.shares'; did you mean 'share'"),
        ({"share": 1.5}, r"gradnet\.share: .*less than or equal to 1"),
        ({"widths": []}, r"gradnet\.widths: .*at least 1 item"),
        ({"structure": "diagonal"}, r"gradnet\.structure: .*'block' or 'adjacent'"),
        ({"momentum": 1.0}, r"gradnet\.momentum: .*less than 1"),
        ({"power": 0}, r"gradnet\.power: .*greater than 0"),
    ],
)
def test_wrong_keys_of_gradnet_are_named(section, message):
    with pytest.raises(ConfigError, match=message):
        Config.from_dict(minimal(gradnet=section))


def test_how_often_gradnet_is_kept_says_nothing_of_its_results():
    often, seldom = (Config.from_dict(minimal(gradnet={"checkpoint_steps": steps})) for steps in (1, 99))
    other = Config.from_dict(minimal(gradnet={"batch_size": 24}))

    assert often.identity() == seldom.identity() != other.identity()
