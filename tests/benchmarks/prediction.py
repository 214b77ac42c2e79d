"""What a prediction costs beside the network's own: milliseconds an image, medians of interleaved rounds.

``python -m tests.benchmarks.prediction [--rounds 5] [--threads 1] [--parameters 'conv1.*']``: the paper's network with
ten classes, a metric of 2,048 coordinates and rank 512, and any weights.

- *features, then weights*: what :class:`fisher_ray.FisherClassifier` did if it formed features.
- *folded*: what it does; *exported*: the same as a program of PyTorch's own.
- *forward mode*: the same outputs as directional derivatives of the logits, one for each pair of an output and a class.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap

import fisher_ray
from fisher_ray.classifier import parameter_directions
from fisher_ray.linear import LinearWeights
from fisher_ray.models import paper_cnn

BATCH, SHAPE, NUM_CLASSES = 64, (3, 24, 24), 10


def forward_mode(model: nn.Module, directions: dict[str, Tensor], bias: Tensor) -> Callable[[Tensor], Tensor]:
    """Return ``b_o + Σ_c √p_c (e_c − p)ᵀ J v_oc`` as a function of a batch.

    Args:
        model: the network.
        directions: ``v_oc`` by parameter, ``(O · C, *shape)``.
        bias: ``(O,)``.
    """
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    chosen = {name: parameters[name] for name in directions}

    def predict(inputs: Tensor) -> Tensor:
        def logits(some: dict[str, Tensor]) -> Tensor:
            return functional_call(model, {**parameters, **some}, (inputs,))

        probabilities = logits(chosen).softmax(1)
        derivatives = vmap(lambda along: jvp(logits, (chosen,), (along,))[1], chunk_size=10)(directions)
        derivatives = derivatives.unflatten(0, (NUM_CLASSES, NUM_CLASSES))  # (O, C, B, K)
        own = torch.einsum("ocbc->ocb", derivatives)
        mean = torch.einsum("bk,ocbk->ocb", probabilities, derivatives)
        return torch.einsum("bc,ocb->bo", probabilities.sqrt(), own - mean) + bias

    return predict


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description="What a prediction costs beside the network's own.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--parameters", default="conv1.*")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    model, inputs = paper_cnn().eval(), torch.randn(512, *SHAPE)
    metric = fisher_ray.fit_metric(model, inputs, dim=2048, rank=512, parameters=given.parameters)
    weight = torch.randn(NUM_CLASSES, NUM_CLASSES * metric.rank) / 10
    weights = LinearWeights(weight, torch.zeros(NUM_CLASSES), 1.0)
    classifier = fisher_ray.FisherClassifier(model, metric, weights)
    batch = inputs[:BATCH]
    rows = weight.double().view(-1, metric.rank) / (metric.eigvals + metric.dampings)  # whitened twice, not back
    directions = {name: value.float() for name, value in parameter_directions(model, metric, rows)}
    ways: dict[str, Callable[[], Tensor]] = {
        "the network": lambda: model(batch).detach(),
        "features, then weights": lambda: weights.scores(fisher_ray.features(model, metric, batch).flatten(1)),
        "folded": lambda: classifier(batch),
    }
    program = classifier.export(batch).module()
    ways["exported"] = lambda: program(batch)[0]
    predict = forward_mode(model, directions, weights.bias)
    ways["forward mode"] = lambda: predict(batch)
    expected = ways["features, then weights"]().detach()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(given.rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            found = way().detach()
            seconds[name].append(time.perf_counter() - start)
            if not number and name != "the network":
                error = float((found - expected).abs().max() / expected.abs().max())
                print(f"{name:24} differs from the features' prediction by {error:.1e}")
    for name, spent in seconds.items():
        print(f"{name:24} {1000 * statistics.median(spent[1:]) / BATCH:8.3f} ms an image")


if __name__ == "__main__":
    main()
