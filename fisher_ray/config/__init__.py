"""The configuration: what a run is asked for, read from YAML."""

from fisher_ray.config.run import Config
from fisher_ray.config.sections import (
    AbsoluteDamping,
    BaseConfig,
    CompressionConfig,
    DataConfig,
    Kind,
    LayerCompressionConfig,
    LinearConfig,
    MetricConfig,
    ModelConfig,
    RuntimeConfig,
    ScoresConfig,
    SourceConfig,
    StoreConfig,
    TrainedOnConfig,
)

__all__ = [
    "AbsoluteDamping",
    "BaseConfig",
    "CompressionConfig",
    "Config",
    "DataConfig",
    "Kind",
    "LayerCompressionConfig",
    "LinearConfig",
    "MetricConfig",
    "ModelConfig",
    "RuntimeConfig",
    "ScoresConfig",
    "SourceConfig",
    "StoreConfig",
    "TrainedOnConfig",
]
