"""All-reduces gradients in flat buckets, each as soon as a backward completes it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import cast

import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from meshwright.layout.shares import UNDIVIDED, Share
from meshwright.program.instructions import GradientKey, Instruction
from meshwright.program.operations import Op
from meshwright.runtime.flat_buckets import FlatBucket, gather_tile, scatter_tile
from meshwright.runtime.handles import Handle
from meshwright.techniques import provided
from meshwright.techniques.data_parallel.operations import REDUCE_GRAD


@dataclass(slots=True)
class _PendingReduction:
    """Holds an all-reduce in flight."""

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
    """Returns how each operation that sums gradients is started, those of the techniques
    included."""
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
