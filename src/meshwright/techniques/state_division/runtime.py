"""Carries out divided optimizer states on PyTorch.

The weights of a divided bucket move into one flat tensor, as its gradients are in one, both filled
up to a multiple of the number of ranks. Each rank's optimizer updates one slice of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshwright.layout.shares import flat_share
from meshwright.program.instructions import Instruction
from meshwright.runtime.flat_buckets import FlatBucket, TrainedPart
from meshwright.runtime.interpreter import BoundInstruction, Interpreter, Step
from meshwright.techniques.state_division.operations import GATHER_PARAMETERS, REDUCE_SCATTER

# The names in newer versions of PyTorch, else those in older ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def prepare(bucket: FlatBucket, i: Instruction) -> None:
    """Lays a bucket's weights out flat, and gives the optimizer this rank's share of them."""
    if i.op is not REDUCE_SCATTER:
        return
    count, rank = _members(bucket)
    size = -(-bucket.buffer.numel() // count) * count
    own = (rank * size // count, (rank + 1) * size // count)
    gradients = bucket.buffer.new_zeros(size)
    weights = torch.zeros_like(gradients)
    bucket.buffer, bucket.trained, start = gradients, [], 0
    spans = flat_share([one.parameter.numel() for one in bucket.local_parameters], count, rank)
    for one, (first, last) in zip(bucket.local_parameters, spans, strict=True):
        parameter, end = one.parameter, start + one.parameter.numel()
        weights[start:end] = parameter.detach().flatten()
        parameter.data = weights[start:end].view(parameter.shape)
        parameter.grad = gradients[start:end].view(parameter.shape)
        if first < last:
            part = nn.Parameter(weights[start + first : start + last])
            part.grad = gradients[start + first : start + last]
            bucket.trained.append(TrainedPart(one, part, (first, last)))
        start = end
    middle = min(max(bucket.undivided, own[0]), own[1])
    bucket.norm_terms = [
        (gradients[own[0] : middle], bucket.own.of),
        (gradients[middle : own[1]], 1),
    ]


def _members(bucket: FlatBucket) -> tuple[int, int]:
    """Returns the number of ranks that divide a bucket, and this rank's place among them."""
    group = bucket.members[None].group
    return group.size(), group.rank()


def _share(bucket: FlatBucket, flat: Tensor) -> Tensor:
    """Returns this rank's slice of a flat tensor of a bucket."""
    count, rank = _members(bucket)
    return flat.chunk(count)[rank]


def start_scatter(bucket: FlatBucket, i: Instruction) -> tuple[dist.Work, Callable[[], None]]:
    """Starts the sum of a bucket's gradients; this rank's share is valid afterwards."""
    group = bucket.members[i.tile].group
    if bucket.buffer.is_cuda:
        own = _share(bucket, bucket.buffer)
        work = _reduce_scatter(own, bucket.buffer, group=group, async_op=True)
    else:  # gloo's own reduce-scatter is an all-reduce with a copy
        work = dist.all_reduce(bucket.buffer, group=group, async_op=True)
    assert work is not None
    return work, lambda: None


def bind_gather(interpreter: Interpreter, i: Instruction) -> BoundInstruction:
    """Binds the all-gather of a bucket's updated weights, which the end of the step waits for."""
    bucket = interpreter.own.reducer.buckets[i.layers, i.tied]
    first = bucket.local_parameters[0].parameter
    whole = first.data.as_strided((bucket.buffer.numel(),), (1,), first.storage_offset())
    group = bucket.members[i.tile].group

    def run(_: Step) -> None:
        own = _share(bucket, whole)
        own = own if whole.is_cuda else own.clone()
        work = _all_gather(whole, own, group=group, async_op=True)
        assert work is not None
        interpreter.posted_last.append(interpreter.posted(i, [work]))

    return run


STARTS = {REDUCE_SCATTER: start_scatter}
HANDLERS = {GATHER_PARAMETERS: bind_gather}
