"""Interprets one rank's instructions: computes, hands over, sends and receives, up to the gradient
norm.

Every instruction is bound once, to a function of the step, in which everything that is the same in
every step has been looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from meshwright.plan.ranks import first_row
from meshwright.plan.spec import Plan
from meshwright.program.instructions import GradientKey, Instruction, micro_batches_of
from meshwright.program.operations import Op
from meshwright.runtime.handles import Handle
from meshwright.runtime.observer import UNOBSERVED, Observer
from meshwright.runtime.rank_model import LocalStage, RankModel
from meshwright.runtime.recorder import Recording
from meshwright.runtime.seeds import generator_of
from meshwright.runtime.stage import RowReader
from meshwright.techniques import provided

_NOTHING = nullcontext()


@dataclass(frozen=True, slots=True)
class Step:
    """Holds what differs from one step to the next."""

    number: int
    rows: RowReader
    """The rows of the step's global batch."""
    scale: float
    """Multiplies the loss before backwards."""


BoundInstruction = Callable[[Step], None]
"""Function that runs one instruction of a step."""

TakeTensors = Callable[[], list[Tensor]]
"""Function that returns the tensors that come in over a cut."""
KeepTensors = Callable[[Sequence[Tensor | None]], None]
"""Function that takes the tensors that go out over a cut."""

CutKey = tuple[Op, int, int]
"""Key of tensors at a cut: (SEND_F, RECV_F, SEND_B or RECV_B; stage; micro-batch)."""


class Interpreter:
    """Runs the compute and transfer instructions of one rank."""

    def __init__(
        self,
        own: RankModel,
        plan: Plan,
        instructions: Sequence[Instruction],
        recording: Recording,
        observer: Observer = UNOBSERVED,
    ) -> None:
        self.own = own
        self._recording = recording
        self.posted = recording.posted
        """Makes a handle for an instruction's communication, which has just been posted."""
        self._observer = observer
        self.computing = self.measured if observer is UNOBSERVED else self._observed
        """Context for an instruction's computing: measured if the step is recorded, and
        observed."""
        self.meet = observer.waiting
        """Calls its argument, which waits for other ranks at a point where computing stops."""
        self._share = 1 / plan.job.global_batch
        self._rows_before = {
            (i.stage, i.micro_batch): first_row(
                plan, own.stages[i.stage].placement.pipeline, i.micro_batch
            )
            for i in instructions
            if i.op is Op.FORWARD and i.micro_batch is not None
        }
        self._split = split_forwards(instructions)
        self._completed = completions(own, instructions)
        self._last_sends = {_crossed(i): i for i in instructions if i.op.kind == "send"}
        self._made: dict[CutKey, Sequence[Tensor | None]] = {}
        """Tensors that are to be sent."""
        self._here: dict[CutKey, list[Tensor]] = {}
        """Tensors that one stage of this rank has made for another."""
        self.posted_last: list[Handle] = []
        """Collectives that the end of the step waits for."""
        self._losses: list[tuple[Tensor, float]] = []
        """(Mean loss, share of the global batch) of each slice of rows."""
        self._generator = generator_of(own.device)
        self._random: Tensor | None = None
        """The generator's state at the start of the step, to which it returns at the end."""

    def start(self, step: Step) -> None:
        """Begins a step."""
        self._losses.clear()
        self._random = self._generator.get_state()
        for place in self.own.stages.values():
            for messages in place.messages.values():
                if messages.headers is not None:
                    messages.headers.step = step.number

    def wait(self) -> None:
        """Waits until all that was posted has completed."""
        for handle in self.posted_last:
            handle.wait()
        self.posted_last.clear()
        for place in self.own.stages.values():
            for messages in place.messages.values():
                messages.finish()

    def waiting(self) -> Instruction | None:
        """Returns the instruction whose message is being waited for, if any."""
        ends = (end for place in self.own.stages.values() for end in place.messages.values())
        return next((end.waiting for end in ends if end.waiting is not None), None)

    def finish(self) -> None:
        """Ends the forwards and backwards of a step, and releases what only they need."""
        if self._random is None:
            return
        self._generator.set_state(self._random)
        self._random = None
        self._made.clear()
        for place in self.own.stages.values():
            place.stage.casts.drop()

    def loss(self) -> Tensor:
        """Returns this rank's part of the mean loss over the global batch, in float64."""
        parts = [loss.double() * share for loss, share in self._losses]
        return sum(parts, torch.zeros((), dtype=torch.float64, device=self.own.device))

    def bind(self, i: Instruction) -> BoundInstruction:
        """Returns the function that runs an instruction."""
        match i.op:
            case Op.FORWARD:
                return self._forward(i)
            case Op.BACKWARD | Op.BACKWARD_INPUT:
                return self._backward(i)
            case Op.BACKWARD_WEIGHT:
                return self._backward_weight(i)
            case Op.SEND_F | Op.SEND_B:
                return self._send(i)
            case Op.RECV_F | Op.RECV_B:
                return self._receive(i)
            case _ if i.op.blocks and i.op.reads is not None:
                return partial(self._gather, i)
            case _ if i.op.of_gradients:
                return self._arm(i)
        return _handlers()[i.op](self, i)

    # Computing.

    def _forward(self, i: Instruction) -> BoundInstruction:
        micro_batch, rows = i.micro_batch, i.rows
        assert micro_batch is not None
        assert rows is not None
        place = self.own.stages[i.stage]
        stage = place.stage
        split = (i.stage, micro_batch) in self._split
        first = self._rows_before[i.stage, micro_batch] + rows[0]
        last = first + rows[1] - rows[0]
        take, keep = self._taking(place, Op.RECV_F, micro_batch), self._keeping_forward(place, i)

        def run(step: Step) -> None:
            received = take()
            batch = stage.read(step.rows, first, last)
            with self.computing(i):
                results = stage.forward(
                    micro_batch, received, batch, step=step.number, first_row=first, split=split
                )
            keep(results)

        return run

    def _keeping_forward(
        self, place: LocalStage, i: Instruction
    ) -> Callable[[Sequence[Tensor]], None]:
        assert i.micro_batch is not None
        if place.stage.makes_loss:
            if place.placement.index("tensor") > 0:
                return _drop
            share = self._weight(i)

            def note(results: Sequence[Tensor]) -> None:
                self._losses.append((results[0].detach(), share))

            return note
        if place.next_here:
            key = (Op.RECV_F, i.stage + 1, i.micro_batch)

            def hand_over(results: Sequence[Tensor]) -> None:
                self._here[key] = [result.detach() for result in results]

            return hand_over
        return self._keeping(Op.SEND_F, i)

    def _backward(self, i: Instruction) -> BoundInstruction:
        micro_batch = i.micro_batch
        assert micro_batch is not None
        place = self.own.stages[i.stage]
        stage, reducer = place.stage, self.own.reducer
        completed = self._completed.get(id(i), ())
        weight = self._weight(i)
        take, keep = self._taking(place, Op.RECV_B, micro_batch), self._keeping_backward(place, i)
        whole = i.op is Op.BACKWARD

        def run(step: Step) -> None:
            if completed:
                reducer.begin(completed)
            arrived = take()
            with self.computing(i):
                back = stage.backward if whole else stage.backward_input
                gradients = back(micro_batch, arrived, weight * step.scale)
            del arrived
            keep(gradients)
            if completed:
                reducer.end(completed)

        return run

    def _keeping_backward(self, place: LocalStage, i: Instruction) -> KeepTensors:
        assert i.micro_batch is not None
        if not place.previous_here:
            return self._keeping(Op.SEND_B, i)
        key = (Op.RECV_B, i.stage - 1, i.micro_batch)
        ends = [c for c in place.stage.incoming if c.gradient]

        def hand_over(gradients: Sequence[Tensor | None]) -> None:
            if gradients:
                self._here[key] = [
                    torch.zeros(end.shape, dtype=end.dtype, device=self.own.device)
                    if gradient is None
                    else gradient
                    for end, gradient in zip(ends, gradients, strict=True)
                ]

        return hand_over

    def _backward_weight(self, i: Instruction) -> BoundInstruction:
        stage, reducer = self.own.stages[i.stage].stage, self.own.reducer
        micro_batches = micro_batches_of(i)
        completed = self._completed.get(id(i), ())

        def run(_: Step) -> None:
            if completed:
                reducer.begin(completed, stage.completed_parameters(micro_batches))
            with self.computing(i):
                stage.backward_weight(micro_batches)
            if completed:
                reducer.end(completed)

        return run

    def _weight(self, i: Instruction) -> float:
        """Returns the share of the global batch that an instruction's rows are."""
        assert i.rows is not None
        return (i.rows[1] - i.rows[0]) * self._share

    @contextmanager
    def _observed(self, i: Instruction) -> Iterator[None]:
        with self.measured(i):
            self._observer.before(i)
            try:
                yield
                self._observer.after(i)
            except BaseException:
                self._observer.failed()
                raise

    def measured(self, i: Instruction) -> AbstractContextManager[None]:
        """Returns a context that measures what an instruction does, if the step is recorded."""
        recorder = self._recording.recorder
        return _NOTHING if recorder is None else recorder.computing(i, self._kept_bytes)

    def _kept_bytes(self, i: Instruction) -> int | None:
        assert i.micro_batch is not None
        return self.own.stages[i.stage].stage.kept_bytes(i.micro_batch)

    # Transfers.

    def _taking(self, place: LocalStage, op: Op, micro_batch: int) -> TakeTensors:
        """Returns a function that fetches what comes in over a cut: from another stage of this
        rank, or from messages."""
        if place.next_here if op is Op.RECV_B else place.previous_here:
            return partial(self._here.pop, (op, place.placement.stage, micro_batch), [])
        return partial(self.meet, partial(place.messages[op].receive, micro_batch))

    def _keeping(self, op: Op, i: Instruction) -> KeepTensors:
        """Returns a function that keeps what goes out over a cut until it is sent; it drops what no
        send takes."""
        assert i.micro_batch is not None
        key = (op, i.stage, i.micro_batch)
        return partial(self._made.__setitem__, key) if key in self._last_sends else _drop

    def _receive(self, i: Instruction) -> BoundInstruction:
        messages = self.own.stages[i.stage].messages[i.op]
        start = messages.receiver(i)
        return lambda _: messages.expect(i, self.posted(i, start()))

    def _send(self, i: Instruction) -> BoundInstruction:
        messages = self.own.stages[i.stage].messages[i.op]
        start = messages.sender(i)
        key = _crossed(i)
        values = self._made.pop if self._last_sends[key] is i else self._made.__getitem__
        return lambda _: messages.sent(i, self.posted(i, start(values(key))))

    def _arm(self, i: Instruction) -> BoundInstruction:
        arm = self.own.reducer.queue
        return lambda _: arm(i)

    def _gather(self, i: Instruction, _: Step) -> None:
        assert i.op.reads is not None
        with self.measured(i):
            self.meet(partial(self.own.stages[i.stage].messages[i.op.reads].gather, i))


@cache
def _handlers() -> dict[Op, Callable[[Interpreter, Instruction], BoundInstruction]]:
    """Returns the binder of each operation that the techniques have added."""
    return {op: bind for own in provided("runtime", "HANDLERS") for op, bind in own.items()}


def _drop(_: object) -> None:
    pass


def split_forwards(instructions: Sequence[Instruction]) -> frozenset[tuple[int, int]]:
    """Returns (stage, micro-batch) of each forward whose backward comes in two parts."""
    return frozenset(
        (i.stage, micro_batch)
        for i in instructions
        if i.op is Op.BACKWARD_WEIGHT
        for micro_batch in micro_batches_of(i)
    )


def completions(
    own: RankModel, instructions: Sequence[Instruction]
) -> dict[int, list[GradientKey]]:
    """Returns the buckets to whose gradients an instruction is the last to add, keyed by the
    instruction's identity."""
    last = {i.stage: i for i in instructions if i.op in (Op.BACKWARD, Op.BACKWARD_WEIGHT)}
    position = {id(i): n for n, i in enumerate(instructions)}
    found: dict[int, list[GradientKey]] = {}
    for i in instructions:
        if not i.op.of_gradients:
            continue
        key = (i.layers, i.tied)
        named = {one.name for one in own.reducer.buckets[key].local_parameters}
        adding = [last[n] for n, place in own.stages.items() if named & place.stage.parameters]
        if adding:
            final = max(adding, key=lambda each: position[id(each)])
            keys = found.setdefault(id(final), [])
            if key not in keys:  # several tiles of one bucket
                keys.append(key)
    return found


def _crossed(i: Instruction) -> CutKey:
    assert i.micro_batch is not None
    return (i.op, i.stage, i.micro_batch)
