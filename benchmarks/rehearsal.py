"""One rank of a plan on fake tensors: the runtime's own step, and the bytes that it holds.

No benchmark of its own: `memory.py` and the tests measure with it. The rank's stage, gradient
buckets, messages, schedule and optimizer are the runtime's; only processes and numbers are missing.
The process group is torch's fake one, in which every message has arrived at once. Attention and
RMS normalisation are counted as the fused kernels that accelerators have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools import fake_collectives  # noqa: F401 - lets fakes communicate
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

from meshwright.model.meter import FusedKernels
from meshwright.model.spec import LayerGraph
from meshwright.plan.ranks import placements_of, stage_placements
from meshwright.plan.spec import Plan
from meshwright.program.compile import compile_plan
from meshwright.program.instructions import Instruction, Program
from meshwright.runtime.build_stages import cut_for, set_precision
from meshwright.runtime.engine import Engine
from meshwright.runtime.handles import JointHandle
from meshwright.runtime.interpreter import Interpreter, Step
from meshwright.runtime.optimizer import OptimizerFactory, make_updates
from meshwright.runtime.rank_model import RankModel, build_local_layers
from meshwright.runtime.recorder import Recording
from meshwright.runtime.run_folder import TrainingOptions
from meshwright.runtime.stage import StageModule
from meshwright.runtime.step_end import StepEnd
from meshwright.runtime.training_loop import adamw
from meshwright.runtime.world import World, reduction_groups

STEPS = 2
"""Optimizer states are made by the first step, so that the second one holds most."""

OPTIMIZERS: dict[str, OptimizerFactory] = {
    "adamw": adamw(1e-4),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-4),
}


class _BlindEnd(StepEnd):
    """The end of a step, of which no value is read."""

    def _reduce_norm(self, i: Instruction, step: Step) -> None:  # noqa: ARG002
        own = self._player.own
        own.reducer.finish(own.buckets)
        self._player.finish()
        for update in self.updates.values():
            update.squared_norm(self._world.device)
        self.loss, self.norm = 0.0, 2.0


class _Rehearsal(Engine):
    """The engine of one rank alone, which must not look at values: fake tensors have none."""

    def __init__(self, plan: Plan, program: Program, own: RankModel, world: World) -> None:
        self.plan, self.program, self.world, self.rank = plan, program, world, world.rank
        self.steps = 0
        self._own = own
        self._player = Interpreter(own, plan, program.ranks[world.rank], Recording())
        make = OPTIMIZERS[plan.job.optimizer]
        update = make_updates(program.ranks[world.rank], own.reducer.buckets, make)
        self._end = _BlindEnd(self._player, world, update, plan.job.precision, TrainingOptions())
        self._actions = [(self._bind(i), i) for i in program.ranks[world.rank]]
        self._first_actions = self._actions


class _NoModules:
    """In place of MemTracker's accounts of modules, which need hooks that keep the modules' inputs
    and their gradients alive."""

    def register_user_hooks(self, *_: object) -> None:
        """They will never be called."""

    clear_user_hooks = register_user_hooks

    @property
    def is_bw(self) -> bool:
        """Whether a backward is under way."""
        return torch._C._current_graph_task_id() != -1

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


@contextmanager
def _fake_group(rank: int, size: int) -> Iterator[None]:
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def _fuse_again(stage: StageModule) -> None:
    """Kernels are fused in recomputed layers too: no mode around a backward reaches into it."""
    plain = stage._run_layer

    def fused(*args: Any) -> tuple[Tensor, ...]:
        with FusedKernels():
            return plain(*args)

    stage._run_layer = fused  # type: ignore[method-assign]


def _world(plan: Plan, program: Program, rank: int) -> World:
    """The fake group stands for every other."""
    everyone = dist.group.WORLD
    assert everyone is not None
    placement = placements_of(stage_placements(plan), rank)[0]
    return World(
        rank=rank,
        size=len(plan.devices),
        device=torch.device("cpu"),
        everyone=everyone,
        forward=everyone,
        backward=everyone,
        reduce=dict.fromkeys(reduction_groups(program), everyone),
        inside={"tensor": everyone} if placement.width("tensor") > 1 else {},
    )


def measured_peak(
    make_model: Callable[[], nn.Module],
    inputs: tuple[Tensor, ...],
    plan: Plan,
    graph: LayerGraph,
    rank: int,
    *,
    real: bool = False,
) -> int:
    """Most bytes of tensors that a rank holds in two steps, as MemTracker counts them; what it took
    for a moment to build the stage is not counted.

    `make_model` makes the model on the meta device; the rank must be the first of its
    tensor-parallel group. `real`: allocate and compute.
    """
    program = compile_plan(plan, graph)
    rows = placements_of(stage_placements(plan), rank)[0].rows
    with _fake_group(rank, len(plan.devices)):
        world = _world(plan, program, rank)
        model = make_model()
        set_precision(model, plan.job.precision)
        cuts = cut_for(model, inputs, plan.job.precision, rows[1] - rows[0])
        tracker = MemTracker()
        tracker._mod_tracker = _NoModules()
        fake = nullcontext() if real else FakeTensorMode(allow_non_fake_inputs=True)
        with fake, nullcontext() if real else FusedKernels(), tracker:
            own = build_local_layers(
                model, cuts, plan, program, world,
                options=TrainingOptions(), posted=lambda _, works: JointHandle(works),
            )  # fmt: skip
            if not real:
                for place in own.stages.values():
                    _fuse_again(place.stage)
            tracker._peak_mem.clear()
            engine = _Rehearsal(plan, program, own, world)

            def batch(first: int, last: int) -> tuple[Tensor, ...]:
                return tuple(
                    t.new_zeros((last - first, *t.shape[1:]), device="cpu") for t in inputs
                )

            for _ in range(STEPS):
                engine.step(batch)
    return int(tracker.get_tracker_snapshot("peak")[world.device]["Total"])
