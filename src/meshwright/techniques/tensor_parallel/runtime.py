"""Carries out tensor parallelism on plain tensors: slices a layer's parameters, and adds the
all-reduces by which the slices together compute what the whole layer does.

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
from meshwright.layout.shares import cut, own_share
from meshwright.model.shard import Column, Row, Split, Vocabulary, VocabularyHead, VocabularyLoss
from meshwright.runtime.observer import Waiting


class TensorParallelGroup:
    """Joins the ranks of a tensor-parallel group, which divide the same layers, for all-reduces."""

    def __init__(self, group: ProcessGroup, index: int, width: int) -> None:
        self.group = group
        self.index = index
        """This rank's place in the group, from 0."""
        self.width = width
        self.waiting: Waiting | None = None
        """Called for everything that waits for the group, all of which is in `all_reduce`."""

    def all_reduce(self, x: Tensor, op: Any = ReduceOp.SUM) -> Tensor:
        """All-reduces `x` over the group, in place."""
        if self.waiting is None:
            dist.all_reduce(x, op, group=self.group)
        else:
            self.waiting(partial(dist.all_reduce, x, op, group=self.group))
        return x


class _CopyToGroup(Function):
    """Enters the divided part of a layer: forward is the identity, backward sums the gradient over
    the group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tensor_group: TensorParallelGroup) -> Tensor:
        ctx.team = tensor_group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # A copy, since autograd may hand the same gradient tensor to other nodes.
        tensor_group: TensorParallelGroup = ctx.team
        return tensor_group.all_reduce(grad.clone(memory_format=torch.contiguous_format)), None


class _ReduceFromGroup(Function):
    """Leaves the divided part of a layer: forward sums over the group, backward is the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tensor_group: TensorParallelGroup) -> Tensor:
        ctx.mark_dirty(x)
        return tensor_group.all_reduce(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return grad, None


class _VocabularyCrossEntropy(Function):
    """Computes the mean cross entropy of logits whose vocabulary is divided over the group.

    It is log(sum_v exp(l_v)) - l_target, averaged over the targets that are not `ignore`. Suffixes
    of names: N targets, V this rank's share of the vocabulary.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_NV: Tensor,
        target_N: Tensor,
        first: int,
        ignore: int,
        tensor_group: TensorParallelGroup,
    ) -> Tensor:
        x_NV = logits_NV.to(torch.promote_types(torch.float32, logits_NV.dtype))
        top_N = tensor_group.all_reduce(x_NV.amax(dim=1), ReduceOp.MAX)
        x_NV = x_NV - top_N[:, None]
        local_N = target_N - first
        mine_N = (local_N >= 0) & (local_N < x_NV.shape[1])
        local_N = local_N.masked_fill(~mine_N, 0)
        picked_N = x_NV.gather(1, local_N[:, None])[:, 0].masked_fill(~mine_N, 0)
        exp_NV = x_NV.exp_()
        total_N, picked_N = tensor_group.all_reduce(torch.stack((exp_NV.sum(dim=1), picked_N)))
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


def copy_to_group(x: Tensor, tensor_group: TensorParallelGroup) -> Tensor:
    """Returns `x`; its gradient is summed over the group."""
    return cast("Tensor", _CopyToGroup.apply(x, tensor_group))  # type: ignore[no-untyped-call]


def reduce_from_group(x: Tensor, tensor_group: TensorParallelGroup) -> Tensor:
    """Sums `x` over the group, in place, and returns it; its gradient passes unchanged."""
    return cast("Tensor", _ReduceFromGroup.apply(x, tensor_group))  # type: ignore[no-untyped-call]


def divide(
    module: nn.Module, name: str, split: Split, full_size: int, tensor_group: TensorParallelGroup
) -> None:
    """Makes a module whose parameters are slices compute together with the other ranks of its
    group.

    `full_size` is the size of the whole vocabulary, for a Vocabulary. Raises PlanError for a module
    of a kind that cannot be divided this way.
    """
    if isinstance(split, (Column, VocabularyHead)):
        whole = module.forward
        module.forward = lambda x, *rest: whole(copy_to_group(x, tensor_group), *rest)
    elif isinstance(split, Row):
        linear = type(module).forward is nn.Linear.forward
        biased = getattr(module, "bias", None) is not None
        _need(linear or not biased, module, name, "an nn.Linear, or any module without bias")
        module.forward = (
            _row(cast("nn.Linear", module), tensor_group) if linear else _sum(module, tensor_group)
        )
    elif isinstance(split, Vocabulary):
        fits = isinstance(module, nn.Embedding) and module.padding_idx is None
        _need(fits and cast("Any", module).max_norm is None, module, name,
              "an nn.Embedding without padding_idx and max_norm")  # fmt: skip
        module.forward = _vocabulary(module, full_size, tensor_group)
    elif isinstance(split, VocabularyLoss):
        module.forward = _vocabulary_loss(module, tensor_group)


def draw_apart(layer: nn.Module, tensor_group: TensorParallelGroup) -> None:
    """Tells the modules of a divided layer that drop parts of what only this rank holds (they have
    an attribute `tensor_rank`) which rank of the group it is, so that ranks draw differently."""
    for module in layer.modules():
        if hasattr(module, "tensor_rank"):
            cast("Any", module).tensor_rank = tensor_group.index


def _need(holds: bool, module: nn.Module, name: str, wanted: str) -> None:
    if not holds:
        raise PlanError(Problem(f"module {name}", "tensor_split", type(module).__name__, wanted))


def _row(module: nn.Linear, tensor_group: TensorParallelGroup) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        y = reduce_from_group(F.linear(x, module.weight), tensor_group)
        return y if module.bias is None else y + module.bias.to(y.dtype)

    return forward


def _sum(module: nn.Module, tensor_group: TensorParallelGroup) -> Callable[..., Tensor]:
    whole = module.forward
    return lambda *args: reduce_from_group(whole(*args), tensor_group)


def _vocabulary(
    module: nn.Module, size: int, tensor_group: TensorParallelGroup
) -> Callable[[Tensor], Tensor]:
    first, last = cut(size, own_share(tensor_group.width, tensor_group.index))
    whole = module.forward

    def forward(index: Tensor) -> Tensor:
        elsewhere = (index < first) | (index >= last)
        found = whole((index - first).masked_fill(elsewhere, 0))
        return reduce_from_group(found.masked_fill(elsewhere[..., None], 0), tensor_group)

    return forward


def _vocabulary_loss(
    module: nn.Module, tensor_group: TensorParallelGroup
) -> Callable[[Tensor, Tensor], Tensor]:
    ignore = int(getattr(module, "ignore_index", -100))
    starts: list[int] = []

    def forward(logits: Tensor, targets: Tensor) -> Tensor:
        flat = logits.flatten(0, -2)
        if not starts:
            sizes = torch.zeros(tensor_group.width, dtype=torch.long, device=flat.device)
            sizes[tensor_group.index] = flat.shape[1]
            tensor_group.all_reduce(sizes)
            starts.append(sum(int(sizes[i]) for i in range(tensor_group.index)))
        args = (flat, targets.flatten(), starts[0], ignore, tensor_group)
        result = _VocabularyCrossEntropy.apply(*args)  # type: ignore[no-untyped-call]
        return cast("Tensor", result)

    return forward
