"""Per-sample gradients: capture of factors, per-layer formulas, scores, compression."""

from fisher_ray.gradients.blocks import Block
from fisher_ray.gradients.buckets import bucketed
from fisher_ray.gradients.compression import Compressor, random_bases, random_basis
from fisher_ray.gradients.exact import GradientBuffer
from fisher_ray.gradients.factors import Factors
from fisher_ray.gradients.forming import Scores, form_gradients
from fisher_ray.gradients.labels import draw_labels, keyed_uniform
from fisher_ray.gradients.largest import LargestEntries, PercentileEntries, num_above
from fisher_ray.gradients.likelihood import Bernoulli, Custom, Gaussian, Likelihood, NextToken, Softmax, likelihood_of
from fisher_ray.gradients.memory import is_out_of_memory, peak_bytes
from fisher_ray.gradients.norms import square_norms
from fisher_ray.gradients.outputs import main_output
from fisher_ray.gradients.precision import precision_of
from fisher_ray.gradients.scores import ScoreEngine, class_scores, per_sample_gradients
from fisher_ray.gradients.sketch import GradientSketch

__all__ = [
    "Bernoulli",
    "Block",
    "Compressor",
    "Custom",
    "Factors",
    "Gaussian",
    "GradientBuffer",
    "GradientSketch",
    "LargestEntries",
    "Likelihood",
    "NextToken",
    "PercentileEntries",
    "ScoreEngine",
    "Scores",
    "Softmax",
    "bucketed",
    "class_scores",
    "draw_labels",
    "form_gradients",
    "is_out_of_memory",
    "keyed_uniform",
    "likelihood_of",
    "main_output",
    "num_above",
    "peak_bytes",
    "per_sample_gradients",
    "precision_of",
    "random_bases",
    "random_basis",
    "square_norms",
]
