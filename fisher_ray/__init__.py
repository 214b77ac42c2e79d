"""Fisher feature maps of PyTorch networks, computed as a batch job on Ray, and shallow models trained on them.

Names are loaded when first used, so that importing the package, or asking the command line for help, is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fisher_ray.attribution import audit, score
    from fisher_ray.classifier import (
        FisherClassifier,
        features,
        fit_metric,
        parameter_directions,
        project,
        train_linear,
        write_features,
    )
    from fisher_ray.config import Config
    from fisher_ray.errors import (
        ClaimedError,
        ConfigError,
        DataError,
        FisherRayError,
        ModelError,
        RequestError,
        ResumeMismatchError,
        StoppedError,
        StorageError,
        StoreError,
        WorkersLostError,
    )
    from fisher_ray.gradients import class_scores, per_sample_gradients
    from fisher_ray.metric import LowRankMetric
    from fisher_ray.pipeline import run
    from fisher_ray.runtime.datasets import to_ray_dataset
    from fisher_ray.store import FeatureStore, open_features
    from fisher_ray.store.torch_dataset import FeatureDataset

__version__ = "0.1.0"

__all__ = [
    "ClaimedError",
    "Config",
    "ConfigError",
    "DataError",
    "FeatureDataset",
    "FeatureStore",
    "FisherClassifier",
    "FisherRayError",
    "LowRankMetric",
    "ModelError",
    "RequestError",
    "ResumeMismatchError",
    "StoppedError",
    "StorageError",
    "StoreError",
    "WorkersLostError",
    "audit",
    "class_scores",
    "features",
    "fit_metric",
    "open_features",
    "parameter_directions",
    "per_sample_gradients",
    "project",
    "run",
    "score",
    "to_ray_dataset",
    "train_linear",
    "write_features",
]

_ROOMS = {
    "attribution": ("audit", "score"),
    "classifier": (
        "FisherClassifier",
        "features",
        "fit_metric",
        "parameter_directions",
        "project",
        "train_linear",
        "write_features",
    ),
    "config": ("Config",),
    "gradients": ("class_scores", "per_sample_gradients"),
    "metric": ("LowRankMetric",),
    "pipeline": ("run",),
    "runtime.datasets": ("to_ray_dataset",),
    "store": ("FeatureStore", "open_features"),
    "store.torch_dataset": ("FeatureDataset",),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_ROOM_OF.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
