"""What the first look at a request found."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Facts:
    """What the first look found.

    Attributes:
        num_rows: by split.
        fingerprints: of the splits' data, of the checkpoint or the untrained network, and of the first transformed
            sample.
        input_shape: one sample's.
        num_classes: ``C``.
        hidden: width of the last hidden layer, or None.
        block_shapes: ``(O, A)`` by block.
        num_parameters: ``P``, those whose gradients are taken.
        micro_batch: samples whose scores are computed together.
        micro_batch_gpu: the same for workers with GPUs.
        gradnet_shapes: ``(O, A)`` by block of the gradients that GradNet takes; empty if it is not run.
        class_names: of the labels, where the samples' source has them.
    """

    num_rows: dict[str, int]
    fingerprints: dict[str, str]
    input_shape: tuple[int, ...]
    num_classes: int
    hidden: int | None
    block_shapes: dict[str, tuple[int, int]]
    num_parameters: int
    micro_batch: int
    micro_batch_gpu: int
    gradnet_shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    class_names: tuple[str, ...] | None = None
