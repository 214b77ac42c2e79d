"""A sparse Johnson–Lindenstrauss sketch of the whole gradient, made block by block: ``(B, P)`` is never formed.

Every coordinate of the gradient is added, with a random sign of its own, to one of ``k`` entries (count sketch:
Charikar, Chen & Farach-Colton 2002; as an embedding: Clarkson & Woodruff 2013). Which entry is drawn for runs of up to
``k`` neighbours together, as a rotation of the run: two coordinates of one run never meet, two of different runs meet
with probability ``1/k`` as if drawn by themselves, and sums run along contiguous memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from fisher_ray.gradients.blocks import Block, Piece, block_seed
from fisher_ray.gradients.factors import AffineFactors, Factors, TokenFactors
from fisher_ray.gradients.formation import Workspace, form_chunks
from fisher_ray.gradients.forming import Scores

NARROW = 1024
"""A sketch of fewer numbers is made by gathering: its many short runs would each take longer to begin than to add.

On a GPU every sketch is.
"""


class GradientSketch:
    """Maps scores to ``k`` numbers each, whose dot products are unbiased estimates of the gradients' dot products.

    Args:
        blocks: of the engine that makes the scores.
        dim: ``k``.
        seed: of signs and places; with it the sketch is the same on every machine.
        like: a tensor with the dtype and device to compute in.
    """

    def __init__(self, blocks: Sequence[Block], dim: int, seed: int, like: Tensor) -> None:
        """See the class."""
        self.dim = dim
        self._blocks = {block.name: BlockSketch(block, dim, seed, like) for block in blocks}

    def compress(self, scores: Scores) -> Tensor:
        """Return the sketches, ``(B, S, k)``."""
        out = scores.logits.new_zeros(scores.logits.shape[0], scores.num_scores, 2 * self.dim)
        for item in scores.factors:
            self._blocks[item.block.name].add(item, out)
        return fold(out)

    def matrix(self, block: Block) -> Tensor:
        """Return the sketch of a block as a matrix ``(O · A, k)``, for gradients flattened by rows."""
        return self._blocks[block.name].matrix()


class BlockSketch:
    """The sketch of one block's gradients; arguments as of :class:`GradientSketch`."""

    def __init__(self, block: Block, dim: int, seed: int, like: Tensor) -> None:
        """See the class."""
        self.dim, self._block = dim, block
        self._plans = [_Plan(block, piece, dim, seed, like) for piece in block.pieces]
        self._workspace = Workspace(like)

    def add(self, item: Factors, out: Tensor) -> None:
        """Add one call's sketches to ``(B, S, 2 k)``: a run that is rotated over the end goes on; see :func:`fold`."""
        if isinstance(item, AffineFactors):
            self._add_affine(item, out)
        elif isinstance(item, TokenFactors):
            self._plans[0].add_tokens(item, out)
        else:
            self.add_gradient(item.gradient(), out)

    def add_gradient(self, gradient: Tensor, out: Tensor) -> None:
        """Add the sketches of gradients ``(B, S, O, A)``."""
        for plan in self._plans:
            plan.add(0, gradient[..., plan.columns].flatten(2), out)

    def _add_affine(self, item: AffineFactors, out: Tensor) -> None:
        if item.source.weight:
            plan = self._plans[0]
            for chunk in form_chunks(item, self._workspace, row_step=plan.step):
                plan.add(chunk.rows.start, chunk.gradient.flatten(2), out[chunk.samples])
        if item.source.bias:
            self._plans[-1].add(0, item.deltas.sum(dim=3).transpose(0, 1), out)

    def matrix(self) -> Tensor:
        """Return the sketch as a matrix ``(O · A, k)``, for gradients flattened by rows."""
        made = []
        for plan in self._plans:
            out = plan.signs.new_zeros(len(plan.signs), 2 * self.dim)
            plan.add(0, torch.eye(len(plan.signs), dtype=out.dtype, device=out.device), out)
            made.append(fold(out).view(self._block.num_outputs, -1, self.dim))
        return torch.cat(made, dim=1).flatten(0, 1)

    def transpose(self, sketches: Tensor) -> Tensor:
        """Return the sketch's adjoint of ``(..., k)``, ``(..., O, A)``."""
        shape = (*sketches.shape[:-1], self._block.num_outputs, -1)
        return torch.cat([plan.transpose(sketches).view(shape) for plan in self._plans], dim=-1)


def fold(out: Tensor) -> Tensor:
    """Add the second half of the last axis to the first: ``(..., 2 k)`` to ``(..., k)``."""
    return out[..., : out.shape[-1] // 2] + out[..., out.shape[-1] // 2 :]


class _Plan:
    """Where the coordinates of one block's columns of one parameter go.

    The flattened gradient is cut into runs: whole rows as far as ``dim`` goes, or parts of one row.

    Attributes:
        columns: of the block.
        signs: ``(O · A,)`` for these columns.
        step: rows of a run, or 1.
    """

    def __init__(self, block: Block, piece: Piece, dim: int, seed: int, like: Tensor) -> None:
        generator = torch.Generator().manual_seed(block_seed(seed, f"{block.name} {piece.parameter}"))
        self.columns = piece.columns
        rows, self._width = block.num_outputs, piece.columns.stop - piece.columns.start
        size = (rows * self._width,)
        signs = torch.randint(0, 2, size, generator=generator, dtype=torch.int8, device="cpu") * 2 - 1
        self.signs, self.step = signs.to(like), max(1, dim // self._width)
        self._cuts = [*range(0, self._width, dim)] if self._width > dim else [0]
        self._ends = [*self._cuts[1:], self._width if self._width > dim else self.step * self._width]
        num_runs = -(-rows // self.step) * len(self._cuts)
        self._shifts = torch.randint(dim, (num_runs,), generator=generator, device="cpu")
        self._shifts_there = self._shifts.to(like.device)
        self._cuts_there = torch.tensor(self._cuts, device=like.device)
        self._dim = dim

    def add(self, start: int, gradient: Tensor, out: Tensor) -> None:
        """Add rows from ``start``, the first of a run, as ``(..., rows · A)``, to ``(..., 2 k)``."""
        if self._dim < NARROW or gradient.is_cuda:
            places, signs = self._gathering(start, gradient.shape[-1])
            runs = gradient.index_select(-1, places).view(*gradient.shape[:-1], -1, self._dim)
            out[..., : self._dim] += (runs * signs).sum(dim=-2)
            return
        number, stride = start // self.step * len(self._cuts), self.step * self._width
        shifts, offset = iter(self._shifts[number:].tolist()), start * self._width
        for place in range(0, gradient.shape[-1], stride):
            for begin, end in zip(self._cuts, self._ends, strict=True):
                values = gradient[..., place + begin : place + end]
                sign = self.signs[offset + place + begin : offset + place + end]
                shift = next(shifts)
                out[..., shift : shift + values.shape[-1]].addcmul_(values, sign)

    def _gathering(self, start: int, size: int) -> tuple[Tensor, Tensor]:
        """Return where in ``size`` coordinates from row ``start`` each run's entries come from, and their signs.

        Of runs in order, ``(runs · k,)`` places, the first for an entry that nothing goes to, and ``(runs, k)`` signs,
        zero there.
        """
        places, signs = self._gathered
        stride = self.step * self._width
        number = start // self.step * len(self._cuts)
        some = slice(number, number + -(-size // stride) * len(self._cuts))
        first = start * self._width
        return (places[some] - first).clamp_(min=0).flatten() if first else places[some].flatten(), signs[some]

    @cached_property
    def _gathered(self) -> tuple[Tensor, Tensor]:
        """Places, int32, and signs of all runs, ``(runs, k)``: eight bytes for each coordinate."""
        there, total = self.signs.device, len(self.signs)
        firsts = torch.arange(0, total, self.step * self._width, device=there)[:, None]
        begins = (firsts + self._cuts_there).flatten()
        ends = (firsts + torch.tensor(self._ends, device=there)).flatten().clamp(max=total)
        places = begins[:, None] + (torch.arange(self._dim, device=there) - self._shifts_there[:, None]) % self._dim
        filled = places < ends[:, None]
        places = torch.where(filled, places, 0)
        return places.int(), self.signs[places] * filled.to(self.signs)

    def transpose(self, sketches: Tensor) -> Tensor:
        """Return for every coordinate its sign times the entry that it goes to: ``(..., k)`` to ``(..., O · A)``."""
        wide, shifts = torch.cat([sketches, sketches], dim=-1), iter(self._shifts.tolist())
        parts = []
        for place in range(0, len(self.signs), self.step * self._width):
            for begin, end in zip(self._cuts, self._ends, strict=True):
                sign, shift = self.signs[place + begin : place + end], next(shifts)
                parts.append(wide[..., shift : shift + len(sign)] * sign)
        return torch.cat(parts, dim=-1)

    def add_tokens(self, item: TokenFactors, out: Tensor) -> None:
        """Add the rows of an embedding that were looked up to ``(B, S, 2 k)``."""
        shifts = self._shifts_there.view(-1, len(self._cuts))
        columns = torch.arange(self._width, device=out.device)
        cut = torch.bucketize(columns, self._cuts_there, right=True) - 1
        places = columns - self._cuts_there[cut]  # (A,)
        rows = item.tokens  # (B, T)
        index = shifts[rows // self.step][:, :, cut] + (rows % self.step * self._width)[..., None] + places
        signed = item.deltas * self.signs.view(-1, self._width)[rows]  # (S, B, T, A)
        for score, part in enumerate(signed):
            out[:, score].scatter_add_(1, index.flatten(1), part.flatten(1))
