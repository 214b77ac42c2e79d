"""Metric, features and linear model on tensors in this process, without Ray; and the classifier that they make."""

from fisher_ray.classifier.directions import parameter_directions, project
from fisher_ray.classifier.fitting import features, fit_metric, train_linear, write_features
from fisher_ray.classifier.module import FisherClassifier

__all__ = [
    "FisherClassifier",
    "features",
    "fit_metric",
    "parameter_directions",
    "project",
    "train_linear",
    "write_features",
]
