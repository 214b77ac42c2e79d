"""The Fisher metric: mergeable sums, compressions, low-rank metric, whitening; normalisations, class gaps."""

from fisher_ray.metric.bases import (
    Plans,
    bases_from,
    basis_arrays,
    basis_attributes,
    plan_compression,
)
from fisher_ray.metric.class_gap import ClassGapSum, class_gaps
from fisher_ray.metric.damping import held_out_damping
from fisher_ray.metric.diagonal import Diagonal
from fisher_ray.metric.exact import Exact
from fisher_ray.metric.fisher import FisherSum
from fisher_ray.metric.frequent_directions import FrequentDirections
from fisher_ray.metric.kronecker import KroneckerSums, choose_bases, zero_sums
from fisher_ray.metric.lowrank import LayerTrace, LowRankMetric, Part
from fisher_ray.metric.normalisation import Normalisation
from fisher_ray.metric.nystrom import Nystrom
from fisher_ray.metric.ranges import RangeSum
from fisher_ray.metric.sparse import SparseMetric

__all__ = [
    "ClassGapSum",
    "Diagonal",
    "Exact",
    "FisherSum",
    "FrequentDirections",
    "KroneckerSums",
    "LayerTrace",
    "LowRankMetric",
    "Normalisation",
    "Nystrom",
    "Part",
    "Plans",
    "RangeSum",
    "SparseMetric",
    "bases_from",
    "basis_arrays",
    "basis_attributes",
    "choose_bases",
    "class_gaps",
    "held_out_damping",
    "plan_compression",
    "zero_sums",
]
