"""The configuration: what a run is asked for, read from YAML."""

from fisher_ray.config.attribution import AuditConfig, By, ScoreConfig
from fisher_ray.config.gradnet import TRAINING_KEYS, GradNetConfig
from fisher_ray.config.run import Config, read_yaml
from fisher_ray.config.sections import (
    AbsoluteDamping,
    BaseConfig,
    CompressionConfig,
    ConvergenceConfig,
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
from fisher_ray.config.template import schema, template

__all__ = [
    "TRAINING_KEYS",
    "AbsoluteDamping",
    "AuditConfig",
    "BaseConfig",
    "By",
    "CompressionConfig",
    "Config",
    "ConvergenceConfig",
    "DataConfig",
    "GradNetConfig",
    "Kind",
    "LayerCompressionConfig",
    "LinearConfig",
    "MetricConfig",
    "ModelConfig",
    "RuntimeConfig",
    "ScoreConfig",
    "ScoresConfig",
    "SourceConfig",
    "StoreConfig",
    "TrainedOnConfig",
    "read_yaml",
    "schema",
    "template",
]
