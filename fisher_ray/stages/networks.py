"""From the configuration to a network with its weights."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from fisher_ray.config import ModelConfig
from fisher_ray.errors import FisherRayError, ModelError
from fisher_ray.plugins import load_reference


def build_network(config: ModelConfig, seed: int) -> nn.Module:
    """Return ``model.factory(**model.kwargs)`` in eval mode, its initial weights drawn from ``seed`` alone.

    Raises:
        ConfigError: if the factory cannot be imported.
        ModelError: if it fails or returns anything but a module.
    """
    factory = load_reference(config.factory, "model.factory")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = factory(**config.kwargs)
    except FisherRayError:
        raise
    except Exception as error:
        raise ModelError(
            f"model.factory: {config.factory!r} called with {config.kwargs} raised {type(error).__name__}: {error}. "
            "Correct model.kwargs, or the function."
        ) from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"model.factory: {config.factory!r} returned {type(model).__name__}, not a torch.nn.Module")
    return model.eval()


def load_checkpoint(model: nn.Module, path: str) -> None:
    """Load a state dict, safetensors or a torch file read with ``weights_only=True``.

    Raises:
        ModelError: if it cannot be read, or does not fit the network: every key that differs is named.
    """
    if not os.path.exists(path):
        raise ModelError(f"model.checkpoint: there is no file {path}. Correct the path.")
    try:
        if path.endswith(".safetensors"):
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch's own messages end in a page on how to load it all the same
        reason = " ".join(str(error.__context__ or error).partition("weights_only")[0].split(". ")[0].split())
        if isinstance(error, pickle.UnpicklingError) and re.search("unsupported (global|class)", reason, re.IGNORECASE):
            raise ModelError(
                f"model.checkpoint: {path} holds other objects than tensors, which would run code when they are read "
                f"({reason}). Save the state dict alone: torch.save(model.state_dict(), path)."
            ) from error
        raise ModelError(
            f"model.checkpoint: {path} cannot be read: {type(error).__name__}: {reason}. Give a state dict as "
            "safetensors, or as torch.save wrote it."
        ) from error
    load_state(model, state, f"model.checkpoint: {path}")


def load_state(model: nn.Module, state: Any, what: str) -> None:
    """Load ``state`` strictly.

    Raises:
        ModelError: naming keys that are missing, unknown or of another shape, or a value that is not finite.
    """
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelError(f"{what} holds {type(state).__name__}, not a state dict of tensors. Save model.state_dict().")
    own = model.state_dict()
    problems = [f"missing {key}" for key in own if key not in state]
    problems += [f"unknown {key}" for key in state if key not in own]
    problems += [
        f"{key} is {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in own.items()
        if key in state and state[key].shape != value.shape
    ]
    if problems:
        raise ModelError(f"{what} does not fit the network: {', '.join(problems)}. Check model.factory and kwargs.")
    if broken := [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]:
        raise ModelError(f"{what}: {broken[0]} holds NaN or infinity. Give a checkpoint from before it diverged.")
    model.load_state_dict(state)


def network_bytes(model: nn.Module) -> bytes:
    """Return the state dict as safetensors; a tensor that has several names is written under each."""
    return bytes(safetensors.torch.save(writable(model.state_dict())))


def writable(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors as safetensors takes them: on the CPU, contiguous, none sharing another's memory."""
    found, places = {}, set[int]()
    for name, value in state.items():
        kept = value.detach().cpu().contiguous()
        found[name] = kept.clone() if kept.data_ptr() in places else kept
        places.add(kept.data_ptr())
    return found
