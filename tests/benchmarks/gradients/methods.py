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
from fisher_ray.stages.passes import kronecker_pass
from tests.benchmarks.gradients.workloads import Workload

Run = Callable[[], Any]
MICRO_BATCH = 32
"""Samples of all classes at a time: enough to keep two cores busy, and what an allocator gives back is little."""
SKETCH_DIM, KRONECKER_DIM = 4096, 2048


def plain(work: Workload) -> Run:
    """A plain forward and backward of the whole batch: the unit of all ratios."""

    def run() -> None:
        work.model.zero_grad(set_to_none=True)
        functional.cross_entropy(work.model(work.inputs), work.labels, reduction="sum").backward()

    return run


def factors(work: Workload) -> Run:
    engine = ScoreEngine(work.model)
    return lambda: engine.of_labels(work.inputs, work.labels)


def exact(work: Workload) -> Run:
    engine = ScoreEngine(work.model)
    buffer = GradientBuffer(engine.blocks, work.model, len(work.inputs))
    return lambda: buffer.fill(engine.of_labels(work.inputs, work.labels))


def projected(work: Workload) -> Run:
    engine = ScoreEngine(work.model)
    compressor = Compressor(random_bases(engine.blocks, work.width, 0), engine.blocks, next(work.model.parameters()))
    return lambda: compressor.compress(engine.of_labels(work.inputs, work.labels))


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
    engine = ScoreEngine(work.model)
    sketch = GradientSketch(engine.blocks, SKETCH_DIM, 0, next(work.model.parameters()))
    return lambda: sketch.compress(engine.of_labels(work.inputs, work.labels))


def all_classes(work: Workload) -> Run | None:
    if work.name != "W1":
        return None
    engine = ScoreEngine(work.model)
    buffer = GradientBuffer(engine.blocks, work.model, len(work.inputs), 10)
    return lambda: buffer.fill(engine.all_classes(work.inputs))


def all_classes_compressed(work: Workload) -> Run | None:
    if work.name != "W1":
        return None
    engine = ScoreEngine(work.model)
    batch = Batch(work.inputs, work.labels, torch.arange(len(work.inputs)))
    moments = kronecker_pass(engine, engine.block_shapes, [batch], "all", 0)
    bases = choose_bases(moments, engine.block_shapes, KRONECKER_DIM)
    compressor = Compressor(bases, engine.blocks, work.inputs)

    def run() -> list[Any]:
        found = []
        for part in work.inputs.split(MICRO_BATCH):
            scores, reflection = engine.spanning_classes(part)
            found.append(reflection.complete(compressor.compress(scores)))
        return found

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
    return lambda: each(parameters, work.inputs, work.labels)


def func_jacobian(work: Workload) -> Run | None:
    if work.name != "W1":
        return None
    parameters = {name: value.detach() for name, value in work.model.named_parameters()}

    def logits(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(work.model, values, (x[None],))[0]

    each = vmap(jacrev(logits), in_dims=(None, 0))
    return lambda: each(parameters, work.inputs)


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
    "torch.func vmap(jacrev)": func_jacobian,
    "one sample at a time": one_at_a_time,
}
