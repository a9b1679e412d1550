"""Gradients in flat buffers, each summed over its holders as soon as a backward completes it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from meshwright.program.instructions import Instruction
from meshwright.runtime.boundary import Handle
from meshwright.runtime.build import Held

Key = tuple[tuple[int, int] | None, str | None]
"""Layers or tied parameter, as in the instruction that reduces them."""

OWN: Key = (None, None)
"""Gradients that this rank alone makes."""


@dataclass(slots=True)
class FlatBucket:
    """Gradients that are reduced together: every `parameter.grad` is a view of `buffer`."""

    held: list[Held]
    buffer: Tensor
    replicated: int
    """Numbers at the front that every tensor rank holds alike; the rest is divided."""
    group: ProcessGroup | None
    holders: int
    """Ranks that hold the same slices."""
    pending: set[str] = field(default_factory=set)
    """Parameters whose gradients are not complete."""
    completing: bool = False
    """The last backward that adds to them has begun."""
    instruction: Instruction | None = None
    with_gradient: set[str] = field(default_factory=set)
    """Parameters that have had a gradient."""


def group_parameters(
    held: Sequence[Held], reductions: Sequence[Instruction], tied: frozenset[str]
) -> dict[Key, list[Held]]:
    """Which instruction reduces which of a rank's trainable parameters."""
    groups: dict[Key, list[Held]] = {(i.layers, i.tied): [] for i in reductions}
    for one in held:
        if not one.parameter.requires_grad:
            continue
        keys = [
            (i.layers, i.tied)
            for i in reductions
            if (i.tied == one.name if one.name in tied else _within(one, i.layers))
        ]
        groups.setdefault(keys[0] if keys else OWN, []).append(one)
    return groups


def _within(one: Held, layers: tuple[int, int] | None) -> bool:
    return layers is not None and layers[0] <= one.layers[0] < layers[1]


def make_bucket(
    held: Sequence[Held], group: ProcessGroup | None = None, holders: int = 1
) -> FlatBucket:
    """Lays out the gradients of some parameters, those that are not divided first."""
    ordered = sorted(held, key=lambda one: one.divided)
    parameters = [one.parameter for one in ordered]
    total = sum(p.numel() for p in parameters)
    buffer = torch.zeros(total, dtype=parameters[0].dtype, device=parameters[0].device)
    start = 0
    for parameter in parameters:
        view = buffer[start : start + parameter.numel()]
        parameter.grad = view.view(parameter.shape)
        start += parameter.numel()
    return FlatBucket(
        held=ordered,
        buffer=buffer,
        replicated=sum(one.parameter.numel() for one in ordered if not one.divided),
        group=group,
        holders=holders,
    )


class Reducer:
    """Starts the armed reductions in the program's order, each when its gradients are complete."""

    def __init__(
        self,
        buckets: dict[Key, FlatBucket],
        launched: Callable[[Instruction, list[dist.Work]], Handle],
        catch_up: Callable[[], None],
    ) -> None:
        self.buckets = buckets
        self._launched = launched
        self._catch_up = catch_up
        self._queue: deque[FlatBucket] = deque()
        self._under_way: list[Handle] = []
        for bucket in buckets.values():
            for one in bucket.held:
                hook = _hook(self, bucket, one.name)
                one.parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def zero(self) -> None:
        """Starts a step: all gradients zero."""
        for bucket in self.buckets.values():
            bucket.buffer.zero_()

    def arm(self, instruction: Instruction) -> None:
        """Sum these gradients as soon as they are complete, in the order of these calls."""
        bucket = self.buckets[instruction.layers, instruction.tied]
        bucket.pending = {one.name for one in bucket.held}
        bucket.instruction = instruction
        self._queue.append(bucket)

    def begin(self, completed: Sequence[Key], settled: Sequence[nn.Parameter] = ()) -> None:
        """A backward begins that is the last to bring these buckets gradients; `settled` have all
        of theirs already."""
        done = {id(parameter) for parameter in settled}
        for key in completed:
            bucket = self.buckets[key]
            bucket.completing = True
            bucket.pending -= {one.name for one in bucket.held if id(one.parameter) in done}
        self._advance()

    def end(self, completed: Sequence[Key]) -> None:
        """It has ended: gradients that never came are zero."""
        for key in completed:
            self.buckets[key].pending.clear()
        self._advance()

    def accumulated(self, bucket: FlatBucket, name: str) -> None:
        """A parameter has got its gradient of a backward."""
        bucket.with_gradient.add(name)
        if bucket.completing:
            bucket.pending.discard(name)
            if not bucket.pending:
                self._advance()

    def _advance(self) -> None:
        """Starts every reduction at the head of the queue that is complete."""
        while self._queue and self._queue[0].completing and not self._queue[0].pending:
            bucket = self._queue.popleft()
            bucket.completing = False
            self._launch(bucket)

    def finish(self) -> None:
        """Waits for all sums."""
        for handle in self._under_way:
            handle.wait()
        self._under_way.clear()

    def missing(self) -> list[str]:
        """Trainable parameters that have had no gradient so far."""
        buckets = self.buckets.values()
        return [one.name for b in buckets for one in b.held if one.name not in b.with_gradient]

    def _launch(self, bucket: FlatBucket) -> None:
        assert bucket.instruction is not None
        assert bucket.group is not None
        self._catch_up()
        work = dist.all_reduce(bucket.buffer, group=bucket.group, async_op=True)
        assert work is not None
        self._under_way.append(self._launched(bucket.instruction, [work]))


def _hook(reducer: Reducer, bucket: FlatBucket, name: str) -> Callable[[nn.Parameter], None]:
    return lambda _: reducer.accumulated(bucket, name)
