"""Runs a program on PyTorch: the loop over one rank's instructions."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

import torch.distributed as dist
from torch import Tensor, nn

from meshwright.model.spec import LayerGraph
from meshwright.model.trace import trace
from meshwright.plan.ranks import uses_tensor_parallelism
from meshwright.plan.spec import Plan
from meshwright.plan.validate import validate_plan
from meshwright.program.check import check_program
from meshwright.program.compile import compile_plan
from meshwright.program.instructions import Instruction
from meshwright.program.operations import Op
from meshwright.program.timeline import Timeline
from meshwright.records import record
from meshwright.runtime import world as worlds
from meshwright.runtime.build_stages import set_precision
from meshwright.runtime.interpreter import BoundInstruction, Interpreter, Step
from meshwright.runtime.observer import UNOBSERVED, Observer
from meshwright.runtime.optimizer import LearningRateSchedule, OptimizerFactory, make_updates
from meshwright.runtime.rank_model import build_rank_model
from meshwright.runtime.rank_state import RankState, collect_parameters
from meshwright.runtime.recorder import Recorder, Recording, gather_timeline, static_bytes
from meshwright.runtime.run_folder import TrainingOptions
from meshwright.runtime.stage import RowReader
from meshwright.runtime.step_end import StepEnd
from meshwright.runtime.torch_compile import check_compilable
from meshwright.runtime.world import World


@record
class StepResult:
    """Holds the results of one optimizer step; loss and norm are the same on every rank."""

    loss: float
    """Mean loss over the rows of the global batch."""
    grad_norm: float
    """Norm of the whole model's gradient, before clipping."""
    seconds: float
    """Wall-clock time of the step on this rank, communication included."""


def _after_norm(action: tuple[BoundInstruction, Instruction]) -> bool:
    """True if an instruction changes weights, or passes changed ones on."""
    return action[1].op.ends_step and action[1].op is not Op.REDUCE_NORM


class Engine:
    """Trains on one rank: it holds the rank's layers and runs its instructions.

    `model` takes the batch's tensors and returns the mean loss over their rows; it may be on the
    meta device. `inputs` is an example batch with any number of rows. `learning_rate` gives the
    factor of the optimizer's own rates at each step, from 0. Unless weights wait for the norm
    (`TrainingOptions.waits_for_norm`), those of each bucket are updated as soon as its gradients
    are summed, and `optimizer` is called once for each bucket's parameters. `observer`: functions
    to be called as this rank works. `graph`: the layers of the model, which every rank traces
    itself if it is absent. Raises a MeshwrightError if plan, model and processes do not fit
    together.
    """

    def __init__(  # noqa: PLR0913 - all that a run is made of
        self,
        model: nn.Module,
        plan: Plan,
        *,
        inputs: tuple[Tensor, ...],
        optimizer: OptimizerFactory,
        options: TrainingOptions,
        learning_rate: LearningRateSchedule | None = None,
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
        waits = options.waits_for_norm(precision)
        self.program = compile_plan(plan, self.model, bucket_bytes=bucket_bytes, clipped=waits)
        check_program(self.program)
        if options.compile:
            check_compilable(plan, self.program)
        self.world = world or worlds.connect(plan, self.program, timeout_seconds=timeout)
        self.rank = self.world.rank
        self.steps = 0
        self._current: Instruction | None = None
        self._recording = Recording()
        with worlds.name_lost_peers(self.world, lambda: None):
            self._own = build_rank_model(
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
        self._player = Interpreter(self._own, plan, own, self._recording, observer)
        observer.attach(self.model, self._own)
        update = make_updates(own, self._own.reducer.buckets, optimizer)
        self._end = StepEnd(self._player, self.world, update, precision, options, learning_rate)
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

    def step(self, rows: RowReader) -> StepResult:
        """Runs one optimizer step on a global batch, of which each rank reads its own rows.

        Raises TrainingError, before any weight changes, if the loss or a gradient is non-finite or
        a parameter gets no gradient. Without clipping and after the first step only the buckets
        with non-finite gradients are left unchanged when it is raised. Raises PeerLost if another
        rank has gone.
        """
        started = time.perf_counter()
        step = Step(self.steps, rows, self._end.scale.value)
        self._player.start(step)
        self._end.begin()
        with worlds.name_lost_peers(self.world, lambda: self._player.waiting() or self._current):
            for act, instruction in self._actions if self.steps else self._first_actions:
                self._current = instruction
                act(step)
            self._player.wait()
            self._end.finish(step)
        self._current = None
        self.steps += 1
        seconds = time.perf_counter() - started
        return StepResult(loss=self._end.loss, grad_norm=self._end.norm, seconds=seconds)

    def record(self, rows: RowReader) -> tuple[StepResult, Timeline | None]:
        """Runs one step and measures each instruction; the Timeline is returned on rank 0 only.

        Raises what `step` raises.
        """
        with worlds.name_lost_peers(self.world, lambda: None):
            dist.barrier(group=self.world.everyone)
        own = self._own
        casts = [c for place in own.stages.values() for c in place.stage.casts.tensors()]
        recorder = self._recording.recorder = Recorder(
            self.program.ranks[self.rank],
            self.world.device,
            weights=[*(one.parameter for one in own.local_parameters), *casts],
            static_bytes=static_bytes(own.local_parameters, own.buckets, self._end.optimizers)
            + sum(cast.nbytes for cast in casts),
        )
        try:
            result = self.step(rows)
            measured = recorder.close()
        finally:
            self._recording.recorder = None
        with worlds.name_lost_peers(self.world, lambda: None):
            return result, gather_timeline(
                measured, self.program, self.plan.devices, self.world.everyone
            )

    def parameters(self) -> dict[str, Tensor] | None:
        """Returns every parameter, whole and on the CPU, by its name in the model; None on ranks
        other than 0."""
        with worlds.name_lost_peers(self.world, lambda: None):
            return collect_parameters(self.state(), self.world)

    def state(self) -> RankState:
        """Returns the weights and optimizer states of this rank, to be read and written between
        steps."""
        return RankState(self.plan, self.program, self._own, self._end.updates.values())

    @property
    def learning_rate(self) -> float:
        """Returns the last step's learning rate, of the first parameter group; 0 if this rank
        updates nothing."""
        return next((float(each.param_groups[0]["lr"]) for each in self._end.optimizers), 0.0)

    def memory_bytes(self) -> int:
        """Returns the largest peak memory of any rank: allocated on a GPU, resident on a CPU."""
        return max(self._end.peaks)

    def close(self) -> None:
        """Removes the gradient hooks from the model and leaves the process groups."""
        self._own.reducer.close()
        worlds.close(self.world)

    def _bind(self, i: Instruction) -> BoundInstruction:
        """Returns the function that runs an instruction."""
        ends = i.op in (Op.REDUCE_NORM, Op.OPTIMIZER_STEP)
        return self._end.bind(i) if ends else self._player.bind(i)


def _traced(model: nn.Module, inputs: tuple[Tensor, ...], plan: Plan) -> LayerGraph:
    """Traces the model for a plan: tensor widths are looked at only if a layer is divided."""
    job, shared = plan.job, uses_tensor_parallelism(plan)
    return trace(model, inputs, job.precision, job.sequence, plan.model.name, divided=shared)
