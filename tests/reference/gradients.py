"""Per-sample gradients and scores by one plain backward for every sample and class."""

import torch
from torch import Tensor, nn


def loop_of_backwards(model: nn.Module, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    rows = []
    for x, y in zip(inputs, targets, strict=True):
        loss = nn.functional.cross_entropy(model(x[None]), y[None], reduction="sum")
        rows.append(_gradients(model, loss))
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def loop_of_class_scores(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    num_classes = model(inputs[:1]).shape[1]
    samples = []
    for x in inputs:
        rows = [_gradients(model, model(x[None]).log_softmax(dim=1)[0, c]) for c in range(num_classes)]
        samples.append({name: torch.stack([row[name] for row in rows]) for name in rows[0]})
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def _gradients(model: nn.Module, value: Tensor) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient.detach()
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
    }


def flat(gradients: dict[str, Tensor], leading: int) -> Tensor:
    """Join parameters' gradients ``(*leading, *shape)`` to ``(*leading, P)``."""
    return torch.cat([value.flatten(leading) for value in gradients.values()], dim=-1)


def weighted_scores(model: nn.Module, inputs: Tensor) -> Tensor:
    """``√p_c s_c``, ``(B, C, P)``."""
    with torch.no_grad():
        probabilities = model(inputs).softmax(dim=1)
    return flat(loop_of_class_scores(model, inputs), 2) * probabilities.sqrt()[:, :, None]
