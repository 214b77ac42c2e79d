"""The Fisher metric: mergeable sums, Kronecker basis, low-rank metric, whitening."""

from fisher_ray.metric.bases import (
    Plans,
    bases_from,
    basis_arrays,
    basis_attributes,
    plan_compression,
    sketches,
)
from fisher_ray.metric.damping import held_out_damping
from fisher_ray.metric.fisher import FisherSum
from fisher_ray.metric.kronecker import KroneckerSums, choose_bases, zero_sums
from fisher_ray.metric.lowrank import LayerTrace, LowRankMetric, Part

__all__ = [
    "FisherSum",
    "KroneckerSums",
    "LayerTrace",
    "LowRankMetric",
    "Part",
    "Plans",
    "bases_from",
    "basis_arrays",
    "basis_attributes",
    "choose_bases",
    "held_out_damping",
    "plan_compression",
    "sketches",
    "zero_sums",
]
