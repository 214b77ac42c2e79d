"""The precision of a network's own arithmetic, and of what is computed from its factors: float32 at least."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fisher_ray.errors import ModelError, RequestError
from fisher_ray.gradients.outputs import Inputs, call, main_output

PRECISIONS: dict[str, torch.dtype | None] = {
    "float32": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""By the names of ``scores.precision``, what operations are cast to; None leaves the network its own dtypes."""
TOLERANCE = {torch.float64: 1e-7, torch.float32: 2e-3, torch.float16: 0.02}
"""How far two gradients may be apart, relative to the larger one's norm; for bfloat16 and less 0.1.

On a GPU that of float32 is float16's: its kernels for two sizes of a batch differ more.
"""
SMALL = {torch.float64: 0.01, torch.float32: 0.01}
"""Gradients that are smaller than this share of the largest are measured against this share: they may be rounding.

For half precision it is 0.03.
"""
PEAK_EXPONENT = 4
"""Cotangents go through a float16 backward with a largest entry of about two to this power.

Then gradients from 8e-9 to 4e3 times the largest cotangent are held, and those from 8e-6 on with all digits.
"""


@dataclass(frozen=True)
class Precision:
    """How one network is run, and the dtype of what is computed from it.

    Attributes:
        forward: what the network's operations are cast to by autocast, forward and backward; None for its own dtypes.
        factors: float64 if the network has a parameter of it, else float32: of factors, logits and cotangents.
        coarsest: the dtype with the fewest digits that the network computes in.
        has_float16: whether some of the network is float16, whose small numbers vanish.
        on_gpu: whether the network is on one.
    """

    forward: torch.dtype | None
    factors: torch.dtype
    coarsest: torch.dtype
    has_float16: bool
    on_gpu: bool

    @classmethod
    def of(cls, model: nn.Module, forward: torch.dtype | None = None) -> Precision:
        """Return a network's.

        Raises:
            RequestError: if ``forward`` is no half precision.
            ModelError: if the network is float64, which autocast leaves as it is.
        """
        if forward not in PRECISIONS.values():
            known = ", ".join(str(dtype) for dtype in PRECISIONS.values())
            raise RequestError(f"precision {forward} is not one of {known}")
        own = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
        if forward is not None and torch.float64 in own:
            raise ModelError(
                f"precision {forward}: the network has float64 parameters, which stay as they are. Call model.float()."
            )
        factors = torch.float64 if torch.float64 in own else torch.float32
        every = own | {factors} | ({forward} if forward is not None else set())
        coarsest = max(every, key=lambda dtype: torch.finfo(dtype).eps)
        return cls(forward, factors, coarsest, torch.float16 in every, _device(model) == "cuda")

    @property
    def tolerance(self) -> float:
        """How far two gradients may be apart by rounding, relative to the larger one's norm."""
        return TOLERANCE.get(self._digits, 0.1)

    @property
    def small(self) -> float:
        """The share of the largest gradient that all smaller ones are measured against."""
        return SMALL.get(self._digits, 0.03)

    @property
    def _digits(self) -> torch.dtype:
        return torch.float16 if self.on_gpu and self.coarsest == torch.float32 else self.coarsest

    def around(self, module: nn.Module) -> AbstractContextManager[object]:
        """Return the context to call a network or a part of it in; no autocast from outside reaches in."""
        # A cast weight that is kept would sum the gradients of its uses in half precision.
        return torch.autocast(_device(module), self.forward, enabled=self.forward is not None, cache_enabled=False)

    def outside(self, module: nn.Module) -> AbstractContextManager[object]:
        """Return a context without autocast, for what is computed from factors."""
        return torch.autocast(_device(module), enabled=False)

    @contextmanager
    def full(self, module: nn.Module) -> Iterator[None]:
        """Multiply float32 with all its digits, without TF32, which torch has in a GPU's convolutions by default."""
        places: list[Any] = [torch.backends.cudnn, torch.backends.cuda.matmul]
        name, fast, plain = "allow_tf32", True, False  # type: tuple[str, str | bool, str | bool]
        try:
            before = [getattr(place, name) for place in places] if _device(module) == "cuda" else []
        except RuntimeError:  # set by the names that torch has had since 2.9, for each kind of operation
            places, name = [places[0].conv, places[0].rnn, places[1]], "fp32_precision"
            before, fast, plain = [getattr(place, name) for place in places], "tf32", "ieee"
        changed = [place for place, value in zip(places, before, strict=False) if value == fast]
        try:
            for place in changed:
                setattr(place, name, plain)
            yield
        finally:
            for place in changed:
                setattr(place, name, fast)

    def output(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """Call a network and return its main output, as it comes.

        Raises:
            ModelError: if there is no output that a likelihood can be of.
        """
        with self.around(model):
            return main_output(call(model, inputs))

    def widened(self, value: Tensor) -> Tensor:
        """Return floating-point numbers in the factors' dtype, and others as they are."""
        return value.to(self.factors) if value.is_floating_point() else value

    def rescaled(self, cotangents: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return cotangents ``(S, B, ...)`` that survive a float16 backward, and what to multiply its results by.

        The factors ``(S, B)`` are powers of two, of each score and sample by itself; None where nothing is rescaled.
        """
        if not self.has_float16:
            return cotangents, None
        sizes = cotangents.reshape(*cotangents.shape[:2], -1).abs().amax(dim=2)
        sizes = torch.where(sizes.isfinite() & (sizes > 0), sizes, 1)
        exponents = PEAK_EXPONENT - torch.frexp(sizes).exponent
        ones = torch.ones_like(sizes)
        return multiplied(cotangents, torch.ldexp(ones, exponents)), torch.ldexp(ones, -exponents)


def multiplied(value: Tensor, scales: Tensor | None) -> Tensor:
    """Multiply ``(S, B, ...)`` by ``scales`` ``(S, B)``, if there are any."""
    return value if scales is None else value * scales.reshape(*scales.shape, *[1] * (value.ndim - 2))


def precision_of(name: str) -> torch.dtype | None:
    """Return what a network's operations are cast to under that name of ``scores.precision``; None for its own dtypes.

    Raises:
        RequestError: if there is no such name.
    """
    if name not in PRECISIONS:
        raise RequestError(f"precision {name!r} is not one of {', '.join(PRECISIONS)}")
    return PRECISIONS[name]


def _device(module: nn.Module) -> str:
    return next((parameter.device.type for parameter in module.parameters()), "cpu")
