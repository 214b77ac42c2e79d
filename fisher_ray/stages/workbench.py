"""What a process keeps between units, and the first look at a request."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from fisher_ray.config import Config, ScoreConfig
from fisher_ray.data import Source, check_source, load_batches, open_source
from fisher_ray.errors import ConfigError, FisherRayError, ModelError, StoreError
from fisher_ray.gradients import Compressor, PercentileEntries, ScoreEngine, Softmax, bucketed, precision_of
from fisher_ray.linear import GradNet, weigh_classes
from fisher_ray.metric import FisherSum, LowRankMetric, Normalisation, bases_from
from fisher_ray.records import Batch, Compression
from fisher_ray.stages import compression
from fisher_ray.stages.facts import Facts
from fisher_ray.stages.gradnet.network import load_network, network_shape
from fisher_ray.stages.memory import choose_micro_batch
from fisher_ray.stages.networks import build_network, load_checkpoint, load_state, network_bytes
from fisher_ray.storage import Storage
from fisher_ray.store import FeatureStore, StoreWriter, load_arrays, open_features

BASE_FILE = "base/model.safetensors"
SPLITS = ("train", "shallow", "test")
NUM_TRIED = 8
"""Rows that the network is tried on, and how often it is tried on the first of them."""


class Workbench:
    """Everything that one process needs, made when first asked for and kept.

    A part is made from what earlier stages sealed; ask for it only after its stage.

    Args:
        config: the run's configuration, its paths absolute.
        facts: what the first look found.
        device: where to compute.

    Attributes:
        turn: held by whoever computes; reading a source needs none.
    """

    def __init__(self, config: Config, facts: Facts, device: str = "cpu") -> None:
        """See the class."""
        self.config, self.facts, self.device = config, facts, torch.device(device)
        self.storage = Storage(config.output)
        self.turn = threading.RLock()
        self._sources: dict[str, Source] = {}
        self._writers: dict[str, StoreWriter] = {}
        self._opening = threading.Lock()
        self._kept: dict[str, tuple[str, Any]] = {}

    @property
    def micro_batch(self) -> int:
        """Samples whose scores are computed together."""
        return self.facts.micro_batch_gpu if self.device.type == "cuda" else self.facts.micro_batch

    def url(self, name: str) -> str:
        """Return the URL of ``name`` in the run folder."""
        return f"{self.config.output.rstrip('/')}/{name}"

    def store_writer(self, name: str) -> StoreWriter:
        """Return what writes units of the store ``name`` in the run folder."""
        with self._opening:
            if name not in self._writers:
                self._writers[name] = StoreWriter(self.url(name))
            return self._writers[name]

    def source(self, split: str) -> Source:
        """Return the split's rows."""
        with self._opening:
            if split not in self._sources:
                self._sources[split] = _open(self.config, split)
            return self._sources[split]

    def keep(self, kind: str, name: str, make: Callable[[str], Any]) -> Any:
        """Return ``make(url)`` of ``name`` in the run folder, which is kept until another of its ``kind`` is made."""
        if self._kept.get(kind, ("", None))[0] != name:
            self._kept.pop(kind, None)  # first, for both may not fit
            self._kept[kind] = (name, make(self.url(name)))
        return self._kept[kind][1]

    def new_model(self) -> nn.Module:
        """Return a network of its own, with the base network's weights."""
        return base_network(self.config, self.storage).to(self.device)

    @cached_property
    def model(self) -> nn.Module:
        """The base network, in eval mode."""
        return self.new_model()

    @cached_property
    def engine(self) -> ScoreEngine:
        """What computes scores of the base network."""
        return score_engine(self.config, self.model, min(self.micro_batch, self.config.runtime.unit_rows))

    @cached_property
    def bases(self) -> dict[str, Compression]:
        """The compression, which the metric stage wrote first."""
        arrays, attributes = load_arrays(self.url("basis.zarr"))
        return bases_from(arrays, attributes["bases"])

    @cached_property
    def compressor(self) -> Compressor:
        """What compresses scores."""
        return Compressor(self.bases, self.engine.blocks, self.engine.like)

    def new_fisher_sum(self) -> FisherSum:
        """Return a sum of the Fisher without samples."""
        dims = {name: basis.dim for name, basis in self.bases.items()}
        return FisherSum(self.config.metric, dims, self.config.seed)

    @cached_property
    def gradnet_engine(self) -> ScoreEngine:
        """What computes the scores whose entries GradNet takes."""
        return gradnet_engine(self.config, self.model)

    @cached_property
    def gradnet_entries(self) -> PercentileEntries:
        """What keeps entries of these scores."""
        engine, section = self.gradnet_engine, self.config.gradnet_section
        return PercentileEntries(engine.blocks, section.share, engine.like)

    @cached_property
    def gradnet_normalisation(self) -> Normalisation:
        """The normalisation of these entries."""
        return Normalisation.from_arrays(load_arrays(self.url("gradnet/ranges.zarr"))[0])

    @cached_property
    def gradnet(self) -> GradNet:
        """The trained GradNet."""
        return load_network(self.url("gradnet/weights.zarr")).to(self.device)

    @cached_property
    def metric(self) -> LowRankMetric:
        """The metric."""
        return LowRankMetric.load(self.url("metric.zarr"))

    @cached_property
    def train_store(self) -> FeatureStore:
        """The sealed features of the shallow split."""
        return open_features(self.url("features/train.zarr"))

    @cached_property
    def class_weights(self) -> torch.Tensor | None:
        """As how many rows each class's rows count in the linear model, ``(C,)``; None if as one."""
        asked = self.config.linear.class_weights
        if asked == "none":
            return None
        counts = torch.zeros(self.facts.num_classes, dtype=torch.int64)
        for chunk in self.train_store.iter_chunks(["labels"]):
            counts += torch.bincount(torch.from_numpy(chunk["labels"]), minlength=len(counts))
        return weigh_classes(asked, counts)


def score_engine(config: Config, model: nn.Module, graph_batch: int | None = None) -> ScoreEngine:
    """Return what computes the scores that a run asks for; ``graph_batch`` as of the engine."""
    scores, likelihood = config.scores, bucketed(Softmax(), config.bucketing)
    return ScoreEngine(model, scores.parameters, likelihood, precision_of(scores.precision), graph_batch)


def gradnet_engine(config: Config, model: nn.Module) -> ScoreEngine:
    """Return what computes the scores whose entries GradNet takes."""
    return ScoreEngine(model, config.gradnet_section.parameters, precision=precision_of(config.scores.precision))


def base_network(config: Config, storage: Storage) -> nn.Module:
    """Return a run's network with the weights that its base stage wrote, in eval mode.

    Raises:
        StoreError: if there are none, or the file is damaged.
        ModelError: if they do not fit the network.
    """
    url = f"{storage.url.rstrip('/')}/{BASE_FILE}"
    try:
        state = safetensors.torch.load(storage.read_bytes(BASE_FILE))
    except FileNotFoundError:
        raise StoreError(f"there is no {url}: the run has not come so far. Run it again.") from None
    except (SafetensorError, ValueError) as error:
        raise StoreError(f"{url} is damaged: {error}. Put it back, or start the run anew with --fresh.") from error
    model = build_network(config.model, config.seed)
    load_state(model, state, url)
    return model


def require_network(storage: Storage, fingerprint: str) -> None:
    """Refuse a run's network if it is not the one that the run was begun with.

    Raises:
        ModelError: if it has another fingerprint, or is not there.
    """
    found = hashlib.sha256(storage.read_bytes(BASE_FILE)) if storage.exists(BASE_FILE) else None
    if found is None or found.hexdigest() != fingerprint:
        place = f"{storage.url.rstrip('/')}/{BASE_FILE}"
        raise ModelError(
            f"{place} is not, or no more, the network that this run was begun with. Put it back, or start the run anew "
            "with --fresh."
        )


def _open(config: Config, split: str, key: str | None = None) -> Source:
    section, key = getattr(config.data, split), key or f"data.{split}"
    return open_source(section, root=config.data.root, transform=config.data.transform, key=key)


def _refuse_other_classes(sources: dict[str, Source]) -> None:
    named = {source.key: source.classes for source in sources.values() if source.classes is not None}
    for key, classes in named.items():
        for other, others in named.items():
            if classes != others:
                odd = sorted({*classes} ^ {*others}) or [*classes]
                raise ConfigError(
                    f"{key} has {len(classes)} classes and {other} has {len(others)}, of other names or another order "
                    f"({', '.join(map(repr, odd[:3]))}), so that their labels would differ. Correct the paths, or, of "
                    "images, list all classes under 'classes' of each split."
                )


def inspect_request(config: Config) -> Facts:
    """Look at the model and the data before any work.

    Raises:
        ConfigError: if a file or function is missing, or the splits' inputs or classes differ.
        RequestError: if a class is weighted that there is not.
        ModelError: if the network, its layers or its checkpoint cannot be used.
        DataError: if a label is out of range or a split's first sample is bad.
    """
    splits = [split for split in SPLITS if getattr(config.data, split) is not None]
    if config.base is None:
        splits = [split for split in splits if split != "train"]
    sources = {split: _open(config, split) for split in splits}
    _refuse_other_classes(sources)
    model, fingerprints = build_network(config.model, config.seed), {}
    if config.model.checkpoint is not None:
        load_checkpoint(model, config.model.checkpoint)
    if config.base is None:
        fingerprints["checkpoint"] = hashlib.sha256(network_bytes(model)).hexdigest()
    engine = score_engine(config, model)
    firsts = {split: check_source(source, None, on_error=config.data.on_error) for split, source in sources.items()}
    shapes = {split: (tuple(x.shape[1:]), str(x.dtype).removeprefix("torch.")) for split, x in firsts.items()}
    if len(set(shapes.values())) > 1:
        raise ConfigError(f"the splits' samples have different shapes: {shapes}. Check data.transform and the paths.")
    inputs, shape = firsts["shallow"], shapes["shallow"][0]
    if config.linear.views == 2 and len(shape) < 2:
        raise ConfigError(f"linear.views 2 mirrors pictures, and a sample has shape {shape}. Set linear.views: 1.")
    if config.base is not None:
        fingerprints["model"] = hashlib.sha256(repr(model).encode() + network_bytes(model)).hexdigest()
    for batch in _first_rows(sources["shallow"], shape):
        inputs = batch.inputs
        fingerprints["transformed"] = hashlib.sha256(inputs[0].numpy().tobytes()).hexdigest()
    _refuse_dependent_rows(engine, inputs)
    logits, hidden = _try_network(engine, inputs)
    weigh_classes(config.linear.class_weights, torch.ones(logits))  # refuses what there is not
    for source in sources.values():
        check_source(source, logits, on_error=config.data.on_error)
    num_parameters = sum(num_outputs * num_inputs for num_outputs, num_inputs in engine.block_shapes.values())
    if config.linear.model != "gradnet":
        compression.plan(config.compression, config.metric, engine.block_shapes)
    gradnet_shapes = _gradnet_shapes(config, model, inputs, logits) if config.gradnet is not None else {}
    return Facts(
        {split: len(source) for split, source in sources.items()},
        {**{split: source.fingerprint() for split, source in sources.items()}, **fingerprints},
        shape,
        logits,
        hidden,
        engine.block_shapes,
        num_parameters,
        *choose_micro_batch(config, engine, inputs),
        gradnet_shapes,
        sources["test"].classes,
    )


def inspect_queries(config: Config, facts: Facts, request: ScoreConfig) -> tuple[Config, Facts, tuple[str, ...] | None]:
    """Look at samples from elsewhere, and put them in the place of a run's test split.

    Returns:
        Configuration and facts with these; and the queries' classes, if they are not the run's.

    Raises:
        ConfigError: if a file or function is missing, their inputs differ from the run's, or their classes do and
            count.
        DataError: if a label is out of range or the first sample is bad.
    """
    data = config.data.model_copy(update={"test": request.queries})
    config = config.model_copy(update={"data": data})
    source = _open(config, "test", "queries")
    shape = tuple(check_source(source, facts.num_classes, on_error=config.data.on_error).shape[1:])
    if shape != facts.input_shape:
        raise ConfigError(
            f"the queries' samples have shape {shape}, the run's {facts.input_shape}. Give such as these."
        )
    named = facts.class_names is not None or config.data.test.classes is None
    others = named and source.classes not in (None, facts.class_names)
    count = (request.target == "label" and request.by in ("influence", "ridge")) or config.scores.labels == "true"
    if others and count:
        raise ConfigError(
            f"the queries have classes of their own ({', '.join(map(repr, (source.classes or ())[:3]))}), so their "
            "labels mean nothing to the run. Set target: taken, or, of images, list the run's classes, in the order of "
            "its labels, under 'classes'."
        )
    rows = {**facts.num_rows, "test": len(source)}
    fingerprints = {**facts.fingerprints, "test": source.fingerprint()}
    return config, replace(facts, num_rows=rows, fingerprints=fingerprints), source.classes if others else None


def _gradnet_shapes(
    config: Config, model: nn.Module, inputs: torch.Tensor, num_classes: int
) -> dict[str, tuple[int, int]]:
    """Return the shapes of the blocks that GradNet takes, and refuse what it cannot be made for."""
    try:
        engine = gradnet_engine(config, model)
    except ModelError as error:
        raise ModelError(f"gradnet.parameters {config.gradnet_section.parameters!r}: {error}") from error
    _try_network(engine, inputs)
    network_shape(config.gradnet_section, engine.block_shapes, num_classes)
    return engine.block_shapes


def _try_network(engine: ScoreEngine, inputs: torch.Tensor) -> tuple[int, int | None]:
    with _naming_shape(inputs):
        scores = engine.all_classes(inputs)
    return scores.logits.shape[1], None if scores.hidden is None else scores.hidden.shape[1]


@contextmanager
def _naming_shape(inputs: torch.Tensor) -> Iterator[None]:
    try:
        yield
    except FisherRayError:
        raise
    except Exception as error:
        raise ModelError(
            f"the network fails on samples of shape {tuple(inputs.shape[1:])} and type "
            f"{str(inputs.dtype).removeprefix('torch.')}: {type(error).__name__}: {error}. "
            "Check data.transform against the network's input; one that takes tokens needs one that returns int64."
        ) from error


def _first_rows(source: Source, shape: tuple[int, ...]) -> Iterator[Batch]:
    """Return the good ones of the first rows as one batch; none if none is good."""
    rows = range(min(NUM_TRIED, len(source)))
    return load_batches(source, rows, len(rows), num_classes=None, expected_shape=shape, on_error="skip")


def _refuse_dependent_rows(engine: ScoreEngine, inputs: torch.Tensor) -> None:
    """Refuse a network that puts itself into train mode, or calls dropout or batch statistics as functions."""
    first = inputs[:1]
    with _naming_shape(first):
        alone = engine.output(first)
        together = engine.output(torch.cat([*[first] * NUM_TRIED, inputs]))[:NUM_TRIED]
    tolerance = engine.precision.tolerance * float(alone.nan_to_num().abs().max())
    if not torch.allclose(together, alone.expand_as(together), rtol=0.0, atol=tolerance, equal_nan=True):
        raise ModelError(
            "the network's output for a sample depends on the other samples of its batch, or on chance: look for "
            "dropout, batch statistics or a call of train() in its forward"
        )
