"""The classifier that takes over from the network."""

from __future__ import annotations

import io
import json
from typing import Any, Literal

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.export import ExportedProgram

from fisher_ray.classifier.deployment import export_program
from fisher_ray.classifier.feature_map import FeatureMap
from fisher_ray.classifier.folding import FoldedWeights
from fisher_ray.config import Config
from fisher_ray.errors import ModelError, StoreError
from fisher_ray.journal import read_run
from fisher_ray.linear import LinearWeights
from fisher_ray.metric import LowRankMetric
from fisher_ray.stages.networks import load_state, writable
from fisher_ray.stages.shallow import load_weights
from fisher_ray.stages.workbench import base_network
from fisher_ray.storage import Storage

SCHEMA = 2
_METADATA = "fisher_ray"


class FisherClassifier(nn.Module):
    """A base network, its Fisher metric and a linear model on the features: what takes over from the network.

    Args:
        model: the base network, in eval mode.
        metric: of that network, of the scores of all classes.
        weights: of ``C · R`` feature columns, with or without the last hidden layer's after them.
        views: 2 averages the features of each input and of its mirror image (its last axis reversed).

    Raises:
        ModelError: if the parts do not fit together.
    """

    def __init__(
        self, model: nn.Module, metric: LowRankMetric, weights: LinearWeights, *, views: Literal[1, 2] = 1
    ) -> None:
        """See the class."""
        super().__init__()
        if metric.attributes.get("likelihood", "softmax") != "softmax":
            raise ModelError(f"the metric is of a {metric.attributes['likelihood']} likelihood, not of classes")
        if metric.attributes.get("labels", "all") != "all":
            raise ModelError(
                f"the metric's features are those of {metric.attributes['labels']} labels, which a new sample does not "
                "have. Fit it with labels='all'."
            )
        self.model = model
        self._metric, self._weights, self._views = metric, weights, views
        self._map, self._folded = FeatureMap(model, metric, views), FoldedWeights(metric, weights)
        self.eval()

    @classmethod
    def from_run(cls, url: str) -> FisherClassifier:
        """Take the parts from a run folder whose linear model is fitted; the model's factory is imported.

        Raises:
            ConfigError: if ``url`` is no run folder.
            StoreError: if base network, metric or linear model are missing or damaged.
        """
        storage = Storage(url)
        config = Config.from_dict(read_run(storage)["config"])
        model = base_network(config, storage)
        place = url.rstrip("/")
        weights = load_weights(f"{place}/linear/weights.zarr")
        return cls(model, LowRankMetric.load(f"{place}/metric.zarr"), weights, views=config.linear.views)

    def train(self, mode: bool = True) -> FisherClassifier:
        """Set the mode of this module; the base network stays in eval mode, which its scores need."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        """Return scores ``(B, C)`` of inputs ``(B, ...)``; their order is the classes', their scale the linear model's.

        Raises:
            ModelError: if the linear model has other columns than the features.
        """
        weighed, logits, hidden = self._map(inputs, self._folded.weigh)
        return self._folded.finish(weighed, self._map.num_scores(logits.shape[1]), hidden)

    def predict_proba(self, inputs: Tensor) -> Tensor:
        """Return probabilities ``(B, C)``: the softmax of the scores over the temperature fitted on held-out rows."""
        return self._weights.to_probabilities(self(inputs))

    def export(self, inputs: Tensor, url: str | None = None, *, any_batch: bool = True) -> ExportedProgram:
        """Return a program that predicts with PyTorch alone, without this package and the network's code.

        Args:
            inputs: a batch such as it will be given, ``(B, ...)``, on this module's device.
            url: a local path or ``s3://`` to write it to, for ``torch.export.load``.
            any_batch: whether later batches may have another size than this one. Not every network lets itself be
                traced so: not one with layers that have no formula here, nor with a metric of sketches.

        Returns:
            ``program.module()(inputs)`` returns the scores ``(B, C)`` of :meth:`forward` and the probabilities
            ``(B, C)`` of :meth:`predict_proba`.

        Raises:
            ModelError: if the network cannot be traced.
            RequestError: if there is no sample, or vectors are to be mirrored.
            StorageError: if it cannot be written.
        """

        def predict(inputs: Tensor) -> tuple[Tensor, Tensor]:
            compressed, hidden = self._map.compressed(inputs)
            scores = self._folded.finish(self._folded.weigh(compressed), compressed.shape[1], hidden)
            return scores, self._weights.to_probabilities(scores)

        program = export_program(predict, inputs, any_batch=any_batch)
        if url is not None:
            storage, name = _place(url)
            file = io.BytesIO()
            torch.export.save(program, file)
            storage.write_bytes(name, file.getvalue())
        return program

    def to_bytes(self) -> bytes:
        """Return all parts as one safetensors file."""
        metric, weights = self._metric, self._weights
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        arrays, values = metric.to_arrays()
        tensors |= {f"metric.{name}": torch.from_numpy(value) for name, value in arrays.items()}
        tensors |= {"linear.weight": weights.weight, "linear.bias": weights.bias}
        rest = {
            "schema": SCHEMA,
            "metric": values,
            "attributes": metric.attributes,
            "penalty": weights.penalty,
            "temperature": weights.temperature,
            "views": self._views,
        }
        return bytes(safetensors.torch.save(writable(tensors), {_METADATA: json.dumps(rest)}))

    def save(self, url: str) -> None:
        """Write one safetensors file to a local path or ``s3://``.

        Raises:
            StorageError: if it cannot be written.
        """
        storage, name = _place(url)
        storage.write_bytes(name, self.to_bytes())

    @classmethod
    def load(cls, url: str, model: nn.Module) -> FisherClassifier:
        """Read what :meth:`save` wrote, into a network of the same architecture.

        Args:
            url: a local path or ``s3://``.
            model: takes the weights of the file.

        Raises:
            StoreError: if the file is not a classifier's.
            ModelError: if ``model`` is another architecture.
        """
        storage, name = _place(url)
        try:
            raw = storage.read_bytes(name)
        except FileNotFoundError:
            raise StoreError(f"there is no file {url}. Correct the path.") from None
        tensors, rest = _unpack(raw, url)
        state = {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}
        load_state(model.eval(), state, url)
        arrays = {k.removeprefix("metric."): v.numpy() for k, v in tensors.items() if k.startswith("metric.")}
        metric = LowRankMetric.from_arrays(arrays, rest["metric"], rest["attributes"])
        weights = LinearWeights(tensors["linear.weight"], tensors["linear.bias"], rest["penalty"], rest["temperature"])
        return cls(model, metric, weights, views=rest["views"])


def _place(url: str) -> tuple[Storage, str]:
    folder, slash, name = url.rpartition("/")
    return Storage(folder or slash or "."), name


def _unpack(raw: bytes, url: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        size = int.from_bytes(raw[:8], "little")
        rest = dict(json.loads(json.loads(raw[8 : 8 + size])["__metadata__"][_METADATA]))
        schema = rest["schema"]
        tensors = safetensors.torch.load(raw)
    except (ValueError, TypeError, KeyError, SafetensorError) as error:
        raise StoreError(f"{url} is not a file of FisherClassifier.save: {type(error).__name__}: {error}") from error
    if schema != SCHEMA:
        raise StoreError(f"{url} has schema {schema}, this program reads {SCHEMA}")
    return tensors, rest
