"""Tensor parallelism on plain tensors: slices a layer's parameters, and adds the all-reduces by
which the slices together compute what the whole layer does.

The method is that of Megatron-LM (Shoeybi et al. 2019). Parameters stay ordinary tensors, so that
gradient buckets, fused optimizers and clipping need not know.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed import ProcessGroup, ReduceOp

from meshwright.errors import PlanError, Problem
from meshwright.layout.boxes import Box
from meshwright.layout.shares import cut, own_share
from meshwright.layout.tiles import Tile, joined, joint
from meshwright.model.shard import Column, Row, Split, Vocabulary, VocabularyHead, VocabularyLoss
from meshwright.runtime.observer import Waiting


class Team:
    """The tensor-parallel group of this rank: the ranks that share its layers."""

    def __init__(self, group: ProcessGroup, index: int, width: int) -> None:
        self.group = group
        self.index = index
        """This rank's place in the group, from 0."""
        self.width = width
        self.waiting: Waiting | None = None
        """Called for everything that waits for the group, all of which is in `sum_`."""

    def sum_(self, x: Tensor, op: Any = ReduceOp.SUM) -> Tensor:
        """All-reduces `x` over the group, in place."""
        if self.waiting is None:
            dist.all_reduce(x, op, group=self.group)
        else:
            self.waiting(partial(dist.all_reduce, x, op, group=self.group))
        return x


class _Enter(Function):
    """Enters the divided part of a layer: forward is the identity, backward sums the gradient over
    the group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, team: Team) -> Tensor:
        ctx.team = team
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # A copy, since autograd may hand the same gradient tensor to other nodes.
        team: Team = ctx.team
        return team.sum_(grad.clone(memory_format=torch.contiguous_format)), None


class _Leave(Function):
    """Leaves the divided part of a layer: forward sums over the group, backward is the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, team: Team) -> Tensor:
        ctx.mark_dirty(x)
        return team.sum_(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return grad, None


class _VocabularyCrossEntropy(Function):
    """Mean cross entropy of logits whose vocabulary is divided over the group.

    It is log(sum_v exp(l_v)) - l_target, averaged over the targets that are not `ignore`. Suffixes
    of names: N targets, V this rank's share of the vocabulary.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, target_N: Tensor, first: int, ignore: int, team: Team
    ) -> Tensor:
        x_NV = logits_NV.to(torch.promote_types(torch.float32, logits_NV.dtype))
        top_N = team.sum_(x_NV.amax(dim=1), ReduceOp.MAX)
        x_NV = x_NV - top_N[:, None]
        local_N = target_N - first
        mine_N = (local_N >= 0) & (local_N < x_NV.shape[1])
        local_N = local_N.masked_fill(~mine_N, 0)
        picked_N = x_NV.gather(1, local_N[:, None])[:, 0].masked_fill(~mine_N, 0)
        exp_NV = x_NV.exp_()
        total_N, picked_N = team.sum_(torch.stack((exp_NV.sum(dim=1), picked_N)))
        counts_N = target_N != ignore
        ctx.scale = 1 / counts_N.sum(dtype=x_NV.dtype)
        ctx.save_for_backward(exp_NV.div_(total_N[:, None]), local_N, mine_N, counts_N)
        ctx.dtype = logits_NV.dtype
        losses_N = (total_N.log() - picked_N).masked_fill(~counts_N, 0)
        return cast("Tensor", losses_N.sum() * ctx.scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        softmax_NV, local_N, mine_N, counts_N = ctx.saved_tensors
        grad_NV = softmax_NV.clone()
        grad_NV.scatter_add_(1, local_N[:, None], -mine_N.to(grad_NV.dtype)[:, None])
        grad_NV *= (counts_N * (grad * ctx.scale))[:, None]
        return grad_NV.to(ctx.dtype), None, None, None, None


def enter(x: Tensor, team: Team) -> Tensor:
    """Returns `x`; its gradient is summed over the group."""
    return cast("Tensor", _Enter.apply(x, team))  # type: ignore[no-untyped-call]


def leave(x: Tensor, team: Team) -> Tensor:
    """Sums `x` over the group, in place, and returns it; its gradient passes unchanged."""
    return cast("Tensor", _Leave.apply(x, team))  # type: ignore[no-untyped-call]


def at(box: Box) -> tuple[slice, ...]:
    """Returns the index of a box in a tensor."""
    return tuple(slice(first, last) for first, last in box)


def take(full: Tensor, tile: Tile) -> Tensor:
    """Returns a tile of a full tensor as a new tensor, its boxes joined."""
    return torch.cat([full[at(box)] for box in tile], dim=joint(tile))


def put(full: Tensor, tile: Tile, part: Tensor) -> None:
    """Writes a tile, as `take` returns it, back into the full tensor."""
    for box, place in zip(tile, joined(tile), strict=True):
        full[at(box)].copy_(part[at(place)])


def divide(module: nn.Module, name: str, split: Split, full_size: int, team: Team) -> None:
    """Makes a module whose parameters are slices compute together with the other ranks of its
    group.

    `full_size` is the size of the whole vocabulary, for a Vocabulary. Raises PlanError for a module
    of a kind that cannot be divided this way.
    """
    if isinstance(split, (Column, VocabularyHead)):
        whole = module.forward
        module.forward = lambda x, *rest: whole(enter(x, team), *rest)
    elif isinstance(split, Row):
        linear = type(module).forward is nn.Linear.forward
        biased = getattr(module, "bias", None) is not None
        _need(linear or not biased, module, name, "an nn.Linear, or any module without bias")
        module.forward = _row(cast("nn.Linear", module), team) if linear else _sum(module, team)
    elif isinstance(split, Vocabulary):
        fits = isinstance(module, nn.Embedding) and module.padding_idx is None
        _need(fits and cast("Any", module).max_norm is None, module, name,
              "an nn.Embedding without padding_idx and max_norm")  # fmt: skip
        module.forward = _vocabulary(module, full_size, team)
    elif isinstance(split, VocabularyLoss):
        module.forward = _vocabulary_loss(module, team)


def _need(holds: bool, module: nn.Module, name: str, wanted: str) -> None:
    if not holds:
        raise PlanError(Problem(f"module {name}", "tensor_split", type(module).__name__, wanted))


def _row(module: nn.Linear, team: Team) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        y = leave(F.linear(x, module.weight), team)
        return y if module.bias is None else y + module.bias.to(y.dtype)

    return forward


def _sum(module: nn.Module, team: Team) -> Callable[..., Tensor]:
    whole = module.forward
    return lambda *args: leave(whole(*args), team)


def _vocabulary(module: nn.Module, size: int, team: Team) -> Callable[[Tensor], Tensor]:
    first, last = cut(size, own_share(team.width, team.index))
    whole = module.forward

    def forward(index: Tensor) -> Tensor:
        elsewhere = (index < first) | (index >= last)
        found = whole((index - first).masked_fill(elsewhere, 0))
        return leave(found.masked_fill(elsewhere[..., None], 0), team)

    return forward


def _vocabulary_loss(module: nn.Module, team: Team) -> Callable[[Tensor, Tensor], Tensor]:
    ignore = int(getattr(module, "ignore_index", -100))
    starts: list[int] = []

    def forward(logits: Tensor, targets: Tensor) -> Tensor:
        flat = logits.flatten(0, -2)
        if not starts:
            sizes = torch.zeros(team.width, dtype=torch.long, device=flat.device)
            sizes[team.index] = flat.shape[1]
            team.sum_(sizes)
            starts.append(sum(int(sizes[i]) for i in range(team.index)))
        args = (flat, targets.flatten(), starts[0], ignore, team)
        result = _VocabularyCrossEntropy.apply(*args)  # type: ignore[no-untyped-call]
        return cast("Tensor", result)

    return forward
