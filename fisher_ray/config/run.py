"""One run's whole configuration."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, model_validator

from fisher_ray.config.gradnet import GradNetConfig
from fisher_ray.config.section import Section
from fisher_ray.config.sections import (
    BaseConfig,
    CompressionConfig,
    DataConfig,
    LinearConfig,
    MetricConfig,
    ModelConfig,
    RuntimeConfig,
    ScoresConfig,
    StoreConfig,
    TrainedOnConfig,
)
from fisher_ray.errors import ConfigError

_OF_RESULTS = ("cpus_per_worker", "unit_rows", "micro_batch", "memory_bytes")
"""What results depend on of all that ``runtime`` says."""
_PLACES: Any = {"output": True, "tensorboard": True, "data": {"root"}, "model": {"checkpoint"}}


class Config(Section):
    """One run, whole. Read it from YAML with ``Config.from_yaml``."""

    output: str
    """Run folder: a local path or ``s3://bucket/prefix``."""
    seed: Annotated[int, Field(ge=0, strict=True)] = 0
    """Of everything that is drawn."""
    data: DataConfig
    model: ModelConfig
    base: BaseConfig | None = None
    scores: ScoresConfig = ScoresConfig()
    compression: CompressionConfig = CompressionConfig()
    metric: MetricConfig = MetricConfig()
    store: StoreConfig = StoreConfig()
    linear: LinearConfig = LinearConfig()
    gradnet: GradNetConfig | None = None
    """``null`` leaves it out, unless ``linear.model`` is ``gradnet``; ``{}`` has its defaults."""
    trained_on: TrainedOnConfig | None = TrainedOnConfig()
    """``null`` leaves it out of the comparison."""
    runtime: RuntimeConfig = RuntimeConfig()
    tensorboard: str | None = None
    """Local folder to which a finished run also writes its numbers and figures for TensorBoard; ``null``: nowhere."""

    @model_validator(mode="before")
    @classmethod
    def _with_gradnet(cls, values: Any) -> Any:
        linear = values.get("linear") if isinstance(values, dict) else None
        if isinstance(linear, dict) and linear.get("model") == "gradnet" and values.get("gradnet") is None:
            return {**values, "gradnet": {}}
        return values

    @model_validator(mode="after")
    def _check(self) -> Config:
        if (self.base is not None) + (self.model.checkpoint is not None) + self.model.pretrained != 1:
            raise ValueError(
                "give 'base' (train the network here), 'model.checkpoint' (load it) or 'model.pretrained' (the factory "
                "returns a trained one), and only one of them"
            )
        if "://" in (self.tensorboard or ""):
            raise ValueError(f"tensorboard {self.tensorboard!r} is a URL. Give a local folder")
        if self.base is not None and self.data.train is None:
            raise ValueError("'base' needs 'data.train'")
        rows, chunk, shard = self.runtime.unit_rows, self.store.chunk_rows, self.store.shard_rows
        if rows % chunk:
            raise ValueError(f"runtime.unit_rows {rows} is not a multiple of store.chunk_rows {chunk}")
        if shard is not None and (shard % chunk or rows % shard):
            what = f"store.shard_rows {shard} is not a multiple of store.chunk_rows {chunk}"
            raise ValueError(f"{what} that divides runtime.unit_rows {rows}")
        self.metric.check_labels(self.metric_labels)
        if "identity" not in self.compression.kinds and self.metric.rank > self.compression.dim:
            raise ValueError(f"metric.rank {self.metric.rank} is more than compression.dim {self.compression.dim}")
        if max(self.linear.ranks or (0,)) > self.metric.rank:
            raise ValueError(f"linear.ranks {list(self.linear.ranks or ())} go beyond metric.rank {self.metric.rank}")
        if self.base is not None and max(self.base.snapshots, default=0) > self.base.steps:
            raise ValueError(f"base.snapshots {list(self.base.snapshots)} go beyond base.steps {self.base.steps}")
        return self

    @property
    def metric_labels(self) -> str:
        """Whose scores the metric is of."""
        return self.metric.labels or self.scores.labels

    @property
    def bucketing(self) -> tuple[int, int] | None:
        """How many buckets of classes are asked for, and their seed; or None."""
        return None if self.scores.class_buckets is None else (self.scores.class_buckets, self.seed)

    @property
    def gradnet_section(self) -> GradNetConfig:
        """What is asked of GradNet.

        Raises:
            ValueError: if it is not run.
        """
        if self.gradnet is None:
            raise ValueError("this run has no section 'gradnet'")
        return self.gradnet

    def identity(self) -> dict[str, Any]:
        """Return the keys and values that results depend on.

        That is all but places, how many workers there are, and ``data.on_error``: what there is already had no wrong
        row, or says which rows it left out.
        """
        values = self.model_dump(mode="json", exclude=_PLACES)
        del values["data"]["on_error"]
        layers = values["compression"]["layers"]
        values["compression"]["layers"] = [[glob, layers[glob]] for glob in self.compression.layers]  # the order counts
        if self.gradnet is not None:
            del values["gradnet"]["checkpoint_steps"]
        values["runtime"] = {key: values["runtime"][key] for key in _OF_RESULTS}
        return values

    def located(self) -> Config:
        """Return this configuration with its relative places joined to the working directory."""
        model = self.model
        if model.checkpoint is not None:
            model = model.model_copy(update={"checkpoint": _absolute(model.checkpoint)})
        data = self.data.model_copy(update={"root": _absolute(self.data.root)})
        places = {"output": _absolute(self.output), "tensorboard": self.tensorboard and _absolute(self.tensorboard)}
        return self.model_copy(update={**places, "data": data, "model": model})

    @classmethod
    def from_dict(cls, values: dict[str, Any], overrides: Sequence[str] = ()) -> Config:
        """Check ``values``, to which ``overrides`` of the form ``a.b=value`` are applied.

        Raises:
            ConfigError: naming every wrong key by its full path, its value, and the nearest right key.
        """
        values = copy.deepcopy(values)
        for override in overrides:
            _override(values, override)
        return cls.checked(values)

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Config:
        """Read ``path`` (safe YAML) and apply ``overrides`` of the form ``a.b=value``.

        Raises:
            ConfigError: if the file is missing, is not a YAML mapping, or breaks a rule.
        """
        return cls.from_dict(read_yaml(path, overrides))


def read_yaml(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a mapping from a file of safe YAML, and apply ``overrides`` of the form ``a.b=value``.

    Raises:
        ConfigError: if the file is missing or is not such a mapping, or an override is not of that form.
    """
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"configuration {path}: {error.strerror}. Give the path of a YAML file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration {path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"configuration {path} is not a mapping of keys to values")
    for override in overrides:
        _override(values, override)
    return values


def _absolute(place: str) -> str:
    return place if "://" in place else os.path.abspath(place)


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override!r} is not of the form a.b=value")
    *path, last = key.split(".")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not YAML: {error}") from None
    node = values
    for part in path:
        child = node.get(part)
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override!r}: {part!r} holds {child!r}, not a section")
        node = child
    node[last] = value
