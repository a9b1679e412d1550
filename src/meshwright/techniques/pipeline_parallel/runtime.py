"""Sends and receives the tensors of one stage boundary, in one direction.

Everything that an instruction determines (peer, tags, slices of rows) is looked up once, when it is
bound; only the tensors differ from step to step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from meshwright.layout.shares import Share
from meshwright.program.instructions import Instruction
from meshwright.program.messages import Chain, chain_of
from meshwright.runtime.build_stages import BoundaryTensor
from meshwright.runtime.debug import MessageHeaders
from meshwright.runtime.handles import Handle

Post = Callable[[Sequence[Tensor]], list[Work]]
"""Function that starts the messages of one instruction, one message for each tensor."""


@dataclass(slots=True)
class _Arrival:
    """Holds the receive buffers of one micro-batch, and the receives in flight."""

    tensors: list[Tensor]
    """The buffers, one for each tensor of the boundary."""
    under_way: list[tuple[Instruction, Handle]] = field(default_factory=list)
    """Receives that have been posted, with their instructions."""
    summands: list[tuple[int, Tensor]] = field(default_factory=list)
    """Further gradients to be added up: (index of the tensor, gradient)."""
    parts: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    """(destination, flat receive buffer) of each tensor, for rows that arrive in pieces; keyed by
    the rows [first, last)."""


class BoundaryMessages:
    """Sends or receives the tensors that this rank exchanges across one stage boundary, in one
    direction.

    Each tensor is a message of its own, in the order of `tensors`. Tensors with rows travel as
    slices of rows, others (such as a mask) whole. The producers of a whole tensor sum the gradients
    that they receive for it; so that each gradient counts once, a consumer with several producers
    sends its gradient to the first of them and zeros to the rest.
    """

    def __init__(  # noqa: PLR0913 - all that a direction is made of
        self,
        tensors: Sequence[BoundaryTensor],
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
        """Number of micro-batches whose sends may be in flight at once."""
        self.chains = chains or {}
        """Process groups for tensors that are broadcast instead of sent, by chain of ranks."""
        self.replica = replica
        """Process group of the tensor-parallel ranks that all-gather pieces of a tensor."""
        self.lane = lane
        """(Number of the boundary, number of boundaries): part of each message's tag, which keeps
        several boundaries between the same two ranks apart."""
        self.headers = MessageHeaders(device) if debug else None
        self._arrivals: dict[int, _Arrival] = {}
        """Receives of each micro-batch."""
        self._leaving: deque[tuple[Instruction, Handle]] = deque()
        self.waiting: Instruction | None = None
        """The instruction whose message is being waited for, if any."""

    def signature(self) -> list[str]:
        """Describes every tensor by what both sides must agree on: name, shape of one row,
        dtype."""
        return [
            f"{t.name} {t.shape[1:] if t.by_rows else t.shape} {t.dtype} {t.by_rows}"
            for t in self.tensors
        ]

    def receiver(self, i: Instruction) -> Callable[[], list[Work]]:
        """Returns a function that starts a receive; the caller passes the resulting handle to
        `expect`."""
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
                arrival.parts[rows] = [(place, flat_buffer(place, part.of)) for place in places]
            flats = arrival.parts[rows]
            return post([flat_part(flat, place.numel(), part) for place, flat in flats])

        return start

    def _places(self, arrival: _Arrival, rows: tuple[int, int]) -> list[Tensor]:
        """Returns for each tensor the buffer into which these rows of it are received."""
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
        """Keeps the handle of a posted receive, which `receive` or `gather` will wait for."""
        assert i.micro_batch is not None
        self._arrivals[i.micro_batch].under_way.append((i, handle))

    def gather(self, i: Instruction) -> None:
        """All-gathers rows of which each tensor-parallel rank has received a piece."""
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
        """Waits for the tensors of a micro-batch and returns them; [] if none were expected."""
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
        """Returns a function that starts the send of a micro-batch's rows; a gradient that is None
        is sent as zeros."""
        parts = [self._part_of(tensor, i) for tensor in self.tensors]
        post = self._post(dist.isend, i)

        def start(values: Sequence[Tensor | None]) -> list[Work]:
            return post([part(value) for part, value in zip(parts, values, strict=True)])

        return start

    def _part_of(self, tensor: BoundaryTensor, i: Instruction) -> Callable[[Tensor | None], Tensor]:
        """Returns a function from a whole tensor to the slice of it that a send transfers."""
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
            return found if i.part is None else flat_part(found.view(-1), found.numel(), i.part)

        return part

    def sent(self, i: Instruction, handle: Handle) -> None:
        """Keeps the handle of a send in flight. Releases earlier sends that have completed, and
        waits for those that are `window` or more micro-batches older."""
        assert i.micro_batch is not None
        self._leaving.append((i, handle))
        while self._leaving:
            first, earlier = self._leaving[0]
            assert first.micro_batch is not None
            if first.micro_batch > i.micro_batch - self.window and not earlier.is_completed():
                return
            self._wait(*self._leaving.popleft())

    def finish(self) -> None:
        """Waits until all sends have completed."""
        while self._leaving:
            self._wait(*self._leaving.popleft())

    def _wait(self, i: Instruction, handle: Handle) -> None:
        self.waiting = i
        handle.wait()
        self.waiting = None

    def _post(self, start: Callable[..., Any], i: Instruction) -> Post:
        """Returns a function that starts the messages of a send or receive."""
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
            # A tensor with fewer elements than pieces leaves the last ones empty: not sent.
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
        """Starts the broadcasts of a chain. Its source joins only at the first of its sends; the
        others start nothing."""
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


def flat_buffer(place: Tensor, of: int) -> Tensor:
    """Returns a flat buffer for `of` pieces of equal length that hold `place`: a view of `place` if
    they fill it exactly, else a new tensor with room to spare."""
    length = -(-place.numel() // of)
    if length * of == place.numel():
        return place.view(-1)
    return torch.empty(length * of, dtype=place.dtype, device=place.device)


def flat_part(flat: Tensor, size: int, part: Share) -> Tensor:
    """Returns some of the equal pieces into which the first `size` elements of a flat tensor are
    divided; the last pieces may be shorter or empty.

    With `size` 10 and the second of 4 pieces, each piece has 3 elements, and elements [3, 6) are
    returned.
    """
    length = -(-size // part.of)
    return flat[min(part.first * length, size) : min(part.last * length, size)]
