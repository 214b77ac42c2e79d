"""Exported classifiers against the ones they were exported from."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import fisher_ray
from fisher_ray.errors import ModelError, RequestError
from fisher_ray.linear import LinearWeights
from tests.gradients.zoo import build

NAMES = ["resnet, batch norm", "language model, tied", "a module of the user's own", "tied convolutions and norms"]
FIXED = ["transformer encoder", "vision transformer", "weight norm"]
LOADING = """
import sys, torch
program = torch.export.load(sys.argv[1]).module()
torch.save([program(inputs) for inputs in torch.load(sys.argv[2])], sys.argv[3])
assert not [name for name in sys.modules if name.split(".")[0] in ("fisher_ray", "tests")]
"""


def classifier_of(model: nn.Module, inputs: Tensor, views: int = 1, **options: object) -> fisher_ray.FisherClassifier:
    """A classifier with any weights, and a hidden layer's among them where there is one."""
    metric = fisher_ray.fit_metric(model, inputs, damping=0.1, **{"dim": 16, **options})
    num_classes = fisher_ray.features(model, metric, inputs[:1]).shape[1]
    columns = num_classes * metric.rank
    weight = torch.randn(num_classes, columns, generator=torch.Generator().manual_seed(0))
    weights = LinearWeights(weight, torch.arange(float(num_classes)), 1.0, 1.7)
    return fisher_ray.FisherClassifier(model, metric, weights, views=views)


@pytest.mark.parametrize("views", [1, 2])
def test_a_program_predicts_in_a_process_without_the_package_for_any_number_of_samples(views, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()
    inputs = torch.randn(70, 1, 6, 6)
    classifier = classifier_of(model, inputs, views, rank=12)
    classifier.export(inputs[:1], str(tmp_path / "classifier.pt2"))

    batches = [inputs[:1], inputs[:3], inputs]
    torch.save(batches, tmp_path / "inputs.pt")
    files = (str(tmp_path / name) for name in ("classifier.pt2", "inputs.pt", "out.pt"))
    subprocess.run([sys.executable, "-c", LOADING, *files], check=True, cwd=tmp_path, timeout=120)
    for batch, (scores, probabilities) in zip(batches, torch.load(tmp_path / "out.pt"), strict=True):
        torch.testing.assert_close(scores, classifier(batch), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(probabilities, classifier.predict_proba(batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_networks_of_every_kind_are_exported_for_any_number_of_samples(name):
    model, inputs = build(name, 7)
    classifier = classifier_of(model, inputs)
    program = classifier.export(inputs[:2]).module()
    for batch in (inputs[:1], inputs):
        torch.testing.assert_close(program(batch)[0], classifier(batch), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("name", "compression"), [(name, "kronecker") for name in FIXED] + [(NAMES[0], "sketch")])
def test_where_the_number_of_samples_changes_the_steps_it_has_to_be_given(name, compression):
    model, inputs = build(name, 7)
    classifier = classifier_of(model, inputs, compression=compression)
    with pytest.raises(ModelError, match=r"the data or the number of samples \(.*\)\. Export it with any_batch=False"):
        classifier.export(inputs[:3])
    program = classifier.export(inputs[:3], any_batch=False).module()
    torch.testing.assert_close(program(inputs[3:6])[0], classifier(inputs[3:6]), rtol=1e-8, atol=1e-8)


@pytest.mark.gpu
def test_a_program_exported_on_a_gpu_predicts_there_as_the_classifier_does_on_the_processor():
    model, inputs = build("resnet, batch norm", 7)
    classifier = classifier_of(model, inputs, views=2)
    expected = classifier(inputs)
    classifier.cuda()
    torch.testing.assert_close(classifier(inputs.cuda()).cpu(), expected, rtol=1e-6, atol=1e-6)
    scores, _ = classifier.export(inputs[:2].cuda()).module()(inputs.cuda())
    assert scores.is_cuda
    torch.testing.assert_close(scores.cpu(), expected, rtol=1e-6, atol=1e-6)


def test_the_classifier_is_as_before_after_an_export():
    model, inputs = build("resnet, batch norm", 7)
    classifier = classifier_of(model, inputs)
    before = classifier(inputs)
    classifier.export(inputs)
    assert torch.equal(classifier(inputs), before)
    assert any(parameter.requires_grad for parameter in model.parameters())


def test_no_example_and_vectors_to_be_mirrored_are_refused():
    inputs = torch.randn(5, 4)
    model = nn.Sequential(nn.Linear(4, 3))
    classifier = classifier_of(model, inputs, views=2)
    with pytest.raises(RequestError, match=r"a sample has shape \(4,\)\. Give views=1"):
        classifier.export(inputs)
    with pytest.raises(RequestError, match="without samples"):
        classifier.export(inputs[:0])


class Choosing(nn.Module):
    """Takes another way through its layers where the batch says so."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs) if float(inputs.abs().max()) < 100 else self.layer(inputs.clamp(max=100))


def test_a_network_that_looks_at_its_data_is_refused():
    inputs = torch.randn(5, 4)
    classifier = classifier_of(Choosing().eval(), inputs)
    with pytest.raises(
        ModelError, match=r"cannot be exported: its steps depend on the data \(.*\)\. Call the classifier"
    ):
        classifier.export(inputs, any_batch=False)
