"""Whole runs on a GPU against the same runs on the processor, and against themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fisher_ray
from tests.integration.runs import Listening, bits, digits

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def on_gpu(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Listening, dict[str, Any]]:
    """One run of every stage on workers with half a GPU each: its folder, what it told, and its results."""
    output, told = tmp_path_factory.mktemp("gpu") / "run", Listening()
    config = digits(output, "runtime.gpus_per_worker=0.5", "runtime.num_workers=2")
    return output, told, fisher_ray.run(config, progress=told)


def test_workers_name_the_gpu_and_the_results_are_the_processors(on_gpu, undisturbed):
    import torch

    _, told, results = on_gpu
    assert {torch.cuda.get_device_name() in receipt.worker for _, receipt in told.receipts} == {True}
    for name in ("base", "fisher_linear", "linear_probe"):
        assert results["accuracy"][name] == pytest.approx(undisturbed[1]["accuracy"][name], abs=0.03), name


def test_features_on_a_gpu_have_the_kernel_of_those_on_the_processor(on_gpu, tmp_path):
    """From the same base network; coordinates may differ by signs, dot products may not."""
    output, _, _ = on_gpu
    base = ("base=null", "trained_on=null", f"model.checkpoint={output}/base/model.safetensors")
    fisher_ray.run(digits(tmp_path / "cpu", *base, "runtime.gpus_per_worker=0"))
    kernels = []
    for folder in (output, tmp_path / "cpu"):
        features = fisher_ray.open_features(f"{folder}/features/test.zarr").read("features", 0, 200)
        rows = features.reshape(200, -1).astype(np.float64)
        kernels.append(rows @ rows.T)
    assert np.abs(kernels[0] - kernels[1]).max() <= 0.02 * np.abs(kernels[1]).max()


def test_a_run_on_a_gpu_gives_the_same_bits_again(on_gpu, tmp_path):
    output, _, _ = on_gpu
    again = tmp_path / "run"
    fisher_ray.run(digits(again, "runtime.gpus_per_worker=0.5", "runtime.num_workers=1"))
    assert bits(again) == bits(output)


def test_gradnet_on_a_gpu_learns_and_two_workers_that_share_it_give_the_bits_of_one(ray_session, tmp_path):
    gradnet = ("gradnet.lr=0.1", "gradnet.momentum=0.9", "gradnet.widths=[32, 16]", "gradnet.steps=600")
    every = (*gradnet, "linear.model=gradnet", "trained_on=null")
    found = []
    for num_workers, gpus in ((1, 1), (2, 0.5)):
        runtime = (f"runtime.num_workers={num_workers}", f"runtime.gpus_per_worker={gpus}")
        output = tmp_path / str(num_workers)
        accuracy = fisher_ray.run(digits(output, *every, *runtime))["accuracy"]
        assert accuracy["gradnet"] > accuracy["base"] + 0.1
        found.append(bits(output))
    assert found[0] == found[1]
