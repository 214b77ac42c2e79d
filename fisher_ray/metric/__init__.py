"""The Fisher metric: mergeable sums, Kronecker basis, low-rank metric, whitening."""

from fisher_ray.metric.class_gap import ClassGapSum, class_gaps
from fisher_ray.metric.fisher import FisherSum, decompose, held_out_damping
from fisher_ray.metric.kronecker import KroneckerSums, choose_bases, identity_bases, zero_sums
from fisher_ray.metric.lowrank import LowRankMetric, bases_from, basis_arrays
from fisher_ray.metric.normalisation import Normalisation
from fisher_ray.metric.ranges import RangeSum
from fisher_ray.metric.sparse import SparseMetric

__all__ = [
    "ClassGapSum",
    "FisherSum",
    "KroneckerSums",
    "LowRankMetric",
    "Normalisation",
    "RangeSum",
    "SparseMetric",
    "bases_from",
    "basis_arrays",
    "choose_bases",
    "class_gaps",
    "decompose",
    "held_out_damping",
    "identity_bases",
    "zero_sums",
]
