"""One direction of a stage's boundary: posts the messages that a cut needs, and waits for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from meshwright.program.instructions import Instruction
from meshwright.runtime.build import Crossing


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

    def __init__(
        self,
        tensors: Sequence[Crossing],
        rows: tuple[int, int],
        group: ProcessGroup,
        device: torch.device,
        *,
        backward: bool,
        window: int,
    ) -> None:
        self.tensors = [t for t in tensors if t.gradient] if backward else list(tensors)
        self.first, self.last = rows
        self.group = group
        self.device = device
        self.backward = backward
        self.window = window
        """Micro-batches whose sends may be under way at once."""
        self._buffers: dict[int, list[Tensor]] = {}
        self._summands: dict[int, list[tuple[int, Tensor]]] = {}
        self._arriving: dict[int, list[Handle]] = {}
        self._leaving: deque[tuple[int, Handle]] = deque()

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
        works = []
        for k, (tensor, buffer) in enumerate(
            zip(self.tensors, self._buffers[i.micro_batch], strict=True)
        ):
            into = buffer
            if tensor.by_rows:
                into = buffer[i.rows[0] - self.first : i.rows[1] - self.first]
            elif self.backward and i.rows[0] != self.first:
                into = torch.empty_like(buffer)
                self._summands.setdefault(i.micro_batch, []).append((k, into))
            works.append(self._work(dist.irecv, into, i.peer, i.micro_batch, k))
        return works

    def expect(self, i: Instruction, handle: Handle) -> None:
        """A receive that was posted, for `receive` to wait for."""
        assert i.micro_batch is not None
        self._arriving.setdefault(i.micro_batch, []).append(handle)

    def receive(self, micro_batch: int) -> list[Tensor]:
        """The tensors of a micro-batch, once they are here."""
        for handle in self._arriving.pop(micro_batch, ()):
            handle.wait()
        tensors = self._buffers.pop(micro_batch, [])
        for k, summand in self._summands.pop(micro_batch, ()):
            tensors[k] += summand
        return tensors

    def post_send(self, i: Instruction, values: Sequence[Tensor | None]) -> list[Work]:
        """Starts a send of a micro-batch's rows; an absent gradient travels as zeros."""
        assert i.micro_batch is not None
        assert i.rows is not None
        assert i.peer is not None
        works = []
        for k, (tensor, value) in enumerate(zip(self.tensors, values, strict=True)):
            if tensor.by_rows:
                shape = (i.rows[1] - i.rows[0], *tensor.shape[1:])
                part = None if value is None else value[i.rows[0] - self.first :][: shape[0]]
            else:
                shape = tensor.shape
                part = None if self.backward and i.rows[0] != self.first else value
            if part is None:
                part = torch.zeros(shape, dtype=tensor.dtype, device=self.device)
            part = part.detach().contiguous()
            assert (part.shape, part.dtype) == (shape, tensor.dtype), tensor
            works.append(self._work(dist.isend, part, i.peer, i.micro_batch, k))
        return works

    def sent(self, i: Instruction, handle: Handle) -> None:
        """Keeps what is under way; lets go of what has arrived, or must have by now."""
        assert i.micro_batch is not None
        self._leaving.append((i.micro_batch, handle))
        while self._leaving and (
            self._leaving[0][0] <= i.micro_batch - self.window or self._leaving[0][1].done()
        ):
            self._leaving.popleft()[1].wait()

    def finish(self) -> None:
        """Waits until everything that was sent has left."""
        while self._leaving:
            self._leaving.popleft()[1].wait()

    def _work(
        self, post: Callable[..., Work | None], tensor: Tensor, peer: int, micro_batch: int, k: int
    ) -> Work:
        tag = micro_batch * len(self.tensors) + k
        work = post(tensor, peer, group=self.group, tag=tag)
        assert work is not None, "a peer outside the group"
        return work
