"""The Fisher metric: mergeable sums, estimators, Kronecker basis, low-rank metric, whitening."""

from fisher_ray.metric.diagonal import Diagonal
from fisher_ray.metric.exact import Exact
from fisher_ray.metric.fisher import FisherSum, decompose, held_out_damping
from fisher_ray.metric.frequent_directions import FrequentDirections
from fisher_ray.metric.kronecker import KroneckerSums, choose_bases, identity_bases, zero_sums
from fisher_ray.metric.lowrank import LowRankMetric, bases_from, basis_arrays
from fisher_ray.metric.nystrom import Nystrom

__all__ = [
    "Diagonal",
    "Exact",
    "FisherSum",
    "FrequentDirections",
    "KroneckerSums",
    "LowRankMetric",
    "Nystrom",
    "bases_from",
    "basis_arrays",
    "choose_bases",
    "decompose",
    "held_out_damping",
    "identity_bases",
    "zero_sums",
]
