"""The lines of Python in README and METHODS, run as they stand but for places and sizes."""

import pytest
import ray
import torch
import yaml
import zarr

import fisher_ray
from fisher_ray.models import digits_mlp
from tests.integration.runs import digits
from tests.test_readme import block

# Ray Data warns of settings of its own
IGNORED = ("ignore::DeprecationWarning:ray", "ignore::FutureWarning:ray")
pytestmark = [pytest.mark.slow, *map(pytest.mark.filterwarnings, IGNORED)]


def run(text, **names):
    exec(compile(text, "README.md", "exec"), names)
    return names


def replaced(text, **words):
    for old, new in words.items():
        assert old in text, old
        text = text.replace(old, new)
    return text


def test_the_lines_on_features(undisturbed):
    output, _ = undisturbed
    text = replaced(block("python", "iter_batches"), **{"runs/cifar10": str(output), "1024": "500", "512": "8"})

    found = run(text, fisher_ray=fisher_ray, torch=torch, zarr=zarr)

    assert found["x"].shape == (500, 10, 64)
    assert found["y"].shape == (500,)
    assert found["x"] == pytest.approx(found["store"].read("features", 0, 500))
    assert next(iter(found["loader"]))["features"].shape == (8, 10, 64)
    assert found["batch"]["features"].shape[1:] == (10, 64)
    assert found["dataset"].count() == 600


def test_the_lines_from_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump(digits(tmp_path / "run", "trained_on=null").model_dump(mode="json"))
    )
    places = {"jobs/configs/cifar10.yaml": "run.yaml", "data.root=/path/to/cifar10": "seed=1", "runs/cifar10": "run"}
    sizes = {"dim=512": "dim=64", "rank=256": "rank=32"}
    text = replaced(block("python", "fisher_ray.run(config)"), **places, **sizes)
    model, inputs = digits_mlp().eval(), torch.rand(96, 1, 8, 8)

    found = run(text, model=model, inputs=inputs, targets=torch.randint(10, (96,)), torch=torch)

    assert 0.5 < found["results"]["accuracy"]["fisher_linear"] <= 1
    assert found["found"]["num_queries"] == 100
    assert found["gradients"]["fc0.weight"].shape == (96, 32, 64)
    assert found["phi"].shape == (96, 10, 32)
    assert found["probabilities"].detach().sum(1) == pytest.approx(torch.ones(96), abs=1e-5)
    assert ray.is_initialized()


def test_the_lines_on_gradients():
    model, inputs = digits_mlp().eval(), torch.rand(16, 1, 8, 8)
    targets = torch.randint(10, (16,))

    found = run(block("python", "GradientSketch"), model=model, inputs=inputs, targets=targets)

    num_parameters = sum(p.numel() for p in model.parameters())
    assert found["exact"].shape == (16, 1, num_parameters)
    assert found["short"].shape == (16, 1, 4096)
