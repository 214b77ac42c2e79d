"""Hooks that keep the calls of modules in a forward pass, so that one backward to their outputs gives all factors.

Parameters do not require gradients meanwhile: no batch weight gradient and no gradient of the network's own input is
computed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fisher_ray.errors import ModelError
from fisher_ray.gradients.blocks import Block
from fisher_ray.gradients.layers import Layer, Part
from fisher_ray.gradients.outputs import Inputs, main_output
from fisher_ray.gradients.precision import Precision

Sharing = Literal["expand", "stack", "none"]
"""How to repeat what all samples share: along a first axis of one entry if there is one, or along a new first axis."""


@dataclass(frozen=True)
class Axis:
    """Where a tensor has its samples.

    Attributes:
        dim: the axis.
        fold: how many of its entries are one sample's, next to each other.
    """

    dim: int
    fold: int

    def outermost(self, value: Tensor, leading: int = 0) -> Tensor:
        """Bring the samples, and then what is one sample's on their axis, to the front.

        ``(*leading, ..., B · k, ...)`` becomes ``(*leading, B, k, ...)``.
        """
        value = value.movedim(leading + self.dim, leading)
        return value.reshape(*value.shape[:leading], -1, self.fold, *value.shape[leading + 1 :])


@dataclass(frozen=True)
class Layout:
    """Where the tensors of one call have their samples, in the order of the flattened arguments and outputs.

    Attributes:
        arguments: None for what is not a tensor, or is the same for all samples.
        outputs: the same of what the call returns.
        aware: whether there are outputs, and every floating-point one of them holds the samples.
        shared: how the result of a call that does not see the samples is repeated for each of them; None if it does.
    """

    arguments: tuple[Axis | None, ...]
    outputs: tuple[Axis | None, ...]
    aware: bool
    shared: Sharing | None


@dataclass(frozen=True)
class Site:
    """A module whose calls are kept.

    Attributes:
        name: the module's name.
        module: the module.
        layouts: of its calls, in order.
        layer: its formula; None for a vector-Jacobian product of the whole module.
        parts: what a call gives to which block, by the formula.
        blocks: what the product is for.
        parameters: the blocks' parameters' names inside the module, by their full names.
    """

    name: str
    module: nn.Module
    layouts: tuple[Layout, ...]
    layer: Layer | None = None
    parts: tuple[Part, ...] = ()
    blocks: tuple[Block, ...] = ()
    parameters: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Sites:
    """What is kept of a forward pass.

    Attributes:
        sites: the modules.
        copy_inputs: whether the network overwrites what goes into its layers, so that copies are kept.
        copy_outputs: whether it overwrites what comes out of them, so that it gets copies.
        unseen: by name, modules that own chosen parameters and were not called.
    """

    sites: tuple[Site, ...]
    copy_inputs: bool
    copy_outputs: bool
    unseen: Mapping[str, nn.Module] = field(default_factory=dict)

    @property
    def any_shared(self) -> bool:
        """Whether results that all samples share are repeated for each of them."""
        return any(layout.shared is not None for site in self.sites for layout in site.layouts)


@dataclass
class Call:
    """One call of a site.

    Attributes:
        site: the site.
        layout: of this call.
        arguments: flattened; tensors detached.
        structure: of the arguments.
        outputs: flattened; floating-point tensors are part of the graph, others are None.
        versions: how often each tensor among arguments and outputs had been overwritten when the call was made.
    """

    site: Site
    layout: Layout
    arguments: list[Any]
    structure: TreeSpec
    outputs: list[Tensor | None]
    versions: list[int]


@dataclass
class Trace:
    """What one forward pass left behind.

    Attributes:
        output: what the likelihood is of, in the factors' dtype, attached to the graph.
        calls: in the order of the forward pass.
        hidden: ``(B, H)``, the last layer's input if the output is a Linear's, in the same dtype, else None.
    """

    output: Tensor
    calls: list[Call] = field(default_factory=list)
    hidden: Tensor | None = None


@contextmanager
def trace(model: nn.Module, inputs: Inputs, sites: Sites, batch: int, precision: Precision) -> Iterator[Trace]:
    """Run ``model`` on ``batch`` samples and keep the calls of ``sites``; take gradients inside the context.

    Raises:
        ModelError: if the output is no tensor, a module is called more often than when the network was looked at (or
            at all, and was not then), or what was kept is overwritten in place, and was not then.
    """
    keeper = _Keeper(batch, sites.copy_inputs, sites.copy_outputs)
    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        for site in sites.sites:
            whole = site.layer is None  # its hooks are part of it, and run again with it
            if whole:
                before = site.module.register_forward_pre_hook(keeper.pre_hook(site), prepend=True, with_kwargs=True)
                stack.callback(before.remove)
            hook = site.module.register_forward_hook(keeper.hook(site), prepend=not whole, with_kwargs=True)
            stack.callback(hook.remove)
        for name, module in sites.unseen.items():
            stack.callback(module.register_forward_pre_hook(_refusing(name), prepend=True).remove)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                stack.callback(module.register_forward_hook(keeper.keep_hidden).remove)
        with torch.enable_grad():
            output = precision.output(model, inputs)
            widened = precision.widened(output)
        keeper.recording = False  # activation checkpointing calls modules again in the backward
        keeper.check()
        hidden = next((value for value, made in keeper.linear_calls if made is output and value.ndim == 2), None)
        yield Trace(widened, keeper.calls, None if hidden is None else precision.widened(hidden))


def _refusing(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def refuse(module: nn.Module, args: tuple[Any, ...]) -> None:
        raise ModelError(
            f"layer {name!r} ({type(module).__name__}) is called with these samples and was not with the first ones: "
            "the network's way through its layers depends on its data. Leave the layer out with scores.parameters."
        )

    return refuse


class _Keeper:
    """Keeps calls of ``batch`` samples."""

    def __init__(self, batch: int, copy_inputs: bool, copy_outputs: bool) -> None:
        self.calls: list[Call] = []
        self.linear_calls: list[tuple[Tensor, Tensor]] = []
        self.recording = True
        self._batch, self._copy_inputs, self._copy_outputs = batch, copy_inputs, copy_outputs
        self._seen: dict[str, int] = {}
        self._given: dict[str, list[tuple[list[Any], TreeSpec]]] = defaultdict(list)

    def pre_hook(self, site: Site) -> Any:
        """Keep a whole module's arguments before it or the user's hooks change them."""

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given, structure = tree_flatten((args, kwargs))
            self._given[site.name].append(([self._kept(value) for value in given], structure))

        return keep

    def hook(self, site: Site) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            number = self._seen.get(site.name, 0)
            if self.recording:
                self._seen[site.name] = number + 1
            if self.recording and number >= len(site.layouts):
                raise ModelError(
                    f"layer {site.name!r} is called more often on this batch than on the first: the network's way "
                    "through its layers depends on the data"
                )
            layout = site.layouts[min(number, len(site.layouts) - 1)]
            given, structure = self._given[site.name].pop() if site.layer is None else tree_flatten((args, kwargs))
            if not torch.is_grad_enabled():  # nothing behind this call has a gradient
                return output
            if not site.name:  # the network itself: nothing follows that could overwrite what it returns
                made, result = [self._marked(main_output(output), layout, foreign=False)], output
            else:
                made, made_structure = tree_flatten(output)
                made = [self._marked(value, layout, foreign=site.layer is None) for value in made]
                copies = [self._copy(value) for value in made]
                result = tree_unflatten(copies, made_structure)
            if self.recording:
                kept = given if site.layer is None else [self._kept(value) for value in given]
                outputs = [value if _differentiable(value) else None for value in made]
                self.calls.append(Call(site, layout, kept, structure, outputs, _versions([*kept, *outputs])))
            return result

        return keep

    def _copy(self, value: Any) -> Any:
        return value.clone() if self._copy_outputs and _differentiable(value) else value

    def _kept(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().clone() if self._copy_inputs else value.detach()

    def _marked(self, value: Any, layout: Layout, *, foreign: bool) -> Any:
        """Return the output as a part of the graph, of its own if the module may have handed an input through."""
        if not _differentiable(value):
            return value
        if layout.shared is not None:
            value = for_each(value.detach(), self._batch, layout.shared)
        if foreign:
            value = value.view_as(value)
        return value if value.requires_grad else value.requires_grad_()

    def keep_hidden(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.recording and args:
            self.linear_calls.append((args[0].detach(), output))  # the tensor that the network goes on with

    def check(self) -> None:
        for item in self.calls:
            if _versions([*item.arguments, *item.outputs]) != item.versions:
                raise ModelError(
                    f"what goes into or comes out of layer {item.site.name!r} is overwritten in place. Use an "
                    "out-of-place operation."
                )


def _versions(values: list[Any]) -> list[int]:
    return [value._version if isinstance(value, Tensor) and not value.is_inference() else 0 for value in values]


def for_each(value: Tensor, batch: int, sharing: Sharing) -> Tensor:
    """Repeat what all samples share for each of them, ``(B, ...)``."""
    if sharing == "expand" and value.ndim and value.shape[0] == 1:
        return value.expand(batch, *value.shape[1:])
    return value.expand(batch, *value.shape)


def _differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter require gradients, and no layer take a shorter way past its parts."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    fast = torch.backends.mha.get_fastpath_enabled()
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
