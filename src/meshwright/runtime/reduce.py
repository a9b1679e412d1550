"""Gradients in flat buffers, each summed over its holders as soon as a backward completes it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.hooks import RemovableHandle

from meshwright.errors import PlanError, Problem
from meshwright.model.shard import UNDIVIDED, Ranges, Tile, within
from meshwright.program.instructions import Instruction, Key
from meshwright.runtime.boundary import Handle
from meshwright.runtime.build import Held
from meshwright.runtime.tensor import put, take

OWN: Key = (None, None)
"""Gradients that this rank alone makes."""


@dataclass(slots=True)
class Members:
    """Those who sum something together."""

    group: ProcessGroup
    size: int


@dataclass(slots=True, eq=False)
class FlatBucket:
    """Gradients that are complete at once: every `parameter.grad` is a view of `buffer`."""

    held: list[Held]
    buffer: Tensor
    undivided: int
    """Numbers at the front that every tensor rank holds alike; the rest is divided."""
    own: Tile
    """Of what is divided, the share that this rank holds."""
    members: dict[Tile | None, Members]
    """By the tile that they sum, as in their instruction; empty: this rank is alone."""
    pending: set[str] = field(default_factory=set)
    """Parameters whose gradients are not complete."""
    completing: bool = False
    """The last backward that adds to them has begun."""
    armed: list[Instruction] = field(default_factory=list)
    with_gradient: set[str] = field(default_factory=set)
    """Parameters that have had a gradient."""

    @property
    def copies(self) -> tuple[int, int]:
        """Ranks that hold each undivided number, and each divided one."""
        if not self.members or None in self.members:
            replicas = self.members[None].size if self.members else 1
            return replicas * self.own.of, replicas
        sizes = {tile == UNDIVIDED: members.size for tile, members in self.members.items()}
        return sizes.get(True, 1), sizes.get(False, 1)


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


def make_bucket(held: Sequence[Held], own: Tile, members: dict[Tile | None, Members]) -> FlatBucket:
    """Lays out the gradients of some parameters, those that are not divided first.

    Raises PlanError if those who hold a tied parameter in unlike tensor widths do not all divide
    it.
    """
    ordered = sorted(held, key=lambda one: one.split is not None)
    parameters = [one.parameter for one in ordered]
    total = sum(p.numel() for p in parameters)
    buffer = torch.zeros(total, dtype=parameters[0].dtype, device=parameters[0].device)
    start = 0
    for parameter in parameters:
        view = buffer[start : start + parameter.numel()]
        parameter.grad = view.view(parameter.shape)
        start += parameter.numel()
    bucket = FlatBucket(
        held=ordered,
        buffer=buffer,
        undivided=sum(one.parameter.numel() for one in ordered if one.split is None),
        own=own,
        members=members,
    )
    for one in ordered if members and None not in members else ():
        if one.split is None and UNDIVIDED not in members:
            found = "a layer that does not divide it, and one that does"
            wanted = "one way for all that share it, in a plan of unlike tensor widths"
            raise PlanError(Problem(f"parameter {one.name}", "tensor_split", found, wanted))
    return bucket


def gathered(bucket: FlatBucket, tile: Tile, tensors: Sequence[Tensor]) -> Tensor:
    """A tile of each of the bucket's parameters (or of what is like them), in one flat tensor; all
    who hold the tile lay it out alike."""
    parts = []
    for index, ranges in _places(bucket, tile):
        part = tensors[index] if ranges is None else take(tensors[index], ranges)
        parts.append(part.flatten())
    return torch.cat(parts)


def scatter(bucket: FlatBucket, tile: Tile, flat: Tensor, tensors: Sequence[Tensor]) -> None:
    """The inverse of `gathered`: writes a tile back where it was taken from."""
    start = 0
    for index, ranges in _places(bucket, tile):
        tensor = tensors[index]
        shape = list(tensor.shape)
        if ranges is not None:
            shape[ranges.dim] = sum(last - first for first, last in ranges.ranges)
        part = flat[start : start + prod(shape)].view(shape)
        if ranges is None:
            tensor.copy_(part)
        else:
            put(tensor, ranges, part)
        start += prod(shape)


def _places(bucket: FlatBucket, tile: Tile) -> Iterator[tuple[int, Ranges | None]]:
    """Where a tile lies: numbers of parameters, and the slices of what this rank holds of them."""
    for index, one in enumerate(bucket.held):
        own = one.slices(bucket.own)
        if own is None and tile == UNDIVIDED:
            yield index, None
        elif own is not None and tile != UNDIVIDED:
            part = one.slices(tile)
            assert part is not None
            yield index, within(own, part)


@dataclass(slots=True)
class _UnderWay:
    """A sum that has begun."""

    of: FlatBucket
    handle: Handle
    put_back: Callable[[], None]
    """What is to be done when it has ended."""


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
        self._under_way: deque[_UnderWay] = deque()
        self._hooks: list[RemovableHandle] = [
            one.parameter.register_post_accumulate_grad_hook(_hook(self, bucket, one.name))  # type: ignore[no-untyped-call]
            for bucket in buckets.values()
            for one in bucket.held
        ]

    def close(self) -> None:
        """Leaves the parameters alone.

        Autograd holds hooks where Python does not see the circle that they close, through which
        nothing of an engine, its groups and their threads included, would ever be freed.
        """
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def zero(self) -> None:
        """Starts a step: all gradients zero."""
        for bucket in self.buckets.values():
            bucket.buffer.zero_()

    def arm(self, instruction: Instruction) -> None:
        """Sum these gradients as soon as they are complete, in the order of these calls."""
        bucket = self.buckets[instruction.layers, instruction.tied]
        if not bucket.armed:
            bucket.pending = {one.name for one in bucket.held}
            self._queue.append(bucket)
        bucket.armed.append(instruction)

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

    def finish(self, buckets: Sequence[FlatBucket]) -> None:
        """Waits for the sums of some buckets, and those that began before."""
        last = max((n for n, each in enumerate(self._under_way) if each.of in buckets), default=-1)
        for _ in range(last + 1):
            self._end(self._under_way.popleft())

    def _end(self, first: _UnderWay) -> None:
        first.handle.wait()
        first.put_back()

    def missing(self) -> list[str]:
        """Trainable parameters that have had no gradient so far."""
        buckets = self.buckets.values()
        return [one.name for b in buckets for one in b.held if one.name not in b.with_gradient]

    def _launch(self, bucket: FlatBucket) -> None:
        self._put_back_what_is_done()
        self._catch_up()
        for instruction in bucket.armed:
            summand, put_back = _summand(bucket, instruction.tile)
            group = bucket.members[instruction.tile].group
            work = dist.all_reduce(summand, group=group, async_op=True)
            assert work is not None
            handle = self._launched(instruction, [work])
            self._under_way.append(_UnderWay(bucket, handle, put_back))
        bucket.armed.clear()

    def _put_back_what_is_done(self) -> None:
        """So that copies do not pile up until the end of the step."""
        while self._under_way and self._under_way[0].handle.is_completed():
            self._end(self._under_way.popleft())


def _summand(bucket: FlatBucket, tile: Tile | None) -> tuple[Tensor, Callable[[], None]]:
    """What a rank gives to a sum, and what is to be done with it afterwards.

    Only ranks with several tiles, those of the narrower replicas, copy: a gradient is one strided
    tensor, and its tiles lie scattered in it.
    """
    if tile is None:
        return bucket.buffer, _nothing
    if tile == UNDIVIDED:
        return bucket.buffer[: bucket.undivided].div_(bucket.own.of), _nothing
    if sum(each != UNDIVIDED for each in bucket.members) == 1:
        return bucket.buffer[bucket.undivided :], _nothing
    gradients = [cast("Tensor", one.parameter.grad) for one in bucket.held]
    flat = gathered(bucket, tile, gradients)
    return flat, lambda: scatter(bucket, tile, flat, gradients)


def _nothing() -> None:
    pass


def _hook(reducer: Reducer, bucket: FlatBucket, name: str) -> Callable[[nn.Parameter], None]:
    return lambda _: reducer.accumulated(bucket, name)
