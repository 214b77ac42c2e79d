"""This package's ways through the work: functions in one process, and a run on Ray with a question to it."""

from __future__ import annotations

import json
import math

import torch
from torch import Tensor, nn

import fisher_ray
from fisher_ray.data import plan_units
from fisher_ray.gradients import Compressor, GradientSketch, ScoreEngine, random_bases
from fisher_ray.store import ArraySpec, StoreSpec, StoreWriter, create_store, open_features, seal
from tests.benchmarks.gradients.workloads import TOKENS
from tests.benchmarks.peers.task import Task
from tests.benchmarks.peers.work import Work

CHUNK_ROWS, STORED_RMS = 256, 16.0
SEED = 0


def in_process(work: Work, task: Task) -> str:
    """Scores of the labels, compressed, into a sealed float16 store; then products with blocks read from it."""
    with task.stage("gradients"):
        engine = ScoreEngine(work.model)
        compress = _compression(work, engine)
        inputs, labels = work.train
        units, url = plan_units(len(inputs), CHUNK_ROWS), str(task.vectors / "train.zarr")
        writer = None
        for unit in units:
            made = _vectors(work, engine, compress, inputs[unit.start : unit.stop], labels[unit.start : unit.stop])
            if writer is None:
                scale = 2.0 ** round(math.log2(float(made.square().mean().sqrt()) / STORED_RMS))
                features = ArraySpec((made.shape[1],), "float16", ("sample", "coordinate"), scale)
                create_store(url, StoreSpec(len(inputs), CHUNK_ROWS, CHUNK_ROWS, "none", {"features": features}, {}))
                writer = StoreWriter(url)
            writer.write_unit(unit, {"features": made.numpy()})
        seal(url, len(units))
    with task.stage("scores"):
        queries = _vectors(work, engine, compress, *work.queries)
        store = open_features(url)
        blocks = [queries @ torch.from_numpy(store.read("features", unit.start, unit.stop)).float().T for unit in units]
        task.keep_scores(torch.cat(blocks, 1).numpy())
    task.tell_stored("train.zarr/**/*")
    return fisher_ray.__version__


def _compression(work: Work, engine: ScoreEngine) -> Compressor | GradientSketch:
    if work.kind.by_layer:
        return Compressor(random_bases(engine.blocks, math.isqrt(work.kind.dim), SEED), engine.blocks, engine.like)
    return GradientSketch(engine.blocks, work.kind.dim, SEED, engine.like)


def _vectors(
    work: Work, engine: ScoreEngine, compress: Compressor | GradientSketch, inputs: Tensor, labels: Tensor
) -> Tensor:
    parts = zip(inputs.split(work.kind.batch), labels.split(work.kind.batch), strict=True)
    return torch.cat([compress.compress(engine.of_labels(x, y))[:, 0] for x, y in parts])


def on_ray(work: Work, task: Task) -> str:
    """A run up to the features and a question to it, as the command line has them; each starts an embedded Ray.

    Its stages are told as the run itself timed them, so Ray's starts are in the whole time alone. The metric is of the
    true labels and of all rows, so the gradients are computed twice, and scores are whitened as TRAK's are.
    """
    run = str(task.vectors / "run")
    fisher_ray.run(_config(work, run), until="features")
    answer = fisher_ray.score(run, by="kernel", full=True, name="all")
    stages = json.loads((task.vectors / "run" / "run.json").read_text())["stages"]
    made = sum(stages[name]["seconds"] for name in ("basis", "metric", "features/train"))
    task.add("gradients", made)
    task.add("scores", stages["features/test"]["seconds"] + answer["seconds"]["search/0"])
    scores = open_features(f"{answer['place']}/scores.zarr")
    task.keep_scores(scores.read("scores", 0, scores.num_rows).T)
    task.tell_stored("run/features/train.zarr/**/*")
    return fisher_ray.__version__


def _config(work: Work, run: str) -> fisher_ray.Config:
    rank, compression = work.kind.dim, {"kind": "sketch", "dim": work.kind.dim}
    if work.kind.by_layer:
        rank *= sum(isinstance(module, nn.Linear) for module in work.model.modules())
        compression = {"kind": "random", "dim": rank, "layers": {"*": {"dim": work.kind.dim}}}
    data = {name: {"format": "numpy", "path": f"{file}.npz"} for name, file in (("shallow", "train"), ("test", "test"))}
    return fisher_ray.Config.from_dict(
        {
            "output": run,
            "data": {"root": str(work.folder), "transform": TOKENS if work.kind.by_layer else None, **data},
            "model": {
                "factory": f"{work.kind.factory.__module__}:{work.kind.factory.__name__}",
                "checkpoint": str(work.folder / "network.safetensors"),
            },
            "scores": {"labels": "true"},
            "compression": compression,
            "metric": {"rank": rank, "structure": "block" if work.kind.by_layer else "global", "fraction": 1.0},
            "store": {"chunk_rows": CHUNK_ROWS},
            "runtime": {"unit_rows": CHUNK_ROWS},
        }
    )
