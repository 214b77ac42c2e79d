"""What is recorded on a GPU and replayed, and what a GPU computes in other ways than a processor."""

import pytest
import torch
from torch import nn

from fisher_ray.gradients import Compressor, GradientBuffer, GradientSketch, ScoreEngine, random_bases
from fisher_ray.gradients.graphs import Graphs, _looks
from fisher_ray.metric import choose_bases
from fisher_ray.models import paper_cnn
from fisher_ray.records import Batch
from fisher_ray.stages.passes import compressed_scores, kronecker_pass
from tests.gradients.zoo import build

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
FORMS = ["conv2d, grouped, dilated", "conv2d, depthwise", "language model, tied", "transformer encoder"]


KINDS = ["random", "kronecker"]


def compressing(model, graph_batch=None, kind="random"):
    engine = ScoreEngine(model, graph_batch=graph_batch)
    if kind == "random":
        return engine, Compressor(random_bases(engine.blocks, 8, 0), engine.blocks, engine.like)
    inputs = torch.randn(8, 3, 24, 24, generator=torch.Generator().manual_seed(0)).to(engine.like)
    batch = Batch(inputs, torch.zeros(8, dtype=torch.int64), torch.arange(8))
    moments = kronecker_pass(engine, engine.block_shapes, [batch], "all", 0)
    return engine, Compressor(choose_bases(moments, engine.block_shapes, 64), engine.blocks, engine.like)


def features(engine, compressor, inputs):
    zeros = torch.zeros(len(inputs), dtype=torch.int64)
    return compressed_scores(engine, compressor, Batch(inputs, zeros, zeros), "all", 0)


def test_on_a_processor_nothing_is_recorded():
    calls = []
    graphs = Graphs(2)
    for _ in range(3):
        assert graphs.run("key", lambda x: (calls.append(1) or x + 1,), torch.zeros(2))[0].tolist() == [1, 1]
    assert len(calls) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_compressed_without_looking_at_a_number(kind):
    """Which would wait for a GPU, and could not be recorded there."""
    engine, compressor = compressing(paper_cnn(), kind=kind)
    inputs = torch.randn(4, 3, 24, 24)
    features(engine, compressor, inputs)
    assert _looks(lambda x: features(engine, compressor, x), (inputs,)) == ""
    sketch, labels = GradientSketch(engine.blocks, 1500, 0, engine.like), torch.tensor([1, 2, 3, 0])

    def sketched(x, y):
        return (sketch.compress(engine.of_draws(x, lambda output, number: y, 1)),)

    sketched(inputs, labels)
    assert _looks(sketched, (inputs, labels)) == ""


@pytest.mark.parametrize(
    "look",
    [
        lambda x: (x * float(x.sum()),),
        lambda x: (x[x > 0],),
        lambda x: (x.to("meta"),),
        lambda x: (torch.zeros(4, device="meta").copy_(x),),
        lambda x: (torch.nonzero(x),),
    ],
)
def test_what_waits_for_numbers_or_copies_is_found(look):
    found = _looks(look, (torch.ones(4),))
    assert "looks at numbers" in found or "copies between" in found


def test_places_that_are_numbered_are_no_look():
    assert _looks(lambda x: (x[torch.tensor([0, 2])], x[None][:, torch.tensor([1])]), (torch.ones(4),)) == ""


def test_an_error_of_the_function_s_own_is_no_look():
    with pytest.raises(ZeroDivisionError):
        _looks(lambda x: 1 // 0, (torch.ones(4),))


@pytest.mark.gpu
def test_a_graph_outlives_batches_of_other_sizes():
    """Whose memory is not that of what was recorded."""
    torch.manual_seed(0)
    model = paper_cnn().double().cuda()
    plain, recorded = compressing(model), compressing(model, 32)
    inputs = torch.randn(32, 3, 24, 24).double().cuda()
    expected = features(*plain, inputs)[2]
    for size in (32, 31, 48, 32, 7, 32):
        some = torch.randn(size, 3, 24, 24).double().cuda() if size != 32 else inputs
        made = features(*recorded, some)[2]
        torch.cuda.empty_cache()
        if size == 32:
            torch.testing.assert_close(made, expected, **CLOSE)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_replayed_is_what_is_computed_step_by_step(kind):
    torch.manual_seed(0)
    model = paper_cnn().double().cuda()
    plain, recorded, before = compressing(model, kind=kind), compressing(model, 16, kind), 0
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    for number in range(3):
        inputs = torch.randn(16, 3, 24, 24).double().cuda()
        made = features(*recorded, inputs)
        if number:
            assert len(calls) == before  # the network was not called
        for value, expected in zip(made, features(*plain, inputs), strict=True):
            torch.testing.assert_close(value, expected, **CLOSE)
        before = len(calls)

    rest = torch.randn(5, 3, 24, 24).double().cuda()
    torch.testing.assert_close(features(*recorded, rest)[2], features(*plain, rest)[2], **CLOSE)
    assert len(calls) > before


@pytest.mark.gpu
def test_what_is_replayed_does_not_change_with_the_next_batch():
    graphs = Graphs(4)
    first = graphs.run("key", lambda x: (x * 2, None), torch.ones(4).cuda())
    second = graphs.run("key", lambda x: (x * 2, None), torch.zeros(4).cuda())
    assert (first[0].tolist(), second[0].tolist(), first[1]) == ([2.0] * 4, [0.0] * 4, None)


@pytest.mark.gpu
def test_a_network_whose_way_depends_on_numbers_is_not_recorded(caplog):
    class Choosing(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.left(x) + (self.right(x) if float(x.sum()) > 0 else 0 * self.right(x))

    graphs, model = Graphs(2), Choosing().cuda()
    for sign in (1, -1, 1):
        inputs = sign * torch.ones(2, 4).cuda()
        (made,) = graphs.run("key", lambda x: (model(x).detach(),), inputs)
        torch.testing.assert_close(made, model(inputs).detach())
    assert caplog.text.count("cannot be recorded") == 1
    assert torch.ones(2).cuda().sum().item() == 2  # and the GPU is as usable as before


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMS)
def test_gradients_and_sketches_formed_on_a_gpu_are_the_processors(name):
    model, inputs = build(name, 3)
    labels, found = torch.tensor([2, 0, 3]), []
    for device in ("cpu", "cuda"):
        engine = ScoreEngine(model.to(device))
        moved = torch.utils._pytree.tree_map(lambda value, device=device: value.to(device), inputs)
        torch.set_default_device(device)  # a network may make tensors of its own
        try:
            scores = engine.of_labels(moved, labels.to(device))
        finally:
            torch.set_default_device(None)
        exact = GradientBuffer(engine.blocks, model, 3).fill(scores)
        sketches = [GradientSketch(engine.blocks, dim, 0, engine.like).compress(scores) for dim in (50, 1500)]
        found.append([value.cpu() for value in (exact, *sketches)])
    for value, expected in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, **CLOSE)


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu_between_batches():
    engine, compressor = compressing(paper_cnn().cuda())
    inputs = torch.randn(8, 3, 24, 24).cuda()
    features(engine, compressor, inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            features(engine, compressor, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
