"""The other libraries' ways through the work, each by its own functions, the fastest on a CPU that gives such numbers.

Gradients are of ``-log p(label)``. Everything is float32 where a library cannot store less from a CPU.
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from tests.benchmarks.peers.task import Task
from tests.benchmarks.peers.work import LENGTH, Work


def trak(work: Work, task: Task) -> str:
    """TRAK's dense projection, its matrix kept: the one that is made anew for every batch takes ten times as long."""
    from trak import TRAKer
    from trak.modelout_functions import AbstractModelOutput
    from trak.projectors import BasicSingleBlockProjector, ProjectionType

    class Loss(AbstractModelOutput):
        def __init__(self) -> None:
            pass

        @staticmethod
        def get_output(model: nn.Module, weights: Any, buffers: Any, image: Tensor, label: Tensor) -> Tensor:
            logits = torch.func.functional_call(model, (weights, buffers), image[None])
            return functional.cross_entropy(logits, label[None])

        def get_out_to_loss_grad(self, model: nn.Module, weights: Any, buffers: Any, batch: Any) -> Tensor:
            return torch.ones(len(batch[0]), 1)

    size, num_rows = sum(parameter.numel() for parameter in work.model.parameters()), len(work.train[0])
    weights = work.model.state_dict()
    with task.stage("gradients"):
        projector = BasicSingleBlockProjector(
            grad_dim=size, proj_dim=work.kind.dim, seed=0, proj_type=ProjectionType.rademacher, device="cpu"
        )
        traker = TRAKer(
            work.model,
            Loss(),
            num_rows,
            save_dir=str(task.vectors),
            device="cpu",
            projector=projector,
            proj_dim=0,
            logging_level=logging.ERROR,
            use_half_precision=False,
            lambda_reg=1e-3,
        )
        traker.load_checkpoint(weights, model_id=0)
        for batch in _batches(work, work.train):
            traker.featurize(batch, num_samples=len(batch[0]))
    with task.stage("scores"):
        traker.start_scoring_checkpoint("queries", weights, model_id=0, num_targets=len(work.queries[0]))
        made = traker.projector.proj_matrix
        traker.finalize_features()
        traker.projector.proj_matrix, traker.projector.proj_matrix_available = made, True  # which that throws away
        for batch in _batches(work, work.queries):
            traker.score(batch, num_samples=len(batch[0]))
        task.keep_scores(np.asarray(traker.finalize_scores("queries")).T)
    train, queries = (np.load(path) for path in (task.vectors / "0/grads.mmap", task.vectors / "0/queries_grads.mmap"))
    task.keep_products(queries @ train.T)
    task.tell_stored("0/features.mmap")  # its del_grads would have no more
    return importlib.metadata.version("traker")


def dattri(work: Work, task: Task) -> str:
    """Dattri's projected gradients of a CNN, for which its attributors keep memory alone; LoGra of a transformer."""
    return _dattri_logra(work, task) if work.kind.by_layer else _dattri_projected(work, task)


def _dattri_projected(work: Work, task: Task) -> str:
    """The functions that its TRAK and TracIn attributors are made of, and a memory map for the result."""
    from dattri.func.projection import BasicProjector, ProjectionType
    from dattri.task import AttributionTask

    def loss(parameters: Any, sample: tuple[Tensor, Tensor]) -> Tensor:
        image, label = sample
        return functional.cross_entropy(torch.func.functional_call(work.model, parameters, image[None]), label[None])

    with task.stage("gradients"):
        asked = AttributionTask(loss_func=loss, model=work.model, checkpoints=work.model.state_dict())
        gradient = asked.get_grad_loss_func(in_dims=(None, 0))
        parameters, _ = asked.get_param(ckpt_idx=0)
        size = sum(parameter.numel() for parameter in work.model.parameters())
        given = (size, work.kind.dim, 0, ProjectionType.rademacher, torch.device("cpu"))
        projector = BasicProjector(*given, block_size=work.kind.dim)

        def vectors(batch: tuple[Tensor, Tensor]) -> Tensor:
            return projector.project(gradient(parameters, batch).detach(), 0)

        place, shape = task.vectors / "train.npy", (len(work.train[0]), work.kind.dim)
        stored = np.lib.format.open_memmap(place, mode="w+", dtype=np.float32, shape=shape)
        start = 0
        for batch in _batches(work, work.train):
            stored[start : start + len(batch[0])] = vectors(batch).numpy()
            start += len(batch[0])
        stored.flush()
    with task.stage("scores"):
        queries = torch.cat([vectors(batch) for batch in _batches(work, work.queries)])
        task.keep_scores(queries.numpy() @ np.load(place, mmap_mode="r").T)
    task.tell_stored("train.npy")
    return importlib.metadata.version("dattri")


def _dattri_logra(work: Work, task: Task) -> str:
    """Its LoGra attributor, kept on disk, without a Hessian and not compiled, which is the faster here."""
    from dattri.algorithm.block_projected_if.core.compressor import setup_model_compressors
    from dattri.algorithm.logra import LoGraAttributor
    from dattri.task import AttributionTask

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor], device: str) -> Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1])

    _freeze_weights(work.model)
    train, queries = (DataLoader(TensorDataset(*part), work.kind.batch) for part in (work.train, work.queries))
    with task.stage("gradients"), torch.compiler.set_stance("force_eager"):
        asked = AttributionTask(loss_func=loss, model=work.model, checkpoints=work.model.state_dict())
        attributor = LoGraAttributor(
            asked, hessian="Identity", proj_dim=work.kind.dim, offload="disk", cache_dir=str(task.vectors)
        )
        given = (attributor.sparsifier_kwargs, attributor.projector_kwargs, (work.train[0][:2],), "cpu")
        attributor.compressors = setup_model_compressors(work.model, attributor.layer_names, *given)  # which its own
        # call of it would give one sample without a batch
        attributor.cache(train)
    with task.stage("scores"), torch.compiler.set_stance("force_eager"):
        task.keep_scores(attributor.attribute(train, queries).T.numpy())
    task.tell_stored("**/*.mmap")
    return importlib.metadata.version("dattri")


def logix(work: Work, task: Task) -> str:
    """LogIX's random low-rank adapters: weights of linear layers, without biases; its log in float16."""
    from logix import LogIX
    from logix.config import LoggingConfig, LoRAConfig
    from logix.utils import get_logger

    get_logger().setLevel(logging.ERROR)  # it lists every layer
    with task.stage("gradients"):
        config = task.out / "config.yaml"
        config.write_text(f"root_dir: {task.vectors}\n")
        run = LogIX("work", str(config), LoggingConfig(log_dtype="float16", flush_threshold=2**24))
        run.watch(work.model)
        run.add_lora(lora_config=LoRAConfig(init="random", rank=math.isqrt(work.kind.dim)))
        run.setup({"grad": ["log"]})
        run.save(True)
        _log(run, work, work.train)
        run.finalize()
    with task.stage("scores"):
        run.eval()
        parts = []
        for names, log in _log(run, work, work.queries):
            found = run.compute_influence_all((names, log), run.build_log_dataloader(256), precondition=False)
            parts.append(found["influence"])
        task.keep_scores(torch.cat(parts).float().numpy())
    task.tell_stored("work/log_*")
    return importlib.metadata.version("logix-ai")


def _log(run: Any, work: Work, part: tuple[Tensor, Tensor]) -> list[Any]:
    made, start = [], 0
    for inputs, labels in _batches(work, part):
        names = [str(row) for row in range(start, start + len(inputs))]
        start += len(inputs)
        work.model.zero_grad(set_to_none=True)
        with run(data_id=names):
            functional.cross_entropy(work.model(inputs), labels, reduction="sum").backward()
        if part is work.queries:
            made.append(run.get_log(copy=True))
    return made


def bergson(work: Work, task: Task) -> str:
    """Bergson's index of per-layer projections, and its attributor's search over all rows.

    It knows causal language models: the label is the last token's target, whose logits are the classifier's.
    """
    from bergson.collection import collect_gradients
    from bergson.config import IndexConfig
    from bergson.gradients import GradientProcessor
    from bergson.query.attributor import Attributor

    _freeze_weights(work.model)
    model = _Causal(work.model)
    width = math.isqrt(work.kind.dim)

    def collect(part: tuple[Tensor, Tensor], place: Path) -> None:
        from datasets import Dataset

        targets = np.full((len(part[0]), LENGTH), -100)
        targets[:, -1] = part[1].numpy()
        rows = np.arange(len(part[0]))
        batches = [list(map(int, some)) for some in np.split(rows, rows[work.kind.batch :: work.kind.batch])]
        config = IndexConfig(run_path=str(place), projection_dim=width, include_bias=True)
        config.partial_run_path.mkdir(parents=True)
        processor = GradientProcessor(projection_dim=width, include_bias=True)
        data = Dataset.from_dict({"input_ids": part[0].numpy(), "labels": targets})
        collect_gradients(model, data, processor, config, batches=batches)

    with task.stage("gradients"):
        collect(work.train, task.vectors / "train")
    with task.stage("scores"):
        collect(work.queries, task.out / "queries")
        index = Attributor(_index(task.vectors / "train"))
        queries = Attributor(_index(task.out / "queries")).grads
        found = index.search(queries, None)
        task.keep_scores(torch.empty_like(found.values).scatter_(1, found.indices, found.values).numpy())
    task.tell_stored("train*/**/*.bin")
    return importlib.metadata.version("bergson")


def _index(place: Path) -> Path:
    return next(place.parent.glob(f"{place.name}*/**/info.json")).parent


class _Causal(nn.Module):
    """A classifier as a causal language model: every position has the logits of the whole sequence's class."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        head = model.head
        model.head = nn.Identity()
        self.head = head

    device, dtype = torch.device("cpu"), torch.float32

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, tokens: Tensor) -> Any:
        hidden = self.model(tokens)[:, None].expand(-1, tokens.shape[1], -1)
        return _Output(self.head(hidden))


class _Output:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


def _freeze_weights(model: nn.Module) -> None:
    """Let the backward reach every linear layer's output and make but one bias's gradient."""
    first = next(module for module in model.modules() if isinstance(module, nn.Linear))
    model.requires_grad_(False)
    first.bias.requires_grad_(True)


def _batches(work: Work, part: tuple[Tensor, Tensor]) -> Any:
    return zip(*(value.split(work.kind.batch) for value in part), strict=True)
