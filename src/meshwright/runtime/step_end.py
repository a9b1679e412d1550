"""Ends a step: sums loss and norm over all ranks, checks them, and updates the weights.

Weights are updated in one of three ways:

* bucket by bucket, as soon as a bucket's gradients are summed, if nothing waits for the norm;
* on the device, if the optimizer reads there what the norm decides: whether the step is taken, and
  the factor of clipping; the host reads loss and norm when the step is over;
* by the host, which reads the norm first: in the first step, in fp16, and for other optimizers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from meshwright.cluster.spec import Precision
from meshwright.program.instructions import GradientKey, Instruction
from meshwright.program.operations import Op
from meshwright.runtime.interpreter import BoundInstruction, Interpreter, Step
from meshwright.runtime.optimizer import (
    PARTLY_UPDATED,
    UNTOUCHED,
    LearningRateSchedule,
    LossScale,
    Update,
    check_finite,
    clip_factor,
    clip_factor_on_device,
    stop_for_missing,
)
from meshwright.runtime.recorder import peak_bytes
from meshwright.runtime.run_folder import TrainingOptions
from meshwright.runtime.world import World


class StepEnd:
    """Runs the REDUCE_NORM and the OPTIMIZER_STEPs of one rank, and keeps what they find."""

    def __init__(
        self,
        interpreter: Interpreter,
        world: World,
        updates: Mapping[GradientKey, Update],
        precision: Precision,
        options: TrainingOptions,
        schedule: LearningRateSchedule | None = None,
    ) -> None:
        self.loss = self.norm = math.nan
        """Mean loss of the last step, and norm of its gradient before clipping."""
        self.peaks = [0] * world.size
        """Peak memory of every rank."""
        self.scale = LossScale(dynamic=precision == "fp16")
        self._player, self._world = interpreter, world
        self.updates = updates
        """The update of each bucket, by its key."""
        self._clip_norm, self._schedule = options.clip_norm, schedule
        self._by_bucket = not options.waits_for_norm(precision)
        fused = all(update.on_device for update in updates.values())
        self._on_device = fused and not self.scale.dynamic
        self._unread: Tensor | None = None
        """Sums over all ranks (loss, squared norm, ...) that the host has not read yet."""

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Returns all optimizers of this rank."""
        return [each.optimizer for each in self.updates.values() if each.optimizer is not None]

    def bind(self, i: Instruction) -> BoundInstruction:
        """Returns the function that runs an instruction of the end of a step."""
        run = self._reduce_norm if i.op is Op.REDUCE_NORM else self._optimizer_step
        return partial(run, i)

    def begin(self) -> None:
        """Prepares for the gradients of a new step."""
        self._player.own.reducer.zero()
        for update in self.updates.values():
            update.squared = None

    def finish(self, step: Step) -> None:
        """Reads the sums of the step, if that has not been done yet. Raises what `_read` raises."""
        if self._unread is not None:
            self._read(self._unread, step)

    def _reduce_norm(self, i: Instruction, step: Step) -> None:
        """Sums over all ranks: the loss, the squared norm, the number of parameters without
        gradient, and each rank's peak memory in an element of its own."""
        own, world, first = self._player.own, self._world, step.number == 0
        self._player.meet(partial(own.reducer.finish, own.buckets))
        self._player.finish()
        with self._player.measured(i):
            totals = torch.zeros(3 + world.size, dtype=torch.float64, device=world.device)
            totals[0] = self._player.loss()
            for update in self.updates.values():
                totals[1] += update.squared_norm(world.device)
            totals[2] = len(own.reducer.missing()) if first else 0
            totals[3 + world.rank] = peak_bytes(world.device)
            self._player.meet(partial(dist.all_reduce, totals, group=world.everyone))
        self._unread = totals
        if first or not (self._by_bucket or self._on_device):
            self._read(totals, step)

    def _read(self, totals: Tensor, step: Step) -> None:
        """Reads the sums, which waits for the device. Raises TrainingError, on all ranks alike."""
        self._unread = None
        self.loss, squared, without, *peaks = totals.tolist()
        self.peaks = [int(peak) for peak in peaks]
        self.norm = squared**0.5 / self.scale.value
        if without:
            stop_for_missing(self._player.own.reducer.missing(), self._world)
        weights = PARTLY_UPDATED if self._by_bucket and step.number > 0 else UNTOUCHED
        check_finite(step.number, self.loss, self.norm, self.scale, weights)

    def _optimizer_step(self, i: Instruction, step: Step) -> None:
        update = self.updates[i.layers, i.tied]
        rate = 1.0 if self._schedule is None else self._schedule(step.number)
        if self._by_bucket:
            self._player.meet(partial(self._player.own.reducer.finish, update.buckets))
            self._player.finish()
            with self._player.computing(i):
                self._update_bucket(update, rate)
        elif self._unread is not None:
            with self._player.computing(i):
                self._update_on_device(update, rate, self._unread)
        else:
            self._update_by_host(i, update, rate)

    def _update_bucket(self, update: Update, rate: float) -> None:
        """Updates one bucket's weights if its gradients are finite."""
        good = update.squared_norm(self._world.device).isfinite()
        if self._on_device:
            update.run_on_device(good, rate)
        elif good.item():
            update.run(1.0, rate)

    def _update_on_device(self, update: Update, rate: float, totals: Tensor) -> None:
        """Updates weights on the device if loss and norm are finite, which the host does not know
        yet."""
        assert self._clip_norm, "only clipped weights wait for the norm"
        factor = clip_factor_on_device(totals[1].sqrt(), self._clip_norm)
        update.run_on_device(totals[:2].isfinite().all(), rate, factor)

    def _update_by_host(self, i: Instruction, update: Update, rate: float) -> None:
        """Updates weights unless the norm, which the host has read, is an overflow of fp16."""
        overflow, scale = not math.isfinite(self.norm), self.scale.value
        self.scale.update(overflow)
        if not overflow:
            with self._player.computing(i):
                update.run(clip_factor(self.norm, self._clip_norm) / scale, rate)
