"""What is compared: this package's ways to per-sample gradients, and torch's own.

Each method makes a function without arguments out of a workload: one call is one batch. None where it does not apply.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn import functional

from fisher_ray.gradients import Compressor, GradientBuffer, GradientSketch, ScoreEngine, random_bases
from fisher_ray.metric import choose_bases
from fisher_ray.records import Batch
from fisher_ray.stages.passes import compressed_scores, kronecker_pass
from tests.benchmarks.gradients.workloads import Workload

Run = Callable[[], Any]
MICRO_BATCH = 32
"""Samples of all classes at a time on a CPU: enough for two cores, and what an allocator gives back is little."""
SKETCH_DIM, KRONECKER_DIM = 4096, 2048


def plain(work: Workload) -> Run:
    """A plain forward and backward of the whole batch: the unit of all ratios."""

    def run() -> None:
        work.model.zero_grad(set_to_none=True)
        with work.autocast():
            loss = functional.cross_entropy(work.model(work.inputs), work.labels, reduction="sum")
        loss.backward()

    return run


def _engine(work: Workload) -> ScoreEngine:
    return ScoreEngine(work.model, precision=work.precision, graph_batch=len(work.inputs))


def _compressing(work: Workload, engine: ScoreEngine, compressor: Compressor | GradientSketch) -> Run:
    """One label a sample, as passes run it: on a GPU as a graph. The labels are checked, as passes do it, before."""

    def compute(inputs: Tensor, labels: Tensor) -> tuple[Tensor]:
        return (compressor.compress(engine.of_draws(inputs, lambda output, number: labels, 1)),)

    return lambda: engine.graphs.run(compressor, compute, work.inputs, work.labels)[0]


def factors(work: Workload) -> Run:
    engine = _engine(work)
    return lambda: engine.of_labels(work.inputs, work.labels)


def exact(work: Workload) -> Run:
    engine = _engine(work)
    buffer = GradientBuffer(engine.blocks, work.model, len(work.inputs))
    return lambda: buffer.fill(engine.of_labels(work.inputs, work.labels))


def projected(work: Workload) -> Run:
    engine = _engine(work)
    compressor = Compressor(random_bases(engine.blocks, work.width, 0), engine.blocks, next(work.model.parameters()))
    return _compressing(work, engine, compressor)


def projected_linear(work: Workload) -> Run | None:
    """The same of linear layers alone, which is all that the peers that project know of a transformer."""
    if work.name != "W3":
        return None
    model = copy.deepcopy(work.model).requires_grad_(False)  # what is frozen is left out
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.requires_grad_(True)
    return projected(replace(work, model=model))


def sketched(work: Workload) -> Run:
    engine = _engine(work)
    sketch = GradientSketch(engine.blocks, SKETCH_DIM, 0, next(work.model.parameters()))
    return _compressing(work, engine, sketch)


def all_classes(work: Workload) -> Run | None:
    if work.name != "W1":
        return None
    engine = _engine(work)
    buffer = GradientBuffer(engine.blocks, work.model, len(work.inputs), 10)
    return lambda: buffer.fill(engine.all_classes(work.inputs))


def all_classes_compressed(work: Workload) -> Run | None:
    if work.name != "W1":
        return None
    engine = _engine(work)
    batch = Batch(work.inputs, work.labels, torch.arange(len(work.inputs)))
    moments = kronecker_pass(engine, engine.block_shapes, [batch], "all", 0)
    bases = choose_bases(moments, engine.block_shapes, KRONECKER_DIM)
    compressor = Compressor(bases, engine.blocks, work.inputs)

    def run() -> list[Any]:
        size = len(work.inputs) if work.inputs.is_cuda else MICRO_BATCH
        parts = (Batch(part, work.labels, work.labels) for part in work.inputs.split(size))
        return [compressed_scores(engine, compressor, part, "all", 0)[2] for part in parts]

    return run


def one_at_a_time(work: Workload) -> Run:
    parameters = list(work.model.parameters())

    def run() -> list[Any]:
        rows = []
        for x, y in zip(work.inputs, work.labels, strict=True):
            loss = functional.cross_entropy(work.model(x[None]), y[None])
            rows.append(torch.autograd.grad(loss, parameters))
        return rows

    return run


def func_gradients(work: Workload) -> Run:
    parameters = {name: value.detach() for name, value in work.model.named_parameters()}

    def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(functional_call(work.model, values, (x[None],)), y[None])

    each = vmap(grad(loss), in_dims=(None, 0, 0))

    def run() -> dict[str, Tensor]:
        with work.autocast():
            found: dict[str, Tensor] = each(parameters, work.inputs, work.labels)
        return found

    return run


def func_projected(work: Workload) -> Run:
    """Gradients by ``torch.func``, then a two-sided projection of every weight's, as wide as this package's."""
    gradients, sides = func_gradients(work), {}
    for name, value in work.model.named_parameters():
        if value.ndim > 1:
            shape = (len(value), value[0].numel())
            sides[name] = [torch.randn(size, min(size, work.width), device=value.device) for size in shape]

    def run() -> list[Tensor]:
        return [
            (sides[name][0].T @ value.flatten(2) @ sides[name][1]) if name in sides else value
            for name, value in gradients().items()
        ]

    return run


def func_jacobian(work: Workload) -> Run | None:
    if work.name != "W1":
        return None
    parameters = {name: value.detach() for name, value in work.model.named_parameters()}

    def logits(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(work.model, values, (x[None],))[0]

    each = vmap(jacrev(logits), in_dims=(None, 0))

    def run() -> Any:
        with work.autocast():
            return each(parameters, work.inputs)

    return run


METHODS: dict[str, Callable[[Workload], Run | None]] = {
    "plain": plain,
    "factors": factors,
    "exact": exact,
    "projected": projected,
    "projected linear layers": projected_linear,
    "sketched": sketched,
    "all classes": all_classes,
    "all classes compressed": all_classes_compressed,
    "torch.func vmap(grad)": func_gradients,
    "torch.func vmap(grad), projected": func_projected,
    "torch.func vmap(jacrev)": func_jacobian,
    "one sample at a time": one_at_a_time,
}
