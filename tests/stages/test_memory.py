import pytest
import torch
from torch import nn

from fisher_ray.errors import ConfigError
from fisher_ray.gradients import ScoreEngine, peak_bytes
from fisher_ray.models import paper_cnn
from fisher_ray.records import Batch
from fisher_ray.stages import memory
from fisher_ray.stages.memory import choose_micro_batch
from fisher_ray.stages.passes import kronecker_pass
from tests.integration.runs import digits


def test_bytes_are_those_that_live_at_once():
    x = torch.zeros(1000)
    assert peak_bytes(lambda: x.view(10, 100).transpose(0, 1)) == 0
    assert peak_bytes(lambda: x + 1) == 4000
    assert peak_bytes(lambda: ((x + 1) * 2 + 3).sum()) in (8000, 8004)
    assert peak_bytes(lambda: [x + 1 for _ in range(5)]) == 20000


@pytest.mark.parametrize("labels", ["all", "sampled"])
def test_a_micro_batch_keeps_to_its_memory(labels, tmp_path):
    model, inputs = paper_cnn(), torch.randn(64, 3, 24, 24)
    engine = ScoreEngine(model)
    engine.all_classes(inputs[:2])
    sizes = []
    for limit in (70_000_000, 150_000_000, 10**12):
        config = digits(tmp_path, f"scores.labels={labels}", f"runtime.memory_bytes={limit}")
        sizes.append(choose_micro_batch(config, engine, inputs[:1])[0])
        batch = Batch(inputs[: sizes[-1]], torch.zeros(sizes[-1]).long(), torch.arange(sizes[-1]))
        assert peak_bytes(lambda batch=batch: kronecker_pass(engine, engine.block_shapes, [batch], labels, 0)) <= limit

    assert sizes == sorted(sizes)
    assert 1 <= sizes[0] < sizes[-1] == 64


def test_a_sample_that_takes_more_memory_is_refused(tmp_path):
    engine = ScoreEngine(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    inputs = torch.zeros(1, 1, 8, 8)
    with pytest.raises(ConfigError, match=r"one sample take \d+ bytes, runtime\.memory_bytes allow 1000"):
        choose_micro_batch(digits(tmp_path, "runtime.memory_bytes=1000"), engine, inputs)
    assert choose_micro_batch(digits(tmp_path, "runtime.micro_batch=3"), engine, inputs) == (3, 3)


def test_a_micro_batch_of_a_gpu_grows_as_one_of_a_processor_did(tmp_path):
    """The bytes at the size that was not counted are counted here."""
    engine, inputs = ScoreEngine(paper_cnn()), torch.randn(1, 3, 24, 24)
    size, wide = choose_micro_batch(digits(tmp_path, "runtime.memory_bytes=700000000"), engine, inputs)
    assert (size, wide) == (64, 128)
    counted = memory._count(digits(tmp_path), engine, inputs, wide)
    assert 350_000_000 < counted <= 700_000_000
    assert choose_micro_batch(digits(tmp_path, "runtime.memory_bytes=10000000000000"), engine, inputs) == (64, 1024)
