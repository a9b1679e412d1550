"""What a rank does in a step before its norm: computes, hands over, sends, receives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from torch.distributed import Work

from meshwright.plan.ranks import first_row
from meshwright.plan.spec import Plan
from meshwright.program.instructions import GATHERED, SENDS, Instruction, Op
from meshwright.runtime.assemble import Assembly, Place
from meshwright.runtime.boundary import Handle
from meshwright.runtime.dilation import Dilator
from meshwright.runtime.measure import Recorder, Works, micro_batches_of
from meshwright.runtime.reduce import Key
from meshwright.runtime.seeds import generator_of
from meshwright.runtime.stage import Rows

_NOTHING = nullcontext()

Crossed = tuple[Op, int, int]
"""SEND_F, RECV_F, SEND_B or RECV_B; stage, micro-batch."""


class Player:
    """Plays the computing and the transfers of one rank's instructions."""

    def __init__(
        self,
        own: Assembly,
        plan: Plan,
        instructions: Sequence[Instruction],
        dilator: Dilator | None,
    ) -> None:
        self.recorder: Recorder | None = None
        self._own = own
        self._dilator = dilator
        self._share = 1 / plan.job.global_batch
        self._rows_before = {
            (i.stage, i.micro_batch): first_row(
                plan, own.places[i.stage].seat.pipeline, i.micro_batch
            )
            for i in instructions
            if i.op is Op.FORWARD and i.micro_batch is not None
        }
        self._split = split_forwards(instructions)
        self._completed = completions(own, instructions)
        self._sends = Counter(_crossed(i) for i in instructions if i.op in SENDS)
        self._made: dict[Crossed, tuple[Sequence[Tensor | None], int]] = {}
        """What is to be sent, and how many sends take it."""
        self._here: dict[Crossed, list[Tensor]] = {}
        """What one stage of this rank hands to another."""
        self._rows: Rows | None = None
        self._step = 0
        self._scale = 1.0
        self._losses: list[tuple[Tensor, float]] = []
        """Of the slices of rows, with their shares of the global batch."""
        self._generator = generator_of(own.device)
        self._random: Tensor | None = None
        """What the generator is set back to at the end of the step."""

    def start(self, rows: Rows, step: int, scale: float) -> None:
        """A step on the rows of a global batch; `scale` multiplies the loss before backwards."""
        self._rows, self._step, self._scale = rows, step, scale
        self._losses.clear()
        self._random = self._generator.get_state()
        for place in self._own.places.values():
            for messages in place.messages.values():
                if messages.headers is not None:
                    messages.headers.step = step

    def wait(self) -> None:
        """Until everything that was sent has left."""
        for place in self._own.places.values():
            for messages in place.messages.values():
                messages.finish()

    def waiting(self) -> Instruction | None:
        """The message that is waited for at this moment, if any."""
        ends = (end for place in self._own.places.values() for end in place.messages.values())
        return next((end.waiting for end in ends if end.waiting is not None), None)

    def finish(self) -> None:
        """Nothing more is computed in this step: lets go of what only that needs."""
        assert self._random is not None
        self._generator.set_state(self._random)
        self._rows = None
        self._made.clear()
        for place in self._own.places.values():
            place.stage.casts.drop()

    def loss(self) -> Tensor:
        """This rank's part of the mean over the global batch, in float64."""
        parts = [loss.double() * share for loss, share in self._losses]
        return sum(parts, torch.zeros((), dtype=torch.float64, device=self._own.device))

    def table(self) -> dict[Op, Callable[[Instruction], None]]:
        """One function for each operation."""
        return {
            Op.FORWARD: self._forward,
            Op.BACKWARD: self._backward,
            Op.BACKWARD_INPUT: self._backward_input,
            Op.BACKWARD_WEIGHT: self._backward_weight,
            Op.SEND_F: self._send,
            Op.RECV_F: self._receive,
            Op.SEND_B: self._send,
            Op.RECV_B: self._receive,
            Op.GATHER_F: self._gather,
            Op.GATHER_B: self._gather,
            Op.REDUCE_GRAD: self._own.reducer.arm,
        }

    # Computing.

    def _forward(self, i: Instruction) -> None:
        assert i.micro_batch is not None
        assert i.rows is not None
        assert self._rows is not None
        place = self._own.places[i.stage]
        received = self._take(place, Op.RECV_F, i.micro_batch)
        first = self._rows_before[i.stage, i.micro_batch] + i.rows[0]
        batch = place.stage.read(self._rows, first, first + i.rows[1] - i.rows[0])
        with self.computing(i):
            results = place.stage.forward(
                i.micro_batch,
                received,
                batch,
                step=self._step,
                first_row=first,
                split=(i.stage, i.micro_batch) in self._split,
            )
        if place.stage.makes_loss:
            if place.seat.tensor_index == 0:
                self._losses.append((results[0].detach(), self._weight(i)))
        elif place.next_here:
            here = [result.detach() for result in results]
            self._here[Op.RECV_F, i.stage + 1, i.micro_batch] = here
        else:
            self._keep(Op.SEND_F, i, results)

    def _backward(self, i: Instruction) -> None:
        completed = self._completed.get(id(i), ())
        self._own.reducer.begin(completed)
        self._go_back(i, self._own.places[i.stage].stage.backward)
        self._own.reducer.end(completed)

    def _backward_input(self, i: Instruction) -> None:
        self._go_back(i, self._own.places[i.stage].stage.backward_input)

    def _go_back(
        self, i: Instruction, run: Callable[[int, Sequence[Tensor], float], list[Tensor | None]]
    ) -> None:
        assert i.micro_batch is not None
        place = self._own.places[i.stage]
        arrived = self._take(place, Op.RECV_B, i.micro_batch)
        with self.computing(i):
            gradients = run(i.micro_batch, arrived, self._weight(i) * self._scale)
        del arrived
        if not place.previous_here:
            self._keep(Op.SEND_B, i, gradients)
        elif gradients:
            ends = [c for c in place.stage.incoming if c.gradient]
            here = [
                torch.zeros(end.shape, dtype=end.dtype, device=self._own.device)
                if gradient is None
                else gradient
                for end, gradient in zip(ends, gradients, strict=True)
            ]
            self._here[Op.RECV_B, i.stage - 1, i.micro_batch] = here

    def _backward_weight(self, i: Instruction) -> None:
        stage = self._own.places[i.stage].stage
        micro_batches = micro_batches_of(i)
        completed = self._completed.get(id(i), ())
        if completed:
            self._own.reducer.begin(completed, stage.settled(micro_batches))
        with self.computing(i):
            stage.backward_weight(micro_batches)
        self._own.reducer.end(completed)

    def _weight(self, i: Instruction) -> float:
        """Share of the global batch that a slice of rows is."""
        assert i.rows is not None
        return (i.rows[1] - i.rows[0]) * self._share

    @contextmanager
    def _stretched(self, i: Instruction) -> Iterator[None]:
        assert self._dilator is not None
        with self.measured(i):
            self._dilator.begin()
            try:
                yield
                self._dilator.end()
            except BaseException:
                self._dilator.stop()
                raise

    def computing(self, i: Instruction) -> AbstractContextManager[None]:
        """Around computing: stretched where a slower device is emulated, measured where asked."""
        return self.measured(i) if self._dilator is None else self._stretched(i)

    def measured(self, i: Instruction) -> AbstractContextManager[None]:
        """Around what an instruction does: measured where asked."""
        if self.recorder is None:
            return _NOTHING
        return self.recorder.computing(i, self._kept_bytes)

    def _kept_bytes(self, i: Instruction) -> int | None:
        assert i.micro_batch is not None
        return self._own.places[i.stage].stage.kept_bytes(i.micro_batch)

    # Transfers.

    def _take(self, place: Place, op: Op, micro_batch: int) -> list[Tensor]:
        """What comes in over a cut: from a stage of this rank, or by messages."""
        if place.next_here if op is Op.RECV_B else place.previous_here:
            return self._here.pop((op, place.seat.stage, micro_batch), [])
        return place.messages[op].receive(micro_batch)

    def _keep(self, op: Op, i: Instruction, values: Sequence[Tensor | None]) -> None:
        assert i.micro_batch is not None
        key = (op, i.stage, i.micro_batch)
        if self._sends[key]:
            self._made[key] = (values, self._sends[key])

    def _receive(self, i: Instruction) -> None:
        messages = self._own.places[i.stage].messages[i.op]
        messages.expect(i, self.posted(i, messages.post_receive(i)))

    def _send(self, i: Instruction) -> None:
        messages = self._own.places[i.stage].messages[i.op]
        key = _crossed(i)
        values, left = self._made.pop(key)
        if left > 1:
            self._made[key] = (values, left - 1)
        messages.sent(i, self.posted(i, messages.post_send(i, values)))

    def _gather(self, i: Instruction) -> None:
        with self.measured(i):
            self._own.places[i.stage].messages[GATHERED[i.op]].gather(i)

    def posted(self, i: Instruction, works: list[Work]) -> Handle:
        """What to wait for where communication has been posted."""
        return Works(works) if self.recorder is None else self.recorder.posted(i, works)


def split_forwards(instructions: Sequence[Instruction]) -> frozenset[tuple[int, int]]:
    """Stages and micro-batches whose forward must prepare a backward in two parts."""
    return frozenset(
        (i.stage, micro_batch)
        for i in instructions
        if i.op is Op.BACKWARD_WEIGHT
        for micro_batch in micro_batches_of(i)
    )


def completions(own: Assembly, instructions: Sequence[Instruction]) -> dict[int, list[Key]]:
    """By identity of the instruction: the buckets to whose gradients it is the last to add."""
    last = {i.stage: i for i in instructions if i.op in (Op.BACKWARD, Op.BACKWARD_WEIGHT)}
    position = {id(i): n for n, i in enumerate(instructions)}
    found: dict[int, list[Key]] = {}
    for i in instructions:
        if i.op is not Op.REDUCE_GRAD:
            continue
        key = (i.layers, i.tied)
        named = {one.name for one in own.reducer.buckets[key].held}
        adding = [last[n] for n, place in own.places.items() if named & place.stage.parameters]
        if adding:
            final = max(adding, key=lambda each: position[id(each)])
            keys = found.setdefault(id(final), [])
            if key not in keys:  # several tiles of one bucket
                keys.append(key)
    return found


def _crossed(i: Instruction) -> Crossed:
    assert i.micro_batch is not None
    return (i.op, i.stage, i.micro_batch)
