"""Other libraries' per-sample gradients, exact and compressed, where they are installed.

The compressed ones are random two-sided projections of each layer's gradients, as wide as this package's. Each library
makes them during one forward and backward of a batch, and what it keeps of it is the result: a tensor for each layer.
None projects embeddings or layer norms. What a batch's backward would make besides, gradients of whole weights among
it, is frozen in their copies of the network as far as their hooks allow.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

from tests.benchmarks.gradients.methods import SKETCH_DIM, Run, func_gradients
from tests.benchmarks.gradients.workloads import Workload


def opacus(work: Workload, mode: str = "hooks") -> Run | None:
    if not _installed("opacus"):
        return None
    from opacus.grad_sample import GradSampleModule
    from opacus.grad_sample.gsm_exp_weights import GradSampleModuleExpandedWeights

    torch.manual_seed(0)
    inner = copy.deepcopy(work.model).train()  # it looks at no layer in eval mode
    kind = {"hooks": GradSampleModule, "expanded": GradSampleModuleExpandedWeights}[mode]
    try:
        model = kind(inner, loss_reduction="sum", batch_first=True)
    except (NotImplementedError, RuntimeError):
        return None

    def run() -> None:
        model.zero_grad(set_to_none=True)
        for parameter in model.parameters():
            parameter.grad_sample = None
        functional.cross_entropy(model(work.inputs), work.labels, reduction="sum").backward()

    return run


def opacus_expanded(work: Workload) -> Run | None:
    return opacus(work, "expanded")


def backpack(work: Workload) -> Run | None:
    if not _installed("backpack") or work.name == "W3":
        return None
    from backpack import backpack as extending
    from backpack import extend
    from backpack.extensions import BatchGrad

    model, loss = extend(copy.deepcopy(work.model)), extend(nn.CrossEntropyLoss(reduction="sum"))

    def run() -> None:
        model.zero_grad(set_to_none=True)
        with extending(BatchGrad()):
            loss(model(work.inputs), work.labels).backward()

    return run


def trak(work: Workload) -> Run | None:
    """TRAK's CPU projector of gradients that ``torch.func`` makes."""
    if not _installed("trak") or work.name != "W1":  # minutes for more parameters
        return None
    from trak.projectors import BasicProjector, ProjectionType

    gradients = func_gradients(work)
    size = sum(parameter.numel() for parameter in work.model.parameters())
    projector = BasicProjector(
        grad_dim=size,
        proj_dim=SKETCH_DIM,
        seed=0,
        proj_type=ProjectionType.rademacher,
        device=torch.device("cpu"),
        block_size=256,
    )

    def run() -> Any:
        flat = torch.cat([value.flatten(1) for value in gradients().values()], dim=1)
        return projector.project(flat, model_id=0)

    return run


def dattri(work: Workload, stance: Literal["default", "force_eager"] = "default") -> Run | None:
    """Dattri's LoGra: linear layers' weights and biases, every layer to ``width × width`` numbers.

    What its attributor does to a batch before it keeps the rows: the patched layers' forward, the backward of the mean
    loss (its own scaling undoes the mean), the projections inside it, compiled by torch as the library asks for.
    """
    if not _installed("dattri") or work.name == "W1":  # it has no convolutions
        return None
    from dattri.algorithm.block_projected_if.core.compressor import setup_model_compressors
    from dattri.algorithm.block_projected_if.core.hook import HookManager

    model, names = _linear_layers(work)
    project = {"device": "cpu", "proj_dim": work.width, "proj_max_batch_size": 64, "proj_type": "normal"}
    keep = {"device": "cpu", "proj_dim": -1, "proj_max_batch_size": 64, "proj_type": "identity"}
    compressors = setup_model_compressors(model, names, project, keep, (work.inputs,), "cpu")
    hooks = HookManager(model, names)
    hooks.set_compressors(compressors)

    def run() -> Any:
        model.zero_grad(set_to_none=True)
        with torch.compiler.set_stance(stance):
            functional.cross_entropy(model(work.inputs), work.labels).backward()
        return list(hooks.get_compressed_grads())

    return run


def dattri_eager(work: Workload) -> Run | None:
    """The same, not compiled."""
    return dattri(work, "force_eager")


def logix(work: Workload) -> Run | None:
    """LogIX's random low-rank adapters: weights of linear layers and convolutions, without biases.

    Logged are the gradients of each adapter's middle matrix, whose sides are ``width`` or, where that is less, the
    layer's own features (channels of a convolution): for the CNN's first layer 3 × 3. Nothing is written.
    """
    if not _installed("logix"):
        return None
    from logix import LogIX
    from logix.config import LoRAConfig
    from logix.utils import get_logger

    get_logger().setLevel(logging.ERROR)  # it lists every layer
    torch.manual_seed(0)
    model = copy.deepcopy(work.model)
    with tempfile.TemporaryDirectory() as folder:  # it writes its adapters there
        config = Path(folder) / "config.yaml"
        config.write_text(f"root_dir: {folder}\n")
        logger = LogIX("benchmark", str(config))
        logger.watch(model)
        logger.add_lora(lora_config=LoRAConfig(init="random", rank=work.width))
    logger.setup({"grad": ["log"]})
    samples = [str(number) for number in range(len(work.inputs))]

    def run() -> Any:
        model.zero_grad(set_to_none=True)
        with logger(data_id=samples):
            functional.cross_entropy(model(work.inputs), work.labels, reduction="sum").backward()
        return [layer["grad"] for layer in logger.get_log()[1].values()]

    return run


def bergson(work: Workload) -> Run | None:
    """Bergson's collector: linear layers' weights and biases, every layer to ``width × width`` numbers.

    It takes sequences only, so layers of one vector for each sample are given sequences of length one.
    """
    if not _installed("bergson") or work.name == "W1":  # of convolutions it takes no images
        return None
    from bergson.collector.gradient_collectors import StreamingGradientCollector
    from bergson.gradients import GradientProcessor

    model, names = _linear_layers(work)
    for name in names if work.name == "W2" else ["head"]:
        layer = model.get_submodule(name)
        setattr(model, name, nn.Sequential(nn.Unflatten(1, (1, -1)), layer, nn.Flatten()))
    collector = StreamingGradientCollector(
        model=model,
        processor=GradientProcessor(projection_dim=work.width, include_bias=True),
        dtype=torch.float32,
    )
    collector.__enter__()  # its hooks stay, as they do while its callback collects

    def run() -> Any:
        model.zero_grad(set_to_none=True)
        collector.mod_grads.clear()
        functional.cross_entropy(model(work.inputs), work.labels, reduction="sum").backward()
        return list(collector.mod_grads.values())

    return run


def _installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def _linear_layers(work: Workload) -> tuple[nn.Module, list[str]]:
    """A copy whose backward reaches every linear layer's output and makes but one bias's gradient, and their names."""
    model = copy.deepcopy(work.model).requires_grad_(False)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    next(iter(layers.values())).bias.requires_grad_(True)
    return model, list(layers)


PEERS: dict[str, Callable[[Workload], Run | None]] = {
    "opacus hooks": opacus,
    "opacus expanded weights": opacus_expanded,
    "backpack": backpack,
    "trak CPU projector": trak,
    "dattri LoGra": dattri,
    "dattri LoGra eager": dattri_eager,
    "LogIX": logix,
    "bergson": bergson,
}
