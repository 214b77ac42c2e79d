"""Shallow models: ridge in closed form, preconditioned logistic regression, GradNet; and accuracy."""

from fisher_ray.linear.columns import Columns, feature_columns, grid
from fisher_ray.linear.gradnet import GradNet, Shape, densify, plan_shape
from fisher_ray.linear.lbfgs import Minimum, minimise
from fisher_ray.linear.leave_one_out import RidgeSystem
from fisher_ray.linear.logistic import Preconditioner, loss_and_gradient, preconditioner, sum_gradients
from fisher_ray.linear.moments import ColumnSums
from fisher_ray.linear.pieces import Descent, PieceTrainer, cut_pieces, join_state, share_pieces, state_shapes
from fisher_ray.linear.ridge import LinearWeights, ridge_path
from fisher_ray.linear.scoring import accuracy, best_penalty, fit_temperature, wilson_interval
from fisher_ray.linear.stochastic import Adam, StandardColumns
from fisher_ray.linear.sums import GramSum, standardise
from fisher_ray.linear.weighting import ClassWeights, weigh_classes

__all__ = [
    "Adam",
    "ClassWeights",
    "ColumnSums",
    "Columns",
    "Descent",
    "GradNet",
    "GramSum",
    "LinearWeights",
    "Minimum",
    "PieceTrainer",
    "Preconditioner",
    "RidgeSystem",
    "Shape",
    "StandardColumns",
    "accuracy",
    "best_penalty",
    "cut_pieces",
    "densify",
    "feature_columns",
    "fit_temperature",
    "grid",
    "join_state",
    "loss_and_gradient",
    "minimise",
    "plan_shape",
    "preconditioner",
    "ridge_path",
    "share_pieces",
    "standardise",
    "state_shapes",
    "sum_gradients",
    "weigh_classes",
    "wilson_interval",
]
