"""What a process keeps between units, and the first look at a request."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import safetensors.torch
import torch
from torch import nn

from fisher_ray.config import Config
from fisher_ray.data import Source, check_source, open_source
from fisher_ray.errors import ConfigError, ModelError
from fisher_ray.gradients import KroneckerCompressor, ScoreEngine
from fisher_ray.metric import LowRankMetric, bases_from
from fisher_ray.stages.networks import build_network, load_checkpoint, load_state, network_bytes
from fisher_ray.storage import Storage
from fisher_ray.store import load_arrays

BASE_FILE = "base/model.safetensors"
SPLITS = ("train", "shallow", "test")
MAX_IDENTITY = 16384
"""Parameters that ``compression.kind: identity`` takes at most: a dense matrix of them is 2 GB."""


@dataclass(frozen=True)
class Facts:
    """What the first look found.

    Attributes:
        num_rows: by split.
        fingerprints: of the splits' data, and of the checkpoint or the untrained network.
        input_shape: one sample's.
        num_classes: ``C``.
        hidden: width of the last hidden layer, or None.
        block_shapes: ``(O, A)`` by block.
        num_parameters: ``P``, those whose gradients are taken.
    """

    num_rows: dict[str, int]
    fingerprints: dict[str, str]
    input_shape: tuple[int, ...]
    num_classes: int
    hidden: int | None
    block_shapes: dict[str, tuple[int, int]]
    num_parameters: int


class Workbench:
    """Everything that one process needs, made when first asked for and kept.

    A part is made from what earlier stages sealed; ask for it only after its stage.

    Args:
        config: the run's configuration, its paths absolute.
        facts: what the first look found.
        device: where to compute.
    """

    def __init__(self, config: Config, facts: Facts, device: str = "cpu") -> None:
        """See the class."""
        self.config, self.facts, self.device = config, facts, torch.device(device)
        self.storage = Storage(config.output)
        self._sources: dict[str, Source] = {}

    def url(self, name: str) -> str:
        """Return the URL of ``name`` in the run folder."""
        return f"{self.config.output.rstrip('/')}/{name}"

    def source(self, split: str) -> Source:
        """Return the split's rows."""
        if split not in self._sources:
            self._sources[split] = _open(self.config, split)
        return self._sources[split]

    def new_model(self) -> nn.Module:
        """Return a network of its own, with the base network's weights."""
        model = build_network(self.config.model, self.config.seed)
        load_state(model, safetensors.torch.load(self.storage.read_bytes(BASE_FILE)), self.url(BASE_FILE))
        return model.to(self.device)

    @cached_property
    def model(self) -> nn.Module:
        """The base network, in eval mode."""
        return self.new_model()

    @cached_property
    def engine(self) -> ScoreEngine:
        """What computes scores of the base network."""
        return ScoreEngine(self.model, self.config.scores.parameters)

    @cached_property
    def compressor(self) -> KroneckerCompressor:
        """The compression, from the basis that the metric stage wrote first."""
        arrays, attributes = load_arrays(self.url("basis.zarr"))
        return KroneckerCompressor(bases_from(arrays, attributes["blocks"]), self._like)

    @cached_property
    def metric(self) -> LowRankMetric:
        """The metric."""
        return LowRankMetric.load(self.url("metric.zarr"))

    @property
    def _like(self) -> torch.Tensor:
        return torch.zeros((), device=self.device)


def _open(config: Config, split: str) -> Source:
    section = getattr(config.data, split)
    return open_source(section, root=config.data.root, transform=config.data.transform, key=f"data.{split}")


def inspect_request(config: Config) -> Facts:
    """Look at the model and the data before any work.

    Raises:
        ConfigError: if a file or function is missing, or the splits' inputs have different shapes.
        ModelError: if the network, its layers or its checkpoint cannot be used.
        DataError: if a label is out of range or a split's first sample is bad.
    """
    splits = [split for split in SPLITS if getattr(config.data, split) is not None]
    if config.base is None:
        splits = [split for split in splits if split != "train"]
    sources = {split: _open(config, split) for split in splits}
    model, fingerprints = build_network(config.model, config.seed), {}
    if config.model.checkpoint is not None:
        load_checkpoint(model, config.model.checkpoint)
        fingerprints["checkpoint"] = hashlib.sha256(network_bytes(model)).hexdigest()
    engine = ScoreEngine(model, config.scores.parameters)
    shapes = {split: check_source(source, None, on_error=config.data.on_error) for split, source in sources.items()}
    if len(set(shapes.values())) > 1:
        raise ConfigError(f"the splits' samples have different shapes: {shapes}. Check data.transform and the paths.")
    shape = shapes["shallow"]
    if config.linear.views == 2 and len(shape) < 2:
        raise ConfigError(f"linear.views 2 mirrors pictures, and a sample has shape {shape}. Set linear.views: 1.")
    if config.base is not None:
        fingerprints["model"] = hashlib.sha256(repr(model).encode() + network_bytes(model)).hexdigest()
    logits, hidden = _try_network(model, engine, shape)
    for source in sources.values():
        check_source(source, logits, on_error=config.data.on_error)
    num_parameters = sum(num_outputs * num_inputs for num_outputs, num_inputs in engine.block_shapes.values())
    if config.compression.kind == "identity" and num_parameters > MAX_IDENTITY:
        raise ConfigError(
            f"compression.kind identity keeps all {num_parameters} parameters, and its Fisher matrix is dense: at most "
            f"{MAX_IDENTITY}. Set compression.kind: kronecker, or choose fewer with scores.parameters."
        )
    return Facts(
        {split: len(source) for split, source in sources.items()},
        {**{split: source.fingerprint() for split, source in sources.items()}, **fingerprints},
        shape,
        logits,
        hidden,
        engine.block_shapes,
        num_parameters,
    )


def _try_network(model: nn.Module, engine: ScoreEngine, shape: tuple[int, ...]) -> tuple[int, int | None]:
    sample = torch.zeros(1, *shape)
    try:
        scores = engine.all_classes(sample)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ModelError(
            f"the network fails on a sample of shape {shape}: {type(error).__name__}: {error}. "
            "Check data.transform against the network's input."
        ) from error
    return scores.logits.shape[1], None if scores.hidden is None else scores.hidden.shape[1]
