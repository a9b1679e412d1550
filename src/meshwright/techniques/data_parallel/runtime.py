"""All-reduces gradients in flat buckets, each as soon as a backward completes it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.hooks import RemovableHandle

from meshwright.layout.boxes import Range
from meshwright.layout.shares import UNDIVIDED, Share
from meshwright.layout.tiles import Tile, shape_of, within
from meshwright.program.instructions import GradientKey, Instruction
from meshwright.program.operations import Op
from meshwright.runtime.build_stages import LocalParameter
from meshwright.runtime.parameters import sums_gradient
from meshwright.techniques import provided
from meshwright.techniques.data_parallel.operations import REDUCE_GRAD
from meshwright.techniques.pipeline_parallel.runtime import Handle
from meshwright.techniques.tensor_parallel.runtime import read_slices, write_slices

UNSHARED: GradientKey = (None, None)
"""Key of the gradients that this rank does not share with others."""


@dataclass(slots=True)
class SumGroup:
    """The ranks that sum a tensor together."""

    group: ProcessGroup
    size: int


@dataclass(slots=True)
class TrainedPart:
    """What the optimizer of this rank updates of one parameter."""

    of: LocalParameter
    parameter: nn.Parameter
    """The rank's tile of it, or a flat part of that."""
    span: Range
    """The elements of the tile, counted in row-major order."""


@dataclass(slots=True, eq=False)
class FlatBucket:
    """Gradients that are summed together: every `parameter.grad` is a view of `buffer`."""

    local_parameters: list[LocalParameter]
    buffer: Tensor
    undivided: int
    """Number of elements at the front that every tensor-parallel rank holds; the rest is divided
    among them."""
    own: Share
    """This rank's share of the divided parameters."""
    members: dict[Share | None, SumGroup]
    """The ranks that sum each share, keyed as in their instructions; empty if no other rank shares
    these gradients."""
    pending: set[str] = field(default_factory=set)
    """Names of the parameters whose gradients are not complete."""
    completing: bool = False
    """True if the last backward that adds to these gradients has begun."""
    queued: list[Instruction] = field(default_factory=list)
    """The all-reduces to be started when the gradients are complete."""
    with_gradient: set[str] = field(default_factory=set)
    """Names of the parameters that have received a gradient so far."""
    trained: list[TrainedPart] = field(init=False)
    """What the optimizer of this rank updates: its parameters, or its share of them."""
    norm_terms: list[tuple[Tensor, int]] = field(init=False)
    """The summed gradients that this rank adds to the norm, each with the number of ranks that do
    so."""
    _tiles: dict[Share, list[tuple[int, Tile]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.trained = [
            TrainedPart(one, one.parameter, (0, one.parameter.numel()))
            for one in self.local_parameters
        ]
        parts = self.buffer[: self.undivided], self.buffer[self.undivided :]
        self.norm_terms = [*zip(parts, self.copies, strict=True)]

    @property
    def copies(self) -> tuple[int, int]:
        """(Number of ranks that hold each undivided element, number that hold each divided one)."""
        if not self.members or None in self.members:
            replicas = self.members[None].size if self.members else 1
            return replicas * self.own.of, replicas
        sizes = {share == UNDIVIDED: members.size for share, members in self.members.items()}
        return sizes.get(True, 1), sizes.get(False, 1)

    def tiles(self, share: Share) -> Sequence[tuple[int, Tile]]:
        """Lists where a share lies: the index of a parameter, and a tile of what this rank holds of
        it."""
        if share not in self._tiles:
            self._tiles[share] = [
                (index, within(one.tile, one.of.tile(share)))
                for index, one in enumerate(self.local_parameters)
                if (one.of.split is None) == (share == UNDIVIDED)
            ]
        return self._tiles[share]


def group_parameters(
    held: Sequence[LocalParameter], reductions: Sequence[Instruction]
) -> dict[GradientKey, list[LocalParameter]]:
    """Assigns each of a rank's trainable parameters to the instruction that reduces its
    gradient."""
    groups: dict[GradientKey, list[LocalParameter]] = {(i.layers, i.tied): [] for i in reductions}
    for one in held:
        if not one.parameter.requires_grad:
            continue
        keys = [(i.layers, i.tied) for i in reductions if sums_gradient(i, one.of)]
        groups.setdefault(keys[0] if keys else UNSHARED, []).append(one)
    return groups


def make_bucket(
    held: Sequence[LocalParameter], own: Share, members: dict[Share | None, SumGroup]
) -> FlatBucket:
    """Lays out the gradients of some parameters in one buffer, those of undivided parameters
    first."""
    ordered = sorted(held, key=lambda one: one.of.split is not None)
    parameters = [one.parameter for one in ordered]
    total = sum(p.numel() for p in parameters)
    buffer = torch.zeros(total, dtype=parameters[0].dtype, device=parameters[0].device)
    start = 0
    for parameter in parameters:
        view = buffer[start : start + parameter.numel()]
        parameter.grad = view.view(parameter.shape)
        start += parameter.numel()
    undivided = sum(one.parameter.numel() for one in ordered if one.of.split is None)
    return FlatBucket(
        local_parameters=ordered, buffer=buffer, undivided=undivided, own=own, members=members
    )


def gather_tile(bucket: FlatBucket, share: Share, tensors: Sequence[Tensor]) -> Tensor:
    """Copies one share of each of the bucket's parameters (or of `tensors` like them) into a flat
    tensor, in the order in which a rank that has only this share holds it."""
    return torch.cat([read_slices(tensors[k], tile).flatten() for k, tile in bucket.tiles(share)])


def scatter_tile(bucket: FlatBucket, share: Share, flat: Tensor, tensors: Sequence[Tensor]) -> None:
    """Writes a share back to where `gather_tile` has taken it from."""
    start = 0
    for k, tile in bucket.tiles(share):
        shape = shape_of(tile)
        end = start + prod(shape)
        write_slices(tensors[k], tile, flat[start:end].view(shape))
        start = end


@dataclass(slots=True)
class _PendingReduction:
    """An all-reduce in flight."""

    bucket: FlatBucket
    handle: Handle
    put_back: Callable[[], None]
    """Called after it has ended; writes the sum to the gradients, if it was made in a copy."""


class Reducer:
    """Starts the queued all-reduces in the program's order, each when its gradients are
    complete."""

    def __init__(
        self,
        buckets: dict[GradientKey, FlatBucket],
        launched: Callable[[Instruction, list[dist.Work]], Handle],
        posting: Callable[[], None],
    ) -> None:
        self.buckets = buckets
        self._launched = launched
        self._posting = posting
        self._queue: deque[FlatBucket] = deque()
        self._under_way: deque[_PendingReduction] = deque()
        self._hooks: list[RemovableHandle] = [
            one.parameter.register_post_accumulate_grad_hook(_hook(self, bucket, one.name))  # type: ignore[no-untyped-call]
            for bucket in buckets.values()
            for one in bucket.local_parameters
        ]

    def close(self) -> None:
        """Removes the hooks from the parameters.

        They form a reference cycle through autograd that Python's garbage collector cannot see: an
        engine, its groups and their threads would never be freed.
        """
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def zero(self) -> None:
        """Sets all gradients to zero, at the start of a step."""
        for bucket in self.buckets.values():
            bucket.buffer.zero_()

    def queue(self, instruction: Instruction) -> None:
        """Queues an all-reduce, to be started when its gradients are complete; the order of these
        calls is kept."""
        bucket = self.buckets[instruction.layers, instruction.tied]
        if not bucket.queued:
            bucket.pending = {one.name for one in bucket.local_parameters}
            self._queue.append(bucket)
        bucket.queued.append(instruction)

    def begin(self, completed: Sequence[GradientKey], settled: Sequence[nn.Parameter] = ()) -> None:
        """Notes that the last backward which adds to these buckets begins; the gradients of
        `settled` parameters are complete already."""
        done = {id(parameter) for parameter in settled}
        for key in completed:
            bucket = self.buckets[key]
            bucket.completing = True
            bucket.pending -= {
                one.name for one in bucket.local_parameters if id(one.parameter) in done
            }
        self._advance()

    def end(self, completed: Sequence[GradientKey]) -> None:
        """Notes that this backward has ended: gradients that have not come are zero."""
        for key in completed:
            self.buckets[key].pending.clear()
        self._advance()

    def accumulated(self, bucket: FlatBucket, name: str) -> None:
        """Notes that a backward has added to a parameter's gradient."""
        bucket.with_gradient.add(name)
        if bucket.completing:
            bucket.pending.discard(name)
            if not bucket.pending:
                self._advance()

    def _advance(self) -> None:
        """Starts the all-reduces at the head of the queue, as far as their gradients are
        complete."""
        while self._queue and self._queue[0].completing and not self._queue[0].pending:
            bucket = self._queue.popleft()
            bucket.completing = False
            self._launch(bucket)

    def finish(self, buckets: Sequence[FlatBucket]) -> None:
        """Waits for the all-reduces of some buckets, and for all that began earlier."""
        last = max(
            (n for n, each in enumerate(self._under_way) if each.bucket in buckets), default=-1
        )
        for _ in range(last + 1):
            self._end(self._under_way.popleft())

    def _end(self, first: _PendingReduction) -> None:
        first.handle.wait()
        first.put_back()

    def missing(self) -> list[str]:
        """Returns the names of trainable parameters that have received no gradient so far."""
        buckets = self.buckets.values()
        return [
            one.name
            for b in buckets
            for one in b.local_parameters
            if one.name not in b.with_gradient
        ]

    def _launch(self, bucket: FlatBucket) -> None:
        self._put_back_what_is_done()
        self._posting()
        for instruction in bucket.queued:
            work, put_back = reduction_starts()[instruction.op](bucket, instruction)
            handle = self._launched(instruction, [work])
            self._under_way.append(_PendingReduction(bucket, handle, put_back))
        bucket.queued.clear()

    def _put_back_what_is_done(self) -> None:
        """Writes finished sums back, so that copies do not pile up until the end of the step."""
        while self._under_way and self._under_way[0].handle.is_completed():
            self._end(self._under_way.popleft())


StartReduction = Callable[[FlatBucket, Instruction], tuple[dist.Work, Callable[[], None]]]
"""Starts the collective that sums a bucket's gradients; what to call when that has ended comes
second."""


@cache
def reduction_starts() -> dict[Op, StartReduction]:
    """How each operation that sums gradients is started, those of the techniques included."""
    return {op: start for starts in provided("runtime", "STARTS") for op, start in starts.items()}


def _all_reduce(
    bucket: FlatBucket, instruction: Instruction
) -> tuple[dist.Work, Callable[[], None]]:
    summand, put_back = _summand(bucket, instruction.tile)
    group = bucket.members[instruction.tile].group
    work = dist.all_reduce(summand, group=group, async_op=True)
    assert work is not None
    return work, put_back


def _summand(bucket: FlatBucket, share: Share | None) -> tuple[Tensor, Callable[[], None]]:
    """Returns the tensor that a rank gives to an all-reduce, and what to call when that has ended.

    Only ranks with several shares (those of replicas with a smaller tensor width) copy: a share
    lies scattered in their gradients.
    """
    if share is None:
        return bucket.buffer, _nothing
    if share == UNDIVIDED:
        return bucket.buffer[: bucket.undivided].div_(bucket.own.of), _nothing
    if sum(each != UNDIVIDED for each in bucket.members) == 1:
        return bucket.buffer[bucket.undivided :], _nothing
    gradients = [cast("Tensor", one.parameter.grad) for one in bucket.local_parameters]
    flat = gather_tile(bucket, share, gradients)
    return flat, lambda: scatter_tile(bucket, share, flat, gradients)


def _nothing() -> None:
    pass


def _hook(reducer: Reducer, bucket: FlatBucket, name: str) -> Callable[[nn.Parameter], None]:
    return lambda _: reducer.accumulated(bucket, name)


STARTS: dict[Op, StartReduction] = {REDUCE_GRAD: _all_reduce}
