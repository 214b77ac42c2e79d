"""Likelihoods: what a network's output says of a target, and the scores' starting points at the output.

The score of a target is ``∇_θ log p_θ(y|x) = J(x)ᵀ g``, with ``g = ∂ log p / ∂ output`` given here and ``J`` the
network's. Over all targets a likelihood has a square root of the output's Fisher matrix, ``Σ_s g_s g_sᵀ``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from fisher_ray.errors import DataError, ModelError, RequestError
from fisher_ray.gradients.labels import draw_labels, keyed_normal, keyed_uniform
from fisher_ray.gradients.spanning import Reflection, reflect


class Likelihood(Protocol):
    """A conditional distribution of targets given a network's output."""

    def check(self, output: Tensor) -> None:
        """Raise a ModelError if the output ``(B, ...)`` has not the shape that this likelihood is of."""

    def all_scores(self, output: Tensor, *, weighted: bool) -> Tensor:
        """Return ``g`` of all targets, ``(S, B, ...)``, weighted so that their outer products sum to the Fisher."""

    def spanning_scores(self, output: Tensor) -> tuple[Tensor, Reflection | None]:
        """Return as few ``g`` as have :meth:`all_scores`' sum of outer products, and what makes all scores of them.

        The second is None where these are all.
        """

    def score(self, output: Tensor, targets: Tensor) -> Tensor:
        """Return ``g`` of one target a sample, ``(B, ...)``; of one that :meth:`check_targets` refuses, any numbers."""

    def check_targets(self, output: Tensor, targets: Tensor) -> None:
        """Raise a DataError if a target is not one of the output's; on a GPU, that waits for it."""

    def draw(self, kind: str, output: Tensor, targets: Tensor, index: Tensor, seed: int) -> Tensor:
        """Return targets: the true ones, or drawn from the output's own distribution, keyed by ``(seed, index)``."""


class Softmax:
    """Classification: the output ``(B, C)`` are logits, a target is a class."""

    def check(self, output: Tensor) -> None:
        """See :class:`Likelihood`."""
        if output.ndim != 2:
            raise ModelError(f"the network's output is {tuple(output.shape)}, not logits of shape (B, C)")

    def all_scores(self, output: Tensor, *, weighted: bool) -> Tensor:
        """Return ``√p_c (e_c − p)``, or without ``√p_c``, ``(C, B, C)``."""
        probabilities = output.softmax(dim=1)
        one_hot = torch.eye(output.shape[1], dtype=output.dtype, device=output.device)
        scores = one_hot - probabilities[:, None]  # (B, C, C)
        if weighted:
            scores = scores * probabilities.sqrt()[:, :, None]
        return scores.transpose(0, 1).contiguous()

    def spanning_scores(self, output: Tensor) -> tuple[Tensor, Reflection | None]:
        """See :class:`Likelihood`."""
        scores = self.all_scores(output, weighted=True)
        return reflect(scores, output.softmax(dim=1)) if len(scores) > 1 else (scores, None)

    def score(self, output: Tensor, targets: Tensor) -> Tensor:
        """Return ``e_y − p``.

        Raises:
            DataError: if there is not one integer for each sample.
        """
        if targets.shape != (len(output),):
            self._refuse(f"shape {tuple(targets.shape)}", output)
        if targets.dtype == torch.bool or targets.is_floating_point() or targets.is_complex():
            self._refuse(f"dtype {targets.dtype}", output)
        is_target = torch.arange(output.shape[1], device=output.device) == targets[:, None]
        return is_target.to(output) - output.softmax(dim=1)

    def check_targets(self, output: Tensor, targets: Tensor) -> None:
        """See :class:`Likelihood`."""
        wrong = ~((targets >= 0) & (targets < output.shape[1]))  # NaN too
        if bool(wrong.any()):
            self._refuse(f"label {int(targets[wrong][0])}", output)

    @staticmethod
    def _refuse(given: str, output: Tensor) -> NoReturn:
        raise DataError(f"targets: {given}; the rule is one integer in [0, {output.shape[1]}) for each sample")

    def draw(self, kind: str, output: Tensor, targets: Tensor, index: Tensor, seed: int) -> Tensor:
        """See :class:`Likelihood`; also ``uniform``, any class as likely as another."""
        return draw_labels(kind, output.softmax(dim=1), targets, index, seed)


class Gaussian:
    """Regression: the output ``(B, ...)`` is the mean of a normal distribution with unit variance."""

    def check(self, output: Tensor) -> None:
        """See :class:`Likelihood`."""
        if output.ndim < 2:
            raise ModelError(f"the network's output is {tuple(output.shape)}, not means of shape (B, K)")

    def all_scores(self, output: Tensor, *, weighted: bool) -> Tensor:
        """Return the unit vectors, whose outer products sum to the output's Fisher matrix, the identity."""
        size = output[0].numel()
        units = torch.eye(size, dtype=output.dtype, device=output.device)
        return units[:, None].expand(size, len(output), size).reshape(size, *output.shape)

    def spanning_scores(self, output: Tensor) -> tuple[Tensor, Reflection | None]:
        """See :class:`Likelihood`: none follows from the others."""
        return self.all_scores(output, weighted=True), None

    def score(self, output: Tensor, targets: Tensor) -> Tensor:
        """Return ``y − output``."""
        _check_like(output, targets)
        return targets.to(output) - output

    def check_targets(self, output: Tensor, targets: Tensor) -> None:
        """Accept any that :meth:`score` accepts."""

    def draw(self, kind: str, output: Tensor, targets: Tensor, index: Tensor, seed: int) -> Tensor:
        """See :class:`Likelihood`."""
        _check_kind(kind)
        if kind == "true":
            return targets
        return output + keyed_normal(seed, index, output[0].numel()).to(output).reshape(output.shape)


class Bernoulli:
    """Several labels at once: the output ``(B, K)`` are the logits of independent yes-or-no labels."""

    def check(self, output: Tensor) -> None:
        """See :class:`Likelihood`."""
        if output.ndim != 2:
            raise ModelError(f"the network's output is {tuple(output.shape)}, not logits of shape (B, K)")

    def all_scores(self, output: Tensor, *, weighted: bool) -> Tensor:
        """Return ``√(p_k (1 − p_k)) e_k``, whose outer products sum to the output's Fisher matrix, ``(K, B, K)``."""
        spread = (output.sigmoid() * (-output).sigmoid()).sqrt()
        return torch.diag_embed(spread).transpose(0, 1).contiguous()

    def spanning_scores(self, output: Tensor) -> tuple[Tensor, Reflection | None]:
        """See :class:`Likelihood`: none follows from the others."""
        return self.all_scores(output, weighted=True), None

    def score(self, output: Tensor, targets: Tensor) -> Tensor:
        """Return ``y − p``."""
        _check_like(output, targets)
        return targets.to(output) - output.sigmoid()

    def check_targets(self, output: Tensor, targets: Tensor) -> None:
        """See :class:`Likelihood`; shares of one between no and yes are targets too."""
        wrong = ~((targets >= 0) & (targets <= 1))  # NaN too
        if bool(wrong.any()):
            raise DataError(f"targets: {float(targets[wrong][0])}; the rule is numbers from 0, no, to 1, yes")

    def draw(self, kind: str, output: Tensor, targets: Tensor, index: Tensor, seed: int) -> Tensor:
        """See :class:`Likelihood`."""
        _check_kind(kind)
        if kind == "true":
            return targets
        draws = keyed_uniform(seed, index, output.shape[1]).to(output.device)
        return (draws < output.double().sigmoid()).to(output)


class NextToken:
    """Language modelling: the output ``(B, T, V)`` are logits of each next token; a sequence's log-likelihoods add up.

    Targets are the sequences ``(B, T)`` themselves: position ``t`` predicts token ``t + 1``.

    Args:
        ignore: a target that is not predicted.
    """

    def __init__(self, ignore: int = -100) -> None:
        """See the class."""
        self._ignore = ignore

    def check(self, output: Tensor) -> None:
        """See :class:`Likelihood`."""
        if output.ndim != 3:
            raise ModelError(f"the network's output is {tuple(output.shape)}, not logits of shape (B, T, V)")

    def all_scores(self, output: Tensor, *, weighted: bool) -> Tensor:
        """Raise: there are as many sequences as ``V`` to the power of ``T``."""
        raise RequestError("scores of all targets: next tokens have too many. Take labels sampled or true.")

    def spanning_scores(self, output: Tensor) -> tuple[Tensor, Reflection | None]:
        """See :class:`Likelihood`: none follows from the others."""
        return self.all_scores(output, weighted=True), None

    def score(self, output: Tensor, targets: Tensor) -> Tensor:
        """Return ``e_next − p`` at each position but the last, 0 where the next token is left out."""
        if targets.shape != output.shape[:2] or targets.is_floating_point():
            raise DataError(f"targets {tuple(targets.shape)} are not one token for each of {tuple(output.shape[:2])}")
        following = targets[:, 1:]
        asked = following != self._ignore
        probabilities = output[:, :-1].softmax(dim=2)
        made = -probabilities
        places = following.clamp(0, output.shape[2] - 1)[..., None]
        made.scatter_add_(2, places, torch.ones_like(made[..., :1]))
        return functional.pad(made * asked[..., None], (0, 0, 0, 1))

    def check_targets(self, output: Tensor, targets: Tensor) -> None:
        """See :class:`Likelihood`."""
        following = targets[:, 1:]
        outside = (following < 0) | (following >= output.shape[2])
        if bool((outside & (following != self._ignore)).any()):
            raise DataError(f"targets: a token is not in [0, {output.shape[2]})")

    def draw(self, kind: str, output: Tensor, targets: Tensor, index: Tensor, seed: int) -> Tensor:
        """See :class:`Likelihood`: each token by itself, given the true ones before it."""
        _check_kind(kind)
        if kind == "true":
            return targets
        cumulative = output[:, :-1].double().softmax(dim=2).cumsum(dim=2)
        uniform = keyed_uniform(seed, index, cumulative.shape[1]).to(output.device)[..., None]
        drawn = torch.searchsorted(cumulative, uniform * cumulative[..., -1:], right=True)[..., 0]
        drawn = drawn.clamp(max=output.shape[2] - 1)
        drawn = torch.where(targets[:, 1:] == self._ignore, self._ignore, drawn)
        return torch.cat([targets[:, :1], drawn], dim=1)


class Custom:
    """The user's own.

    Args:
        function: takes the output ``(B, ...)`` and targets, returns log-likelihoods ``(B,)``; a row must depend on its
            own sample alone.
    """

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        """See the class."""
        self._function = function

    def check(self, output: Tensor) -> None:
        """Accept any output."""

    def all_scores(self, output: Tensor, *, weighted: bool) -> Tensor:
        """Raise: the function says nothing of targets that it is not given."""
        raise RequestError("scores of all targets: a likelihood of your own gives those of given targets. Take true.")

    def spanning_scores(self, output: Tensor) -> tuple[Tensor, Reflection | None]:
        """See :class:`Likelihood`: none follows from the others."""
        return self.all_scores(output, weighted=True), None

    def score(self, output: Tensor, targets: Tensor) -> Tensor:
        """Return the function's gradient."""
        with torch.enable_grad():
            leaf = output.detach().requires_grad_()
            values = self._function(leaf, targets)
            if values.shape != (len(output),):
                raise ModelError(
                    f"the likelihood returns {tuple(values.shape)}, not one log-likelihood for each of {len(output)} "
                    "samples"
                )
            (made,) = torch.autograd.grad(values.sum(), leaf)
        return made

    def check_targets(self, output: Tensor, targets: Tensor) -> None:
        """Accept any that :meth:`score` accepts."""

    def draw(self, kind: str, output: Tensor, targets: Tensor, index: Tensor, seed: int) -> Tensor:
        """Return the true targets.

        Raises:
            RequestError: if others are asked for.
        """
        if kind != "true":
            raise RequestError(f"labels {kind!r}: a likelihood of your own cannot draw targets. Take true.")
        return targets


LIKELIHOODS: dict[str, Callable[[], Likelihood]] = {
    "softmax": Softmax,
    "gaussian": Gaussian,
    "bernoulli": Bernoulli,
    "next_token": NextToken,
}


def likelihood_of(given: str | Callable[[Tensor, Tensor], Tensor]) -> Likelihood:
    """Return the likelihood of that name, or the user's own.

    Raises:
        RequestError: if there is none of the name.
    """
    if not isinstance(given, str):
        return Custom(given)
    if given not in LIKELIHOODS:
        raise RequestError(f"likelihood {given!r} is not one of {', '.join(LIKELIHOODS)}, or a function of your own")
    return LIKELIHOODS[given]()


def _check_like(output: Tensor, targets: Tensor) -> None:
    if targets.shape != output.shape:
        raise DataError(f"targets are {tuple(targets.shape)}, the network's output is {tuple(output.shape)}")


def _check_kind(kind: str) -> None:
    if kind not in ("true", "sampled"):
        raise RequestError(f"labels {kind!r} are not known to this likelihood. Take all, true or sampled.")
