"""One direction of a stage's boundary: posts the messages that a cut needs, and waits for them.

What an instruction says is looked up once, when it is bound; in a step its tensors alone are new.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from meshwright.program.instructions import Instruction
from meshwright.program.messages import Chain, chain_of
from meshwright.runtime.build import Crossing
from meshwright.runtime.debug import Headers


class Handle(Protocol):
    """Something under way, as torch.distributed's Work."""

    def is_completed(self) -> bool:
        """Whether it has arrived already."""

    def wait(self) -> object:
        """Returns when it has arrived; raises if it never will."""


Post = Callable[[Sequence[Tensor]], list[Work]]
"""Starts the messages of one instruction, a tensor each."""


@dataclass(slots=True)
class _Arrival:
    """The tensors of a micro-batch on their way here."""

    tensors: list[Tensor]
    under_way: list[tuple[Instruction, Handle]] = field(default_factory=list)
    summands: list[tuple[int, Tensor]] = field(default_factory=list)
    """What is to be added to which tensor."""
    parts: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    """By rows: what arrives in parts, and where it is laid flat."""


class Messages:
    """Tensors that travel together between this rank and the other side of a cut, one way.

    Each tensor is a message of its own, in the order of `tensors`: row slices of those that have
    rows, the others whole. Gradients of whole tensors are summed at their maker, so that a rank
    sends its own to the first of several makers and zeros to the rest.
    """

    def __init__(  # noqa: PLR0913 - all that a direction is made of
        self,
        tensors: Sequence[Crossing],
        rows: tuple[int, int],
        group: ProcessGroup,
        device: torch.device,
        *,
        backward: bool,
        window: int,
        chains: Mapping[Chain, ProcessGroup] | None = None,
        replica: ProcessGroup | None = None,
        lane: tuple[int, int],
        debug: bool = False,
    ) -> None:
        self.tensors = [t for t in tensors if t.gradient] if backward else list(tensors)
        self.first, self.last = rows
        self.group = group
        self.device = device
        self.backward = backward
        self.window = window
        """Micro-batches whose sends may be under way at once."""
        self.chains = chains or {}
        """Groups for broadcasts."""
        self.replica = replica
        """Tensor ranks that put parts together."""
        self.lane = lane
        """Number of the cut, among how many: what crosses several between two ranks stays apart."""
        self.headers = Headers(device) if debug else None
        self._arrivals: dict[int, _Arrival] = {}
        """By micro-batch."""
        self._leaving: deque[tuple[Instruction, Handle]] = deque()
        self.waiting: Instruction | None = None
        """What is waited for at this moment."""

    def signature(self) -> list[str]:
        """What both sides must agree on: name, shape of one row, type."""
        return [
            f"{t.name} {t.shape[1:] if t.by_rows else t.shape} {t.dtype} {t.by_rows}"
            for t in self.tensors
        ]

    def receiver(self, i: Instruction) -> Callable[[], list[Work]]:
        """What starts a receive; the caller hands back what to wait for by `expect`."""
        micro_batch, rows, part = i.micro_batch, i.rows, i.part
        assert micro_batch is not None
        assert rows is not None
        post = self._post(dist.irecv, i)
        arrivals = self._arrivals
        sizes = [(t.shape, t.dtype) for t in self.tensors]
        whole = rows == (self.first, self.last)

        def start() -> list[Work]:
            arrival = arrivals.get(micro_batch)
            if arrival is None:
                empty = [torch.empty(s, dtype=dtype, device=self.device) for s, dtype in sizes]
                arrival = arrivals[micro_batch] = _Arrival(empty)
            places = arrival.tensors if whole else self._places(arrival, rows)
            if part is None:
                return post(places)
            if rows not in arrival.parts:
                arrival.parts[rows] = [(place, laid_flat(place, part[2])) for place in places]
            flats = arrival.parts[rows]
            return post([part_of(flat, place.numel(), part) for place, flat in flats])

        return start

    def _places(self, arrival: _Arrival, rows: tuple[int, int]) -> list[Tensor]:
        """Where the tensors of some rows belong."""
        places = []
        for k, (tensor, buffer) in enumerate(zip(self.tensors, arrival.tensors, strict=True)):
            place = buffer
            if tensor.by_rows:
                place = buffer[rows[0] - self.first : rows[1] - self.first]
            elif self.backward and rows[0] != self.first:
                place = torch.empty_like(buffer)
                arrival.summands.append((k, place))
            places.append(place)
        return places

    def expect(self, i: Instruction, handle: Handle) -> None:
        """A receive that was posted, for `receive` to wait for."""
        assert i.micro_batch is not None
        self._arrivals[i.micro_batch].under_way.append((i, handle))

    def gather(self, i: Instruction) -> None:
        """Completes rows of which each tensor rank has received a part."""
        assert i.micro_batch is not None
        assert i.rows is not None
        arrival = self._arrivals[i.micro_batch]
        self._wait_for(arrival)
        for _, flat in arrival.parts[i.rows]:
            pieces = list(flat.chunk(len(i.ranks)))
            dist.all_gather(pieces, pieces[i.ranks.index(dist.get_rank())], group=self.replica)

    def _wait_for(self, arrival: _Arrival) -> None:
        for i, handle in arrival.under_way:
            self._wait(i, handle)
        arrival.under_way.clear()

    def receive(self, micro_batch: int) -> list[Tensor]:
        """The tensors of a micro-batch, once they are here."""
        arrival = self._arrivals.pop(micro_batch, None)
        if arrival is None:
            return []
        self._wait_for(arrival)
        for parts in arrival.parts.values():
            for place, flat in parts:
                if flat.data_ptr() != place.data_ptr():
                    place.copy_(flat[: place.numel()].view_as(place))
        for k, summand in arrival.summands:
            arrival.tensors[k] += summand
        return arrival.tensors

    def sender(self, i: Instruction) -> Callable[[Sequence[Tensor | None]], list[Work]]:
        """What starts a send of a micro-batch's rows; an absent gradient travels as zeros."""
        parts = [self._part_of(tensor, i) for tensor in self.tensors]
        post = self._post(dist.isend, i)

        def start(values: Sequence[Tensor | None]) -> list[Work]:
            return post([part(value) for part, value in zip(parts, values, strict=True)])

        return start

    def _part_of(self, tensor: Crossing, i: Instruction) -> Callable[[Tensor | None], Tensor]:
        """From a whole tensor to what of it a send hands over."""
        assert i.rows is not None
        first, last = i.rows[0] - self.first, i.rows[1] - self.first
        whole = not tensor.by_rows or i.rows == (self.first, self.last)
        absent = not tensor.by_rows and self.backward and first != 0
        shape = torch.Size((last - first, *tensor.shape[1:]) if tensor.by_rows else tensor.shape)

        def part(value: Tensor | None) -> Tensor:
            if value is None or absent:
                found = torch.zeros(shape, dtype=tensor.dtype, device=self.device)
            else:
                found = (value if whole else value[first:last]).contiguous()
                if found.requires_grad:
                    found = found.detach()
            assert found.shape == shape and found.dtype is tensor.dtype, tensor  # noqa: PT018
            return found if i.part is None else part_of(found.view(-1), found.numel(), i.part)

        return part

    def sent(self, i: Instruction, handle: Handle) -> None:
        """Keeps what is under way; lets go of what has arrived, or must have by now."""
        assert i.micro_batch is not None
        self._leaving.append((i, handle))
        while self._leaving:
            first, earlier = self._leaving[0]
            assert first.micro_batch is not None
            if first.micro_batch > i.micro_batch - self.window and not earlier.is_completed():
                return
            self._wait(*self._leaving.popleft())

    def finish(self) -> None:
        """Waits until everything that was sent has left."""
        while self._leaving:
            self._wait(*self._leaving.popleft())

    def _wait(self, i: Instruction, handle: Handle) -> None:
        self.waiting = i
        handle.wait()
        self.waiting = None

    def _post(self, start: Callable[..., Any], i: Instruction) -> Post:
        """What starts the messages of a send or receive."""
        if i.ranks:
            return partial(self._broadcast, i)
        assert i.micro_batch is not None
        count, (cut, cuts) = len(self.tensors), self.lane
        tags = [(i.micro_batch * count + k) * cuts + cut for k in range(count)]
        peer, group = i.peer, self.group

        def post(message: Tensor, tag: int) -> Work:
            return cast("Work", start(message, peer, group, tag))

        def every(tensors: Sequence[Tensor]) -> list[Work]:
            named = zip(tensors, tags, strict=True)
            # A tensor of fewer numbers than parts: nothing is left for the last ones.
            return [post(tensor, tag) for tensor, tag in named if i.part is None or tensor.numel()]

        def headed(tensors: Sequence[Tensor]) -> list[Work]:
            assert self.headers is not None
            works = []
            for k, (tensor, tag) in enumerate(zip(tensors, tags, strict=True)):
                if tensor.numel() and i.op.kind == "send":
                    works += self.headers.send(i, k, tensor, tag, post)
                elif tensor.numel():
                    works.append(self.headers.receive(i, k, tensor, tag, post))
            return works

        return every if self.headers is None else headed

    def _broadcast(self, i: Instruction, tensors: Sequence[Tensor]) -> list[Work]:
        """The source takes part once, with the first of its sends."""
        if i.op.kind == "send" and i.peer != i.ranks[1]:
            return []
        group = self.chains[chain_of(i)]

        def start(tensor: Tensor) -> Work:
            work: Work | None = dist.broadcast(tensor, i.ranks[0], group=group, async_op=True)
            assert work is not None, "a rank outside the chain"
            return work

        if self.headers is None:
            return [start(tensor) for tensor in tensors]
        return [w for k, t in enumerate(tensors) for w in self.headers.broadcast(i, k, t, start)]


def laid_flat(place: Tensor, of: int) -> Tensor:
    """Room for so many equal parts of a tensor: the tensor itself where they fill it."""
    length = -(-place.numel() // of)
    if length * of == place.numel():
        return place.view(-1)
    return torch.empty(length * of, dtype=place.dtype, device=place.device)


def part_of(flat: Tensor, size: int, part: tuple[int, int, int]) -> Tensor:
    """Pieces [first, last) of so many equal ones, of the `size` numbers that begin a flat tensor;
    the last pieces are what is left."""
    first, last, of = part
    length = -(-size // of)
    return flat[min(first * length, size) : min(last * length, size)]
