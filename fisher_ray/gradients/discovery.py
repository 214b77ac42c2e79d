"""A look at a network before its gradients are taken: where each parameter is used, and which axes hold the samples.

The network is run on one sample twice and three times over, with every module and every use of a parameter watched.
What changes its size with the number of samples holds them; a parameter that is used where its layer's formula does not
see it is left to a vector-Jacobian product of the smallest module around that handles samples one by one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fisher_ray.errors import ModelError
from fisher_ray.gradients.blocks import Block
from fisher_ray.gradients.capture import Axis, Layout, Sharing, Site, Sites, for_each, frozen
from fisher_ray.gradients.memory import is_out_of_memory
from fisher_ray.gradients.network import Parameters
from fisher_ray.gradients.outputs import Inputs, main_output, rows
from fisher_ray.gradients.precision import Precision

SIZES = (2, 3)
"""How many samples the network is looked at with."""
MAX_ROUNDS = 20
"""Layers, one after the other, that do not see the samples."""

Stack = tuple[str, ...]
"""Names of the modules that are being called, from the network to the innermost."""


@dataclass
class _Seen:
    """One forward pass."""

    uses: set[tuple[str, Stack]] = field(default_factory=set)
    calls: dict[str, list[tuple[list[Any], list[Any]]]] = field(default_factory=lambda: defaultdict(list))
    inputs: list[tuple[Tensor, int]] = field(default_factory=list)  # with how often they had been overwritten
    outputs: list[tuple[Tensor, int]] = field(default_factory=list)
    output: Tensor | None = None


class _Watch(TorchFunctionMode):
    """Notes which parameters functions are called with, and inside which modules."""

    def __init__(self, names: dict[int, str], stack: list[str], seen: _Seen) -> None:
        super().__init__()
        self._names, self._stack, self._seen = names, stack, seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        used = [self._names[id(leaf)] for leaf in tree_leaves((args, kwargs)) if id(leaf) in self._names]
        if used and any(isinstance(leaf, Tensor) for leaf in tree_leaves(found)):
            self._seen.uses.update((name, tuple(self._stack)) for name in used)
        return found


def discover(model: nn.Module, inputs: Inputs, chosen: Parameters, sharing: Sharing, precision: Precision) -> Sites:
    """Return the modules whose calls give the gradients of the chosen parameters.

    Args:
        model: the network.
        inputs: of at least one sample.
        chosen: its parameters.
        sharing: how the results of layers that do not see the samples are repeated for each of them.
        precision: what the network is run in.

    Raises:
        ModelError: if a parameter's gradient cannot be had.
    """
    return _Discovery(model, inputs, chosen, sharing, precision).sites()


class _Discovery:
    def __init__(
        self, model: nn.Module, inputs: Inputs, chosen: Parameters, sharing: Sharing, precision: Precision
    ) -> None:
        self._model, self._inputs, self._sharing, self._precision = model, inputs, sharing, precision
        self._layers, self._parts = chosen.layers, chosen.parts
        self._blocks: dict[str, list[Block]] = defaultdict(list)  # by parameter
        for block in chosen.blocks:
            for piece in block.pieces:
                self._blocks[piece.parameter].append(block)
        self._modules = dict(model.named_modules())
        self._names = {id(p): name for name, p in model.named_parameters() if name in self._blocks}
        self._inside = {
            name: {self._names[id(p)]: key for key, p in module.named_parameters() if id(p) in self._names}
            for name, module in self._modules.items()
        }  # by module, names that parameters have there, by their full names
        self._shared: set[tuple[str, int]] = set()  # calls that do not see the samples

    def sites(self) -> Sites:
        small, large = self._runs()
        if self._sharing != "none":
            try:
                small, large = self._share(small, large)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                if is_out_of_memory(error):
                    raise
                raise ModelError(f"what its samples share cannot be repeated for each of them: {error}") from error
        inputs, outputs = (any(t._version != v for t, v in kept) for kept in (small.inputs, small.outputs))
        return Sites(tuple(self._place(small, large)), inputs, outputs, self._unseen(small))

    def _unseen(self, seen: _Seen) -> dict[str, nn.Module]:
        return {
            name: module
            for name, module in self._modules.items()
            if not seen.calls.get(name) and any(id(value) in self._names for value in module._parameters.values())
        }

    def _runs(self) -> tuple[_Seen, _Seen]:
        small = self._run(SIZES[0])
        return small, self._run(SIZES[1], small)

    def _share(self, small: _Seen, large: _Seen) -> tuple[_Seen, _Seen]:
        """Repeat the results of layers that do not see the samples, until there is no such layer."""
        plain = small.output
        for _ in range(MAX_ROUNDS):
            if not (found := self._unaware(small, large)):
                break
            self._shared |= found
            small, large = self._runs()
        if not self._same(small.output, plain):
            raise ModelError("the network's output changes if what its samples share is repeated for each of them")
        return small, large

    def _same(self, output: Tensor | None, other: Tensor | None) -> bool:
        if output is None or other is None or output.shape != other.shape:
            return False
        one, two = self._precision.widened(output), self._precision.widened(other)
        if self._precision.coarsest == self._precision.factors and not self._precision.on_gpu:
            return torch.allclose(one, two, equal_nan=True)
        most = self._precision.tolerance * float(one.nan_to_num().abs().max())
        return torch.allclose(one, two, rtol=0.0, atol=most, equal_nan=True)

    def _run(self, size: int, before: _Seen | None = None) -> _Seen:
        seen, stack = _Seen(), list[str]()
        with frozen(self._model), torch.no_grad(), self._watched(stack, seen, size), _Watch(self._names, stack, seen):
            sample = rows(self._inputs, torch.zeros(size, dtype=torch.long, device="cpu"))
            output = self._precision.output(self._model, sample)
        seen.output = output
        if not output.ndim or len(output) != size:
            raise ModelError(
                f"the network's output for {size} samples is {tuple(output.shape)}: not one row for each sample"
            )
        if before is not None and before.calls.keys() != seen.calls.keys():
            raise ModelError("which layers the network calls depends on the number of samples")
        return seen

    @contextmanager
    def _watched(self, stack: list[str], seen: _Seen, size: int) -> Iterator[None]:
        def entering(name: str) -> Any:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                with torch._C.DisableTorchFunction():
                    seen.inputs += _versions(tree_leaves((args, kwargs)))
                stack.append(name)

            return hook

        def leaving(name: str) -> Any:
            def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
                with torch._C.DisableTorchFunction():
                    if (name, len(seen.calls[name])) in self._shared:
                        output = for_each(output, size, self._sharing)
                    given, made = tree_leaves((args, kwargs)), tree_leaves(output) if name else [main_output(output)]
                    seen.calls[name].append((_shapes(given), _shapes(made, floating=True)))
                    seen.outputs += _versions(made)
                    stack.pop()
                return output

            return hook

        with ExitStack() as hooks:
            for name, module in self._modules.items():
                hooks.callback(module.register_forward_pre_hook(entering(name), prepend=True, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(leaving(name), prepend=True, with_kwargs=True).remove)
            yield

    def _unaware(self, small: _Seen, large: _Seen) -> set[tuple[str, int]]:
        """Return the calls of formulas whose result is the same for any number of samples."""
        return {
            (name, number)
            for name in self._parts
            for number, ((_, a), (_, b)) in enumerate(zip(small.calls[name], large.calls[name], strict=False))
            if a == b and (name, number) not in self._shared
        }

    def _place(self, small: _Seen, large: _Seen) -> list[Site]:
        layouts = {name: self._layouts(name, small, large) for name in small.calls}
        placed: dict[str, set[str]] = defaultdict(set)  # by parameter, the modules whose product gives it
        by_formula: dict[str, set[Stack]] = defaultdict(set)
        for parameter, stack in sorted(small.uses | large.uses):
            name = stack[-1] if stack else ""
            if self._has_formula(name, parameter, layouts) and _aware(layouts[name]):
                by_formula[parameter].add(stack)
                continue
            around = (m for m in reversed(stack) if parameter in self._inside[m] and _aware(layouts[m]))
            placed[parameter].add(next(around, ""))
        for parameter, modules in placed.items():
            stacks = {stack for used, stack in small.uses | large.uses if used == parameter}
            modules -= {name for name in modules for other in modules if _called_in(name, other, stacks)}
            if any(modules.intersection(stack) for stack in by_formula.get(parameter, ())):
                placed[parameter] = {""}
        self._keep_blocks_together(placed, by_formula)
        return self._made(layouts, placed, by_formula)

    def _keep_blocks_together(self, placed: dict[str, set[str]], by_formula: dict[str, set[Stack]]) -> None:
        """Leave a block to one product where the formula does not see all of its parameters' uses."""
        for block in (block for blocks in self._blocks.values() for block in blocks):
            names = {piece.parameter for piece in block.pieces}
            modules = [placed[name] for name in sorted(names & placed.keys())]
            if not modules:
                continue
            alone = len(names) == 1 and modules[0] != {""}
            if not alone and (any(name in by_formula for name in names) or any(m != modules[0] for m in modules)):
                modules = [{""}]
                for name in names:
                    by_formula.pop(name, None)
            for name in names:
                placed[name] = modules[0]

    def _made(
        self, layouts: dict[str, tuple[Layout, ...]], placed: dict[str, set[str]], by_formula: dict[str, set[Stack]]
    ) -> list[Site]:
        sites = []
        for name, module in self._modules.items():
            used = {parameter for parameter, stacks in by_formula.items() if any(s[-1] == name for s in stacks)}
            parts = self._parts.get(name, [])
            mine = tuple(part for part in parts if any(piece.parameter in used for piece in part.block.pieces))
            if mine:
                sites.append(Site(name, module, layouts[name], self._layers[name], mine))
            if asked := [parameter for parameter, modules in placed.items() if name in modules]:
                blocks = tuple({block.name: block for parameter in asked for block in self._blocks[parameter]}.values())
                inside = {parameter: self._inside[name][parameter] for parameter in asked}
                sites.append(Site(name, module, layouts[name], blocks=blocks, parameters=inside))
        return sites

    def _has_formula(self, name: str, parameter: str, layouts: Mapping[str, tuple[Layout, ...]]) -> bool:
        layer = self._layers.get(name)
        if layer is None or parameter not in layer.names.values():
            return False
        axes = (axis for layout in layouts[name] for axis in (*layout.arguments, *layout.outputs))
        return layer.any_axis or all(axis is None or axis.dim == 0 for axis in axes)

    def _layouts(self, name: str, small: _Seen, large: _Seen) -> tuple[Layout, ...]:
        if len(small.calls[name]) != len(large.calls[name]):
            raise ModelError(f"how often layer {name!r} is called depends on the number of samples")
        layouts = []
        for number, (a, b) in enumerate(zip(small.calls[name], large.calls[name], strict=True)):
            outputs = _axes(a[1], b[1])
            floats = [axis for axis, shape in zip(outputs, a[1], strict=True) if shape is not None]
            aware = bool(floats) and None not in floats
            shared = self._sharing if (name, number) in self._shared else None
            layouts.append(Layout(_axes(a[0], b[0]), outputs, aware, shared))
        return tuple(layouts)


def _versions(leaves: list[Any]) -> list[tuple[Tensor, int]]:
    return [(leaf, leaf._version) for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_inference()]


def _aware(layouts: tuple[Layout, ...]) -> bool:
    """Whether every result of a module holds the samples."""
    return all(layout.aware for layout in layouts)


def _called_in(name: str, other: str, stacks: set[Stack]) -> bool:
    return any(name != other and name in stack and other in stack[: stack.index(name)] for stack in stacks)


def _shapes(leaves: list[Any], *, floating: bool = False) -> list[Any]:
    """Return the tensors' shapes, None in the place of what is no tensor; with ``floating``, of floats alone."""
    return [
        tuple(leaf.shape) if isinstance(leaf, Tensor) and (not floating or leaf.is_floating_point()) else None
        for leaf in leaves
    ]


def _axes(small: list[Any], large: list[Any]) -> tuple[Axis | None, ...]:
    if len(small) != len(large):
        raise ModelError("what the network's layers are called with depends on the number of samples")
    return tuple(_axis(a, b) for a, b in zip(small, large, strict=True))


def _axis(small: tuple[int, ...] | None, large: tuple[int, ...] | None) -> Axis | None:
    """Return the axis that grew in proportion to the number of samples."""
    if small is None or large is None or len(small) != len(large):
        return None
    grown = [dim for dim, (a, b) in enumerate(zip(small, large, strict=True)) if a != b]
    if len(grown) != 1 or small[grown[0]] * SIZES[1] != large[grown[0]] * SIZES[0]:
        return None
    return Axis(grown[0], small[grown[0]] // SIZES[0])
