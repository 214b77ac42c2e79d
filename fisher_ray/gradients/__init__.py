"""Per-sample gradients: capture of factors, per-layer formulas, scores, compression."""

from fisher_ray.gradients.compression import KroneckerCompressor
from fisher_ray.gradients.labels import draw_labels, keyed_uniform
from fisher_ray.gradients.scores import Factors, ScoreEngine, Scores, class_scores, per_sample_gradients

__all__ = [
    "Factors",
    "KroneckerCompressor",
    "ScoreEngine",
    "Scores",
    "class_scores",
    "draw_labels",
    "keyed_uniform",
    "per_sample_gradients",
]
