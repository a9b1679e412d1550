"""Plays a program on PyTorch: the loop over one rank's instructions."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import Work

from meshwright.model.spec import LayerGraph
from meshwright.model.trace import trace
from meshwright.plan.ranks import first_row
from meshwright.plan.spec import Plan
from meshwright.plan.validate import validate_plan
from meshwright.program.buckets import BUCKET_BYTES
from meshwright.program.check import check_program
from meshwright.program.compile import compile_plan
from meshwright.program.instructions import GATHERED, Instruction, Op
from meshwright.program.timeline import Timeline
from meshwright.records import record
from meshwright.runtime import world as worlds
from meshwright.runtime.assemble import assemble
from meshwright.runtime.boundary import Handle
from meshwright.runtime.build import set_precision
from meshwright.runtime.collect import collect_parameters
from meshwright.runtime.dilation import Dilation, Dilator
from meshwright.runtime.measure import Recorder, Works, gather, peak_bytes, static_bytes
from meshwright.runtime.optimizer import (
    LossScale,
    Schedule,
    check_finite,
    clip,
    clip_factor,
    squared_norm,
    stop_for_missing,
)
from meshwright.runtime.stage import Rows
from meshwright.runtime.world import World


@record
class StepResult:
    """One optimizer step, the same on every rank."""

    loss: float
    """Mean over the rows of the global batch."""
    grad_norm: float
    """Global, before clipping."""
    seconds: float
    """On this rank, all communication included."""


class Engine:
    """One process of a training run: holds a rank's layers and plays its instructions.

    `model` takes the batch's tensors and returns the mean loss over their rows; it may be on the
    meta device. `inputs` is an example batch of any number of rows. `learning_rate` gives the
    factor of the optimizer's own rates at each step, from 0. Raises a MeshwrightError if plan,
    model and processes do not go together.
    """

    def __init__(  # noqa: PLR0913 - everything that one run is made of
        self,
        model: nn.Module,
        plan: Plan,
        *,
        inputs: tuple[Tensor, ...],
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        clip_norm: float | None = None,
        learning_rate: Schedule | None = None,
        seed: int = 0,
        dilation: Dilation | None = None,
        world: World | None = None,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self.plan = plan
        job = plan.job
        set_precision(model, job.precision)
        self.model: LayerGraph = trace(model, inputs, job.precision, job.sequence, plan.model.name)
        validate_plan(plan, self.model)
        self.program = compile_plan(plan, self.model, bucket_bytes=bucket_bytes)
        check_program(self.program)
        self.world = world or worlds.connect(plan, self.program)
        self.rank = self.world.rank
        self.steps = 0
        self._dilator = None if dilation is None else Dilator(dilation)
        self._recorder: Recorder | None = None
        self._current: Instruction | None = None
        with worlds.noticing(self.world, lambda: None):
            self._own = assemble(
                model,
                inputs,
                plan,
                self.program,
                self.world,
                seed=seed,
                dilator=self._dilator,
                posted=self._posted,
            )
        trainable = [h.parameter for h in self._own.held if h.parameter.requires_grad]
        self._optimizer = optimizer(trainable)
        self._rates = [float(group["lr"]) for group in self._optimizer.param_groups]
        self._schedule = learning_rate
        self._clip_norm = clip_norm
        self._scale = LossScale(dynamic=job.precision == "fp16")
        self._peaks = [0] * self.world.size
        table = self._table()
        self._actions = [(table[i.op], i) for i in self.program.ranks[self.rank]]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # After a failure others may never answer: their end is not waited for.
        if kind is None:
            self.close()

    # What a run does with it.

    def step(self, rows: Rows) -> StepResult:
        """One optimizer step on the rows of one global batch, of which each rank reads its own.

        Raises TrainingError, before any weight changes, if loss or gradient are no numbers or a
        parameter gets no gradient; PeerLost if another rank has gone.
        """
        started = time.perf_counter()
        self._rows = rows
        self._loss = torch.zeros((), dtype=torch.float64, device=self.world.device)
        self._made: dict[Op, Sequence[Tensor | None]] = {}
        self._own.reducer.zero()
        with worlds.noticing(self.world, lambda: self._current):
            for act, instruction in self._actions:
                self._current = instruction
                act(instruction)
            for messages in self._own.messages.values():
                messages.finish()
        self._current = None
        self.steps += 1
        seconds = time.perf_counter() - started
        return StepResult(loss=self._mean_loss, grad_norm=self._norm, seconds=seconds)

    def record(self, rows: Rows) -> tuple[StepResult, Timeline | None]:
        """One step, measured instruction by instruction; the Timeline is on rank 0 only."""
        dist.barrier(group=self.world.everyone)
        own = self._own
        casts = own.stage.casts.tensors()
        self._recorder = Recorder(
            self.program.ranks[self.rank],
            self.world.device,
            weights=[*(one.parameter for one in own.held), *casts],
            static_bytes=static_bytes(own.held, own.buckets, self._optimizer)
            + sum(cast.nbytes for cast in casts),
        )
        try:
            result = self.step(rows)
            measured = self._recorder.close()
        finally:
            self._recorder = None
        return result, gather(measured, self.program, self.plan.devices, self.world.everyone)

    def parameters(self) -> dict[str, Tensor] | None:
        """Every parameter, whole and on the CPU, by its name in the model; on rank 0 only."""
        own = {one.name: one.parameter for one in self._own.held}
        with worlds.noticing(self.world, lambda: None):
            return collect_parameters(self._own.homes, own, self.world)

    @property
    def learning_rate(self) -> float:
        """Of the last step (of the first parameter group)."""
        return float(self._optimizer.param_groups[0]["lr"])

    def memory_bytes(self) -> int:
        """Most memory that any rank has had in use: allocated on a device, resident on a CPU."""
        return max(self._peaks)

    def close(self) -> None:
        """Leaves the process groups."""
        worlds.close(self.world)

    # One function for each operation.

    def _table(self) -> dict[Op, Callable[[Instruction], None]]:
        return {
            Op.FORWARD: self._forward,
            Op.BACKWARD: self._backward,
            Op.SEND_F: self._send,
            Op.RECV_F: self._receive,
            Op.SEND_B: self._send,
            Op.RECV_B: self._receive,
            Op.GATHER_F: self._gather,
            Op.GATHER_B: self._gather,
            Op.REDUCE_GRAD: self._own.reducer.arm,
            Op.REDUCE_NORM: self._reduce_norm,
            Op.OPTIMIZER_STEP: self._optimizer_step,
        }

    def _forward(self, i: Instruction) -> None:
        assert i.micro_batch is not None
        assert i.rows is not None
        stage = self._own.stage
        self._made.clear()
        received = self._own.messages[Op.RECV_F].receive(i.micro_batch)
        first = first_row(self.plan, self._own.seat.pipeline, i.micro_batch) + i.rows[0]
        batch = stage.read(self._rows, first, first + i.rows[1] - i.rows[0])
        with self._computing(i):
            results = stage.forward(
                i.micro_batch, received, batch, step=self.steps, first_row=first
            )
        if not stage.makes_loss:
            self._made[Op.SEND_F] = results
        elif self._own.seat.tensor_index == 0:
            self._loss += results[0].detach() * self._weight(i)

    def _backward(self, i: Instruction) -> None:
        assert i.micro_batch is not None
        self._made.clear()
        arrived = self._own.messages[Op.RECV_B].receive(i.micro_batch)
        weight = self._weight(i) * self._scale.value
        with self._computing(i):
            self._made[Op.SEND_B] = self._own.stage.backward(i.micro_batch, arrived, weight)
        self._own.reducer.flush()

    def _receive(self, i: Instruction) -> None:
        messages = self._own.messages[i.op]
        messages.expect(i, self._posted(i, messages.post_receive(i)))

    def _send(self, i: Instruction) -> None:
        messages = self._own.messages[i.op]
        messages.sent(i, self._posted(i, messages.post_send(i, self._made[i.op])))

    def _gather(self, i: Instruction) -> None:
        with self._measured(i):
            self._own.messages[GATHERED[i.op]].gather(i)

    def _reduce_norm(self, i: Instruction) -> None:
        """Sums loss, squared norm, and (each rank in a place of its own) memory and mistakes."""
        own, size = self._own, self.world.size
        own.reducer.finish()
        self._end_of_backwards()
        with self._measured(i):
            totals = torch.zeros(3 + size, dtype=torch.float64, device=self.world.device)
            totals[0] = self._loss
            totals[1] = squared_norm(own.buckets, self.world.device)
            missing = own.reducer.missing() if self.steps == 0 else []
            totals[2] = len(missing)
            totals[3 + self.rank] = peak_bytes(self.world.device)
            dist.all_reduce(totals, group=self.world.everyone)
            loss, squared, without, *peaks = totals.tolist()
        self._mean_loss, self._peaks = loss, [int(peak) for peak in peaks]
        self._norm = squared**0.5 / self._scale.value
        if without:
            stop_for_missing(missing, self.world)
        check_finite(self.steps, loss, self._norm, self._scale)

    def _optimizer_step(self, i: Instruction) -> None:
        overflow = not math.isfinite(self._norm)
        scale = self._scale.value
        self._scale.update(overflow)
        if overflow:
            return
        if self._schedule is not None:
            for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * self._schedule(self.steps)
        with self._computing(i):
            clip(self._own.buckets, clip_factor(self._norm, self._clip_norm) / scale)
            self._optimizer.step()

    # What they share.

    def _end_of_backwards(self) -> None:
        """Lets go of what only forwards and backwards need."""
        self._made.clear()
        self._own.stage.casts.drop()

    def _weight(self, i: Instruction) -> float:
        """Share of the global batch that a slice of rows is."""
        assert i.rows is not None
        return (i.rows[1] - i.rows[0]) / self.plan.job.global_batch

    @contextmanager
    def _computing(self, i: Instruction) -> Iterator[None]:
        """Around computing: stretched where a slower device is emulated, measured where asked."""
        if self._dilator is not None:
            self._dilator.begin()
        with self._measured(i):
            yield
            if self._dilator is not None:
                self._dilator.catch_up()

    def _measured(self, i: Instruction) -> AbstractContextManager[None]:
        return nullcontext() if self._recorder is None else self._recorder.computing(i)

    def _posted(self, i: Instruction, works: list[Work]) -> Handle:
        return Works(works) if self._recorder is None else self._recorder.posted(i, works)
