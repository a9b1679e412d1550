"""Runs a program on PyTorch: the loop over one rank's instructions."""

from __future__ import annotations

import math
import time
from functools import partial
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshwright.model.spec import LayerGraph
from meshwright.model.trace import trace
from meshwright.plan.ranks import divides_layers
from meshwright.plan.spec import Plan
from meshwright.plan.validate import validate_plan
from meshwright.program.check import check_program
from meshwright.program.compile import compile_plan
from meshwright.program.instructions import Instruction
from meshwright.program.operations import Op
from meshwright.program.timeline import Timeline
from meshwright.records import record
from meshwright.runtime import world as worlds
from meshwright.runtime.assemble import assemble
from meshwright.runtime.build import set_precision
from meshwright.runtime.collect import collect_parameters
from meshwright.runtime.compiling import check_compilable
from meshwright.runtime.measure import Recorder, Recording, gather, peak_bytes, static_bytes
from meshwright.runtime.observer import UNOBSERVED, Observer
from meshwright.runtime.optimizer import (
    PARTLY,
    UNTOUCHED,
    LossScale,
    OptimizerFactory,
    Schedule,
    Update,
    check_finite,
    clip_factor,
    clip_factor_on_device,
    stop_for_missing,
    updates,
)
from meshwright.runtime.play import Action, Player
from meshwright.runtime.run import TrainingOptions
from meshwright.runtime.stage import Rows
from meshwright.runtime.world import World


@record
class StepResult:
    """The outcome of one optimizer step; loss and norm are the same on every rank."""

    loss: float
    """Mean loss over the rows of the global batch."""
    grad_norm: float
    """Norm of the whole model's gradient, before clipping."""
    seconds: float
    """Wall-clock time of the step on this rank, communication included."""


def _after_norm(action: tuple[Action, Instruction]) -> bool:
    """True if an instruction changes weights, or passes changed ones on."""
    return action[1].op.ends_step and action[1].op is not Op.REDUCE_NORM


class Engine:
    """One process of a training run: holds a rank's layers and runs its instructions.

    `model` takes the batch's tensors and returns the mean loss over their rows; it may be on the
    meta device. `inputs` is an example batch with any number of rows. `learning_rate` gives the
    factor of the optimizer's own rates at each step, from 0. Without clipping each
    bucket's weights are updated as soon as its gradients are summed, so that layers that are done
    early do not wait for late ones, and `optimizer` is called once for each bucket's parameters.
    (Not so under fp16: all ranks must agree on its loss scale first.) `observer`: functions to be
    called as this rank works. `graph`: the layers of the model, which every rank traces itself if
    it is absent. Raises a MeshwrightError if plan, model and processes do not fit together.
    """

    def __init__(  # noqa: PLR0913 - all that a run is made of
        self,
        model: nn.Module,
        plan: Plan,
        *,
        inputs: tuple[Tensor, ...],
        optimizer: OptimizerFactory,
        options: TrainingOptions,
        learning_rate: Schedule | None = None,
        graph: LayerGraph | None = None,
        observer: Observer = UNOBSERVED,
        world: World | None = None,
        bucket_bytes: int | None = None,
    ) -> None:
        self.plan, self.options = plan, options
        precision, timeout = plan.job.precision, options.timeout_seconds
        set_precision(model, precision)
        self.model = graph or _traced(model, inputs, plan)
        validate_plan(plan, self.model)
        self._early = options.clip_norm == 0 and precision != "fp16"
        self.program = compile_plan(
            plan, self.model, bucket_bytes=bucket_bytes, clipped=not self._early
        )
        check_program(self.program)
        if options.compile:
            check_compilable(plan, self.program)
        self.world = world or worlds.connect(plan, self.program, timeout_seconds=timeout)
        self.rank = self.world.rank
        self.steps = 0
        self._current: Instruction | None = None
        self._recording = Recording()
        with worlds.noticing(self.world, lambda: None):
            self._own = assemble(
                model,
                inputs,
                plan,
                self.program,
                self.world,
                options=options,
                observer=observer,
                posted=self._recording.posted,
            )
        own = self.program.ranks[self.rank]
        self._player = Player(self._own, plan, own, self._recording, observer)
        observer.attach(self.model, self._own)
        self._updates = updates(own, self._own.reducer.buckets, optimizer)
        self._schedule = learning_rate
        self._scale = LossScale(dynamic=precision == "fp16")
        self._peaks = [0] * self.world.size
        fused = all(update.on_device for update in self._updates.values())
        self._on_device = fused and not self._scale.dynamic
        self._unread: Tensor | None = None
        """Sums over all ranks (loss, squared norm, ...) that the host has not read yet."""
        self._actions = [(self._bind(i), i) for i in own]
        # The first step updates after its norm, which finds parameters that get no gradient.
        self._first_actions = sorted(self._actions, key=_after_norm)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # After a failure other ranks may never answer, so their end is not waited for.
        if kind is None:
            self.close()

    # What the training loop calls.

    def step(self, rows: Rows) -> StepResult:
        """Runs one optimizer step on a global batch, of which each rank reads its own rows.

        Raises TrainingError, before any weight changes, if the loss or a gradient is non-finite or
        a parameter gets no gradient. Without clipping and after the first step only the buckets
        with non-finite gradients are left unchanged when it is raised. Raises PeerLost if another
        rank has gone.
        """
        started = time.perf_counter()
        self._player.start(rows, self.steps, self._scale.value)
        self._own.reducer.zero()
        for update in self._updates.values():
            update.squared = None
        with worlds.noticing(self.world, lambda: self._player.waiting() or self._current):
            for act, instruction in self._actions if self.steps else self._first_actions:
                self._current = instruction
                act()
            self._player.wait()
            if self._unread is not None:
                self._read(self._unread)
        self._current = None
        self.steps += 1
        seconds = time.perf_counter() - started
        return StepResult(loss=self._mean_loss, grad_norm=self._norm, seconds=seconds)

    def record(self, rows: Rows) -> tuple[StepResult, Timeline | None]:
        """Runs one step and measures each instruction; the Timeline is returned on rank 0 only.

        Raises what `step` raises.
        """
        with worlds.noticing(self.world, lambda: None):
            dist.barrier(group=self.world.everyone)
        own = self._own
        casts = [c for place in own.places.values() for c in place.stage.casts.tensors()]
        recorder = self._recording.recorder = Recorder(
            self.program.ranks[self.rank],
            self.world.device,
            weights=[*(one.parameter for one in own.held), *casts],
            static_bytes=static_bytes(own.held, own.buckets, self._optimizers)
            + sum(cast.nbytes for cast in casts),
        )
        try:
            result = self.step(rows)
            measured = recorder.close()
        finally:
            self._recording.recorder = None
        with worlds.noticing(self.world, lambda: None):
            return result, gather(measured, self.program, self.plan.devices, self.world.everyone)

    def parameters(self) -> dict[str, Tensor] | None:
        """Returns every parameter, whole and on the CPU, by its name in the model; None on ranks
        other than 0."""
        own = {one.name: one.parameter for one in self._own.held}
        with worlds.noticing(self.world, lambda: None):
            return collect_parameters(self._own.homes, own, self.world)

    @property
    def learning_rate(self) -> float:
        """The last step's learning rate, of the first parameter group; 0 if this rank updates
        nothing."""
        return next((float(each.param_groups[0]["lr"]) for each in self._optimizers), 0.0)

    @property
    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return [each.optimizer for each in self._updates.values() if each.optimizer is not None]

    def memory_bytes(self) -> int:
        """Returns the largest peak memory of any rank: allocated on a GPU, resident on a CPU."""
        return max(self._peaks)

    def close(self) -> None:
        """Removes the gradient hooks from the model and leaves the process groups."""
        self._own.reducer.close()
        worlds.close(self.world)

    def _bind(self, i: Instruction) -> Action:
        """Returns the function that runs an instruction."""
        if i.op is Op.REDUCE_NORM:
            return partial(self._reduce_norm, i)
        if i.op is Op.OPTIMIZER_STEP:
            return partial(self._optimizer_step, i)
        return self._player.bind(i)

    def _reduce_norm(self, i: Instruction) -> None:
        """Sums over all ranks: the loss, the squared norm, the number of parameters without
        gradient, and each rank's peak memory in an element of its own."""
        own, size, device = self._own, self.world.size, self.world.device
        self._player.meet(partial(own.reducer.finish, own.buckets))
        self._player.finish()
        with self._player.measured(i):
            totals = torch.zeros(3 + size, dtype=torch.float64, device=device)
            totals[0] = self._player.loss()
            for update in self._updates.values():
                totals[1] += update.squared_norm(device)
            totals[2] = len(own.reducer.missing()) if self.steps == 0 else 0
            totals[3 + self.rank] = peak_bytes(device)
            self._player.meet(partial(dist.all_reduce, totals, group=self.world.everyone))
        self._unread = totals
        # The host reads the sums at once if it decides on the update: in the first step, and for
        # optimizers that cannot skip a step on the device.
        if self.steps == 0 or not (self._early or self._on_device):
            self._read(totals)

    def _read(self, totals: Tensor) -> None:
        """Reads the sums, which waits for the device. Raises TrainingError, on all ranks alike."""
        self._unread = None
        loss, squared, without, *peaks = totals.tolist()
        self._mean_loss, self._peaks = loss, [int(peak) for peak in peaks]
        self._norm = squared**0.5 / self._scale.value
        if without:
            stop_for_missing(self._own.reducer.missing(), self.world)
        early = self._early and self.steps > 0
        check_finite(self.steps, loss, self._norm, self._scale, PARTLY if early else UNTOUCHED)

    def _optimizer_step(self, i: Instruction) -> None:
        update = self._updates[i.layers, i.tied]
        rate = 1.0 if self._schedule is None else self._schedule(self.steps)
        if self._early:
            self._player.meet(partial(self._own.reducer.finish, update.buckets))
            self._player.finish()
            with self._player.computing(i):
                self._update_early(update, rate)
        elif self._unread is not None:
            with self._player.computing(i):
                self._update_unread(update, rate, self._unread)
        else:
            overflow = not math.isfinite(self._norm)
            scale = self._scale.value
            self._scale.update(overflow)
            if not overflow:
                with self._player.computing(i):
                    update.run(clip_factor(self._norm, self.options.clip_norm) / scale, rate)

    def _update_early(self, update: Update, rate: float) -> None:
        """Updates one bucket's weights if its gradients are finite."""
        good = update.squared_norm(self.world.device).isfinite()
        if self._on_device:
            update.run_on_device(good, rate)
        elif good.item():
            update.run(1.0, rate)

    def _update_unread(self, update: Update, rate: float, totals: Tensor) -> None:
        """Updates weights on the device if loss and norm are finite, which the host does not know
        yet."""
        assert self.options.clip_norm, "only clipped weights wait for the norm"
        factor = clip_factor_on_device(totals[1].sqrt(), self.options.clip_norm)
        update.run_on_device(totals[:2].isfinite().all(), rate, factor)


def _traced(model: nn.Module, inputs: tuple[Tensor, ...], plan: Plan) -> LayerGraph:
    """Traces the model for a plan: tensor widths are looked at only if a layer is divided."""
    job, shared = plan.job, divides_layers(plan)
    return trace(model, inputs, job.precision, job.sequence, plan.model.name, divided=shared)
