"""One direction of a stage's boundary: posts the messages that a cut needs, and waits for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from meshwright.program.instructions import SENDS, Instruction
from meshwright.runtime.build import Crossing
from meshwright.runtime.debug import Headers


class Handle(Protocol):
    """Something under way."""

    def done(self) -> bool:
        """Whether it has arrived already."""

    def wait(self) -> object:
        """Returns when it has arrived; raises if it never will."""


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
        chains: Mapping[tuple[int, ...], ProcessGroup] | None = None,
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
        """Groups for broadcasts, by their source and all who receive them."""
        self.replica = replica
        """Tensor ranks that put parts together."""
        self.lane = lane
        """Number of the cut, among how many: what crosses several between two ranks stays apart."""
        self.headers = Headers(device) if debug else None
        self._buffers: dict[int, list[Tensor]] = {}
        self._summands: dict[int, list[tuple[int, Tensor]]] = {}
        self._parts: dict[int, dict[tuple[int, int], list[tuple[Tensor, Tensor]]]] = {}
        """By micro-batch and rows: what arrives in parts, and where it is laid flat."""
        self._arriving: dict[int, list[tuple[Instruction, Handle]]] = {}
        self._leaving: deque[tuple[Instruction, Handle]] = deque()
        self.waiting: Instruction | None = None
        """What is waited for at this moment."""

    def signature(self) -> list[str]:
        """What both sides must agree on: name, shape of one row, type."""
        return [
            f"{t.name} {t.shape[1:] if t.by_rows else t.shape} {t.dtype} {t.by_rows}"
            for t in self.tensors
        ]

    def post_receive(self, i: Instruction) -> list[Work]:
        """Starts a receive; the caller hands back what to wait for by `expect`."""
        assert i.micro_batch is not None
        assert i.rows is not None
        assert i.peer is not None
        if i.micro_batch not in self._buffers:
            empty = [torch.empty(t.shape, dtype=t.dtype, device=self.device) for t in self.tensors]
            self._buffers[i.micro_batch] = empty
        if i.part is None:
            return self._works(dist.irecv, i, self._places(i))
        parts = self._parts.setdefault(i.micro_batch, {})
        if i.rows not in parts:
            parts[i.rows] = [(place, laid_flat(place, i.part[2])) for place in self._places(i)]
        into = [part_of(flat, place.numel(), i.part) for place, flat in parts[i.rows]]
        return self._works(dist.irecv, i, into)

    def _places(self, i: Instruction) -> list[Tensor]:
        """Where the tensors of some rows belong."""
        assert i.micro_batch is not None
        assert i.rows is not None
        if i.rows == (self.first, self.last):
            return self._buffers[i.micro_batch]
        places = []
        for k, (tensor, buffer) in enumerate(
            zip(self.tensors, self._buffers[i.micro_batch], strict=True)
        ):
            place = buffer
            if tensor.by_rows:
                place = buffer[i.rows[0] - self.first : i.rows[1] - self.first]
            elif self.backward and i.rows[0] != self.first:
                place = torch.empty_like(buffer)
                self._summands.setdefault(i.micro_batch, []).append((k, place))
            places.append(place)
        return places

    def expect(self, i: Instruction, handle: Handle) -> None:
        """A receive that was posted, for `receive` to wait for."""
        assert i.micro_batch is not None
        self._arriving.setdefault(i.micro_batch, []).append((i, handle))

    def gather(self, i: Instruction) -> None:
        """Completes rows of which each tensor rank has received a part."""
        assert i.micro_batch is not None
        assert i.rows is not None
        self._wait_for(i.micro_batch)
        for _, flat in self._parts[i.micro_batch][i.rows]:
            pieces = list(flat.chunk(len(i.ranks)))
            dist.all_gather(pieces, pieces[i.ranks.index(dist.get_rank())], group=self.replica)

    def _wait_for(self, micro_batch: int) -> None:
        for i, handle in self._arriving.pop(micro_batch, ()):
            self._wait(i, handle)

    def receive(self, micro_batch: int) -> list[Tensor]:
        """The tensors of a micro-batch, once they are here."""
        self._wait_for(micro_batch)
        for parts in self._parts.pop(micro_batch, {}).values():
            for place, flat in parts:
                if flat.data_ptr() != place.data_ptr():
                    place.copy_(flat[: place.numel()].view_as(place))
        tensors = self._buffers.pop(micro_batch, [])
        for k, summand in self._summands.pop(micro_batch, ()):
            tensors[k] += summand
        return tensors

    def post_send(self, i: Instruction, values: Sequence[Tensor | None]) -> list[Work]:
        """Starts a send of a micro-batch's rows; an absent gradient travels as zeros."""
        assert i.micro_batch is not None
        assert i.rows is not None
        assert i.peer is not None
        leaving = []
        for tensor, value in zip(self.tensors, values, strict=True):
            if tensor.by_rows:
                shape = (i.rows[1] - i.rows[0], *tensor.shape[1:])
                part = value
                if value is not None and i.rows != (self.first, self.last):
                    part = value[i.rows[0] - self.first : i.rows[1] - self.first]
            else:
                shape = tensor.shape
                part = None if self.backward and i.rows[0] != self.first else value
            if part is None:
                part = torch.zeros(shape, dtype=tensor.dtype, device=self.device)
            part = part.detach().contiguous()
            assert (part.shape, part.dtype) == (shape, tensor.dtype), tensor
            if i.part is not None:
                part = part_of(part.view(-1), part.numel(), i.part)
            leaving.append(part)
        return self._works(dist.isend, i, leaving)

    def sent(self, i: Instruction, handle: Handle) -> None:
        """Keeps what is under way; lets go of what has arrived, or must have by now."""
        assert i.micro_batch is not None
        self._leaving.append((i, handle))
        while self._leaving:
            first, earlier = self._leaving[0]
            assert first.micro_batch is not None
            if first.micro_batch > i.micro_batch - self.window and not earlier.done():
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

    def _works(
        self, start: Callable[..., Work | None], i: Instruction, tensors: Sequence[Tensor]
    ) -> list[Work]:
        if i.ranks:
            return self._broadcast(i, tensors)
        assert i.micro_batch is not None

        def post(message: Tensor, tag: int) -> Work:
            work = start(message, i.peer, group=self.group, tag=tag)
            assert work is not None, "a peer outside the group"
            return work

        works = []
        for k, tensor in enumerate(tensors):
            # A tensor of fewer numbers than parts: nothing is left for the last ones.
            if not tensor.numel():
                continue
            tag = (i.micro_batch * len(self.tensors) + k) * self.lane[1] + self.lane[0]
            if self.headers is None:
                works.append(post(tensor, tag))
            elif i.op in SENDS:
                works += self.headers.send(i, k, tensor, tag, post)
            else:
                works.append(self.headers.receive(i, k, tensor, tag, post))
        return works

    def _broadcast(self, i: Instruction, tensors: Sequence[Tensor]) -> list[Work]:
        """The source takes part once, with the first of its sends."""
        if i.op in SENDS and i.peer != i.ranks[1]:
            return []
        group = self.chains[i.ranks]

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
