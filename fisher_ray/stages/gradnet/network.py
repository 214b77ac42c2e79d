"""A run's GradNet: its shape, and its file."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fisher_ray.config import Config, GradNetConfig
from fisher_ray.gradients import num_above
from fisher_ray.linear import GradNet, Shape, cut_pieces, plan_shape
from fisher_ray.stages.facts import Facts
from fisher_ray.store import load_arrays, save_arrays


def network_shape(section: GradNetConfig, blocks: Mapping[str, tuple[int, int]], num_classes: int) -> Shape:
    """Return a run's GradNet's shape.

    Args:
        section: what is asked for.
        blocks: ``(O, A)`` by name, of the layers whose gradients it takes.
        num_classes: ``C``.

    Raises:
        RequestError: if ``gradnet.widths`` does not fit the layers.
    """
    return plan_shape([math.prod(shape) for shape in blocks.values()], section.structure, section.widths, num_classes)


def num_kept(config: Config, facts: Facts) -> int:
    """Return ``K``, the entries that are kept of a gradient."""
    share, sizes = config.gradnet_section.share, map(math.prod, facts.gradnet_shapes.values())
    return sum(num_above(size, share) for size in sizes)


def num_pieces(config: Config, facts: Facts) -> int:
    """Return how many ranks can have a part of the weights."""
    return len(cut_pieces(network_shape(config.gradnet_section, facts.gradnet_shapes, facts.num_classes)))


def save_network(url: str, shape: Shape, state: Mapping[str, Tensor]) -> None:
    """Write a GradNet's parameters to a group of arrays."""
    arrays = {name: value.numpy() for name, value in state.items()}
    save_arrays(url, arrays, {"kind": "gradnet", "shape": shape.to_json()})


def load_network(url: str) -> GradNet:
    """Read what :func:`save_network` wrote, in eval mode."""
    arrays, attributes = load_arrays(url)
    network = GradNet(Shape.from_json(attributes["shape"]), 1.0, 0)
    network.load_state_dict({name: torch.from_numpy(value) for name, value in arrays.items()})
    return network.eval()
