"""Linear models from mergeable sums: ridge in closed form, preconditioned logistic regression, accuracy."""

from fisher_ray.linear.columns import Columns, feature_columns, grid
from fisher_ray.linear.lbfgs import Minimum, minimise
from fisher_ray.linear.logistic import Preconditioner, loss_and_gradient, preconditioner, sum_gradients
from fisher_ray.linear.ridge import LinearWeights, ridge_path
from fisher_ray.linear.scoring import accuracy, best_penalty, fit_temperature, wilson_interval
from fisher_ray.linear.sums import GramSum, standardise
from fisher_ray.linear.weighting import ClassWeights, weigh_classes

__all__ = [
    "ClassWeights",
    "Columns",
    "GramSum",
    "LinearWeights",
    "Minimum",
    "Preconditioner",
    "accuracy",
    "best_penalty",
    "feature_columns",
    "fit_temperature",
    "grid",
    "loss_and_gradient",
    "minimise",
    "preconditioner",
    "ridge_path",
    "standardise",
    "sum_gradients",
    "weigh_classes",
    "wilson_interval",
]
