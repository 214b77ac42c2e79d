"""Every refusal before any work."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fisher_ray.errors import ConfigError, DataError, ModelError
from fisher_ray.models import digits_mlp
from fisher_ray.stages import Workbench, inspect_request
from fisher_ray.stages.training import train_base
from tests.integration.runs import digits

MODULE = """
import torch
from torch import nn
from fisher_ray.data.digits import digits

class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))

    def forward(self, x):
        return x * self.weight if float(x.detach().sum()) > 0 else x

def branching():
    return nn.Sequential(nn.Flatten(), Branching(), nn.Linear(64, 10))

class Norm(nn.BatchNorm1d):
    def train(self, mode=True):
        return super().train(True)

def batch_norm():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), Norm(10, affine=False))

def no_network():
    return "network"

def broken():
    raise OSError("no weights here")

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 10)
        self.norm = nn.BatchNorm2d(1, affine=False)

class Turning(Net):
    def forward(self, x):
        self.train()
        return self.fc(self.norm(x).flatten(1))

class Chance(Net):
    def forward(self, x):
        return nn.functional.dropout(self.fc(x.flatten(1)))

class Mixing(Net):
    def forward(self, x):
        return self.fc(x.flatten(1)) - self.fc(x.flatten(1)).mean(0)

class Broken(Net):
    def forward(self, x):
        return self.missing(x)

class Positions(Net):
    def forward(self, x):
        return self.fc(x.flatten(1))[:, None]

def turning_factory():
    return Turning().train()

def twice():
    layer = nn.Linear(64, 64)
    return nn.Sequential(nn.Flatten(), layer, nn.Tanh(), layer, nn.Linear(64, 10))

def vectors(split):
    part = digits(split)
    return [(part[i][0].reshape(-1), part[i][1]) for i in range(300)]

def plain(x, generator):
    return torch.as_tensor(x)
"""


@pytest.fixture
def user_code(tmp_path, monkeypatch):
    (tmp_path / "user_code.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    import sys

    sys.modules.pop("user_code", None)


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        (["model.factory=user_code:gone"], ConfigError, "model.factory.*has no 'gone'"),
        (["model.factory=user_code:no_network"], ModelError, "returned str, not a torch.nn.Module"),
        (["model.factory=user_code:broken"], ModelError, "raised OSError: no weights here"),
        (["model.factory=user_code:branching"], ModelError, r"layer '1' \(Branching\).*cannot be vectorised"),
        (["model.factory=user_code:batch_norm"], ModelError, r"layer '2' \(Norm\) is in train mode"),
        (["model.factory=user_code:Turning"], ModelError, r"depends on the other samples .*train\(\)"),
        (["model.factory=user_code:turning_factory"], ModelError, "depends on the other samples"),
        (["model.factory=user_code:Chance"], ModelError, "depends on .*chance"),
        (["model.factory=user_code:Mixing"], ModelError, "depends on the other samples"),
        (
            ["model.factory=user_code:Broken"],
            ModelError,
            r"fails on samples of shape \(1, 8, 8\) and type float32: AttributeError.*missing",
        ),
        (["model.factory=user_code:Positions"], ModelError, r"output is \(\d, 1, 10\), not logits of shape \(B, C\)"),
        (["scores.parameters=head.*"], ModelError, r"no parameter of the network matches scores.parameters 'head"),
        (["data.test.kwargs={split: none}"], ConfigError, "no split 'none'"),
        (["data.transform=user_code:nothing"], ConfigError, r"data\.transform"),
        (
            [
                "data.test={format: torch, factory: 'user_code:vectors', kwargs: {split: test}}",
                "data.transform=user_code:plain",
            ],
            ConfigError,
            "samples have different shapes",
        ),
    ],
)
def test_a_wrong_request_is_refused_naming_what_is_wrong(overrides, error, words, user_code, tmp_path):
    with pytest.raises(error, match=words):
        inspect_request(digits(tmp_path / "run", *overrides).located())


def test_a_label_out_of_range_is_refused_naming_row_and_file(tmp_path):
    labels = np.arange(300) % 10
    labels[217] = 10
    np.savez(tmp_path / "d.npz", inputs=np.zeros((300, 8, 8), np.float32), labels=labels)

    with pytest.raises(DataError, match=r"d\.npz row 217 \(data\.test row 217\).*10 is not in \[0, 10\)") as caught:
        inspect_request(digits(tmp_path, f"data.test={{format: numpy, path: {tmp_path / 'd.npz'}}}").located())
    assert caught.value.row == 217


def test_views_of_vectors_are_refused(user_code, tmp_path):
    splits = ("train", "shallow", "test")
    data = [
        f"data.{name}={{format: torch, factory: 'user_code:vectors', kwargs: {{split: {name}}}}}" for name in splits
    ]
    with pytest.raises(ConfigError, match=r"linear\.views 2 mirrors pictures.*\(64,\)"):
        inspect_request(digits(tmp_path, *data, "data.transform=user_code:plain", "linear.views=2").located())


def test_identity_of_too_many_parameters_is_refused(tmp_path):
    wide = ["model.factory=fisher_ray.models:mlp", "model.kwargs={sizes: [64, 300, 10]}", "compression.kind=identity"]
    with pytest.raises(ConfigError, match=r"22510 coordinates.*a matrix of 22510 x 22510"):
        inspect_request(digits(tmp_path, *wide).located())


def test_a_checkpoint_that_does_not_fit_is_refused_with_every_difference(tmp_path):
    state = digits_mlp().state_dict()
    state["fc1.weight"] = torch.zeros(10, 31)
    state["head.bias"] = state.pop("fc1.bias")
    save_file(state, tmp_path / "c.safetensors")

    with pytest.raises(ModelError) as caught:
        inspect_request(digits(tmp_path, "base=null", f"model.checkpoint={tmp_path / 'c.safetensors'}").located())
    for words in ("missing fc1.bias", "unknown head.bias", "fc1.weight is (10, 31) instead of (10, 32)"):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("gone.pt", None, "there is no file"),
        ("torn.safetensors", b"123", "cannot be read"),
        ("torn.pt", b"123", "cannot be read"),
        ("zeros.pt", bytes(100), "cannot be read"),
        ("code.pt", b"cos\nsystem\n(S'true'\ntR.", "holds other objects than tensors"),
    ],
)
def test_a_checkpoint_that_cannot_be_read_is_refused(name, content, words, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=words) as caught:
        inspect_request(digits(tmp_path, "base=null", f"model.checkpoint={tmp_path / name}").located())
    assert "weights_only" not in str(caught.value)


def test_a_checkpoint_that_holds_nan_is_refused(tmp_path):
    state = digits_mlp().state_dict()
    state["fc1.bias"] = torch.full((10,), torch.nan)
    torch.save(state, tmp_path / "c.pt")

    with pytest.raises(ModelError, match=r"fc1\.bias holds NaN or infinity"):
        inspect_request(digits(tmp_path, "base=null", f"model.checkpoint={tmp_path / 'c.pt'}").located())


def test_the_facts_are_those_of_data_and_network(tmp_path):
    facts = inspect_request(digits(tmp_path).located())

    assert facts.num_rows == {"train": 600, "shallow": 600, "test": 597}
    assert (facts.input_shape, facts.num_classes, facts.hidden) == ((1, 8, 8), 10, 32)
    assert facts.block_shapes == {"fc0": (32, 65), "fc1": (10, 33)}
    assert facts.num_parameters == sum(p.numel() for p in digits_mlp().parameters())


def test_what_a_glob_leaves_out_need_not_be_supported(user_code, tmp_path):
    facts = inspect_request(digits(tmp_path, "model.factory=user_code:branching", "scores.parameters=2.*").located())

    assert facts.block_shapes == {"2": (10, 65)}


def test_a_layer_that_stands_at_two_places_is_one(user_code, tmp_path):
    config = digits(tmp_path, "model.factory=user_code:twice", "base.steps=1").located()
    bench = Workbench(config, inspect_request(config))
    assert bench.facts.block_shapes == {"1": (64, 65), "4": (10, 65)}

    list(train_base(bench))
    assert torch.equal(bench.model[1].weight, bench.model[3].weight)


def test_another_checkpoint_has_another_fingerprint(tmp_path):
    found = []
    for number in range(2):
        path = tmp_path / f"{number}.safetensors"
        save_file({name: value + number for name, value in digits_mlp().state_dict().items()}, path)
        found.append(inspect_request(digits(tmp_path, "base=null", f"model.checkpoint={path}").located()).fingerprints)

    assert found[0]["checkpoint"] != found[1]["checkpoint"]
    assert {name: found[0][name] for name in ("shallow", "test")} == {
        name: found[1][name] for name in ("shallow", "test")
    }
    assert "train" not in found[0]


def test_under_skip_bad_first_rows_are_no_reason_to_refuse(tmp_path):
    inputs, labels = np.random.default_rng(0).random((300, 8, 8), np.float32), np.arange(300) % 10
    inputs[:20], labels[250] = np.nan, 10
    np.savez(tmp_path / "d.npz", inputs=inputs, labels=labels)
    overrides = [f"data.shallow={{format: numpy, path: {tmp_path / 'd.npz'}}}"]

    with pytest.raises(DataError, match=r"data\.shallow row 0"):
        inspect_request(digits(tmp_path, *overrides).located())
    facts = inspect_request(digits(tmp_path, *overrides, "data.on_error=skip").located())
    assert facts.num_rows["shallow"] == 300


def test_a_workbench_makes_networks_of_their_own_with_the_bases_weights(tmp_path):
    config = digits(tmp_path, "base.steps=2").located()
    bench = Workbench(config, inspect_request(config))
    list(train_base(bench))

    one, other = bench.new_model(), bench.new_model()
    assert one is not other
    assert not one.training
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
        assert value.data_ptr() != other.state_dict()[name].data_ptr()
    assert bench.url("metric.zarr") == f"{tmp_path}/metric.zarr"
