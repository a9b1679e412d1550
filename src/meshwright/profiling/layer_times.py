"""Measures the times of layers and optimizer on this rank's device, through the runtime's own
stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median, quantiles
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshwright.cost.profile import LayerTime, OptimizerTime
from meshwright.model.graph import LayeredModel
from meshwright.model.spec import LayerGraph
from meshwright.plan.mesh import AXES, Mesh, mesh_of
from meshwright.plan.ranks import RankPlacement, StagePlacement
from meshwright.plan.spec import Stage as PlanStage
from meshwright.runtime.build_stages import BuiltStage, build_stages, cut_for, set_precision
from meshwright.runtime.optimizer import OptimizerFactory
from meshwright.runtime.parameters import parameters_of
from meshwright.runtime.stage import StageModule
from meshwright.techniques.tensor_parallel.runtime import TensorParallelGroup

Model = Callable[[], nn.Module]
"""Function that makes the model anew, on the meta device."""


WARM_UP = 4
"""Number of first repeats that do not count."""


class Stopwatch(Protocol):
    """Measures how long something takes on this rank's device."""

    @property
    def device(self) -> torch.device:
        """Returns the device that computes."""

    @property
    def micro_batches(self) -> int:
        """Returns the number of micro-batches to be measured at a time."""

    def seconds(self, act: Callable[[], object]) -> float:
        """Returns the seconds that `act` takes."""


class DeviceStopwatch:
    """Measures seconds on a real device."""

    micro_batches = 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def seconds(self, act: Callable[[], object]) -> float:
        """Returns the seconds that `act` takes on the device."""
        if self.device.type == "cuda":
            began, ended = (_event() for _ in range(2))
            torch.cuda.synchronize(self.device)
            began.record()
            act()
            ended.record()
            torch.cuda.synchronize(self.device)
            return float(began.elapsed_time(ended)) / 1000
        start = time.perf_counter()
        act()
        return time.perf_counter() - start


@dataclass(frozen=True, kw_only=True)
class LayerBenchmark:
    """Holds the model to measure, the stopwatch of the device, and the number of repeats."""

    make_model: Model
    graph: LayerGraph
    inputs: tuple[Tensor, ...]
    """An example batch with one row."""
    device_type: str
    """Type of this rank's device."""
    stopwatch: Stopwatch
    repeats: int


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def distinct_layers(model: LayerGraph) -> dict[str, int]:
    """Maps each signature to the number of the first layer that has it."""
    return {layer.signature: n for n, layer in reversed([*enumerate(model.layers)])}


def layer_times(
    bench: LayerBenchmark, *, layers: Iterable[int], rows: int, tensor: int
) -> Iterator[LayerTime]:
    """Measures each of the layers at one size; yields the medians of the repeats after the
    warm-up."""
    for layer, stage, built in _stages_of(bench, layers, rows, tensor):
        turns = _StageTimer(bench.stopwatch, stage, built, _batch_of(stage, built, bench, rows))
        yield _time_of(turns, bench, layer=layer, rows=rows, tensor=tensor)


def _time_of(
    turns: _StageTimer, bench: LayerBenchmark, *, layer: int, rows: int, tensor: int
) -> LayerTime:
    """Measures one layer. Every second repeat is followed by one with a split backward. Its forward
    takes longer than an ordinary one: the difference is added to the first part of the backward,
    since the two always come together."""
    wholes, parts = [], []
    for turn in range(bench.repeats + WARM_UP):
        wholes.append(turns.whole())
        if turn % 2:
            parts.append(turns.in_parts())
    forward, backward = zip(*wholes[WARM_UP:], strict=True)
    prepared, inputs, weights = zip(*parts, strict=True)
    preparing = max(0.0, median(prepared) - median(forward))
    return LayerTime(
        device=bench.device_type,
        signature=bench.graph.layers[layer].signature,
        precision=bench.graph.precision,
        tensor=tensor,
        rows=rows,
        forward_seconds=median(forward),
        backward_seconds=median(backward),
        input_seconds=preparing + median(inputs),
        weight_seconds=median(weights),
        spread=max(_spread(forward), _spread(backward)),
    )


@dataclass(frozen=True)
class _StageTimer:
    """Runs a stage forward and backward on micro-batches, repeatedly, and returns the seconds for
    one micro-batch."""

    stopwatch: Stopwatch
    stage: StageModule
    built: BuiltStage
    batch: dict[str, Tensor]

    @property
    def micro_batches(self) -> range:
        """Returns the micro-batches of one measurement."""
        return range(self.stopwatch.micro_batches)

    def whole(self) -> tuple[float, float]:
        """Returns the seconds of forward and backward."""
        forward = self._forward(split=False)
        return forward, self._backward(self.stage.backward)

    def in_parts(self) -> tuple[float, float, float]:
        """Returns the seconds of a forward that prepares a split backward, of that backward's first
        part (gradients of inputs), and of its second (gradients of weights)."""
        forward = self._forward(split=True)
        inputs = self._backward(self.stage.backward_input)
        return forward, inputs, self._seconds([partial(self.stage.backward_weight, (m,))
                                               for m in self.micro_batches])  # fmt: skip

    def _forward(self, *, split: bool) -> float:
        received = [
            [_like(t.shape, t.dtype, self.stage.device) for t in self.built.incoming]
            for _ in self.micro_batches
        ]
        run = partial(self.stage.forward, step=0, first_row=0, split=split)
        return self._seconds([partial(run, m, received[m], self.batch) for m in self.micro_batches])

    def _backward(self, run: Callable[[int, list[Tensor], float], object]) -> float:
        given = [_gradients(self.stage, self.built) for _ in self.micro_batches]
        return self._seconds([partial(run, m, given[m], 1.0) for m in self.micro_batches])

    def _seconds(self, acts: Sequence[Callable[[], object]]) -> float:
        return self.stopwatch.seconds(lambda: [act() for act in acts]) / len(acts)


def _stages_of(
    bench: LayerBenchmark, layers: Iterable[int], rows: int, tensor: int
) -> Iterator[tuple[int, StageModule, BuiltStage]]:
    """Yields each layer as a stage of its own, as the first of `tensor` ranks would hold it; only
    one at a time has storage."""
    graph, device = bench.graph, bench.stopwatch.device
    # A group of one rank: only compute is measured here, communication has its own price.
    tensor_group = TensorParallelGroup(_alone(), index=0, width=tensor) if tensor > 1 else None
    model, cuts = _cut(bench, rows)
    parameters = parameters_of(model, cuts[0])
    for n, layer in enumerate(layers):
        if n and tensor_group is not None:  # divided modules cannot be made whole again
            model, cuts = _cut(bench, rows)
        placements = _seats(layer, rows, of=len(graph.layers))
        (built,) = build_stages(
            model, cuts, parameters, (placements,), seed=0, device=device, tensor_group=tensor_group
        )
        yield layer, StageModule(built, graph.precision, device, seed=0), built
        for part in built.parts:
            part.module.to("meta")


def _cut(bench: LayerBenchmark, rows: int) -> tuple[nn.Module, tuple[LayeredModel, LayeredModel]]:
    """Makes a new model on the meta device and cuts it into layers."""
    model = bench.make_model()
    set_precision(model, bench.graph.precision)
    return model, cut_for(model, bench.inputs, bench.graph.precision, rows)


def _seats(layer: int, rows: int, *, of: int) -> StagePlacement:
    stage = PlanStage(layers=(layer, layer + 1), devices=(("",),))
    mesh = mesh_of(stage)
    placement = RankPlacement(
        rank=0,
        device="",
        pipeline=0,
        stage=0,
        coordinates=mesh.coordinates[0],
        widths=tuple(map(mesh.width, AXES)),
        rows=(0, rows),
    )
    return StagePlacement(
        number=0,
        pipeline=0,
        is_first=layer == 0,
        is_last=layer == of - 1,
        position=0,
        layers=stage.layers,
        plan_stage=stage,
        mesh=Mesh(members=(placement,), inner_widths=mesh.inner_widths),
    )


def _alone() -> dist.ProcessGroup:
    """Makes a process group of this rank alone."""
    mine = None
    for rank in range(dist.get_world_size()):
        group = cast("dist.ProcessGroup", dist.new_group([rank]))
        mine = group if rank == dist.get_rank() else mine
    assert mine is not None
    return mine


def _batch_of(
    stage: StageModule, built: BuiltStage, bench: LayerBenchmark, rows: int
) -> dict[str, Tensor]:
    whole = dict(zip(built.inputs, bench.inputs, strict=True))
    return {
        name: _like((rows, *whole[name].shape[1:]), whole[name].dtype, bench.stopwatch.device)
        for name in stage.reads
    }


def _like(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if dtype.is_floating_point:
        return torch.randn(shape, dtype=dtype, device=device)
    return torch.zeros(shape, dtype=dtype, device=device)


def _gradients(stage: StageModule, built: BuiltStage) -> list[Tensor]:
    if stage.makes_loss:
        return []
    return [_like(t.shape, t.dtype, stage.device) for t in built.outgoing if t.gradient]


def _spread(samples: Sequence[float]) -> float:
    low, _, high = quantiles(samples, n=4)
    return (high - low) / median(samples)


def optimizer_time(bench: LayerBenchmark, optimizer: OptimizerFactory, name: str) -> OptimizerTime:
    """Measures an optimizer step over the smallest and the largest layer; the line through both
    gives overhead and seconds per parameter.

    Gradient clipping and zeroing of gradients are included.
    """
    points = []
    for _, _, built in _stages_of(bench, _smallest_and_largest(bench.graph), 1, 1):
        parameters = [
            one.parameter for one in built.local_parameters if one.parameter.requires_grad
        ]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        act = _optimizer_step(optimizer(parameters), parameters)
        samples = [bench.stopwatch.seconds(act) for _ in range(bench.repeats + 2)][2:]
        points.append((sum(p.numel() for p in parameters), median(samples)))
    (few, quick), (many, slow) = points
    slope = (slow - quick) / (many - few) if many > few and slow > quick else slow / many
    return OptimizerTime(
        device=bench.device_type,
        optimizer=name,
        seconds_per_parameter=slope,
        overhead_seconds=max(0.0, quick - slope * few),
    )


def _smallest_and_largest(graph: LayerGraph) -> Iterator[int]:
    sized = sorted(range(len(graph.layers)), key=lambda n: graph.layers[n].parameters)
    trainable = [n for n in sized if graph.layers[n].parameters]
    yield from (trainable[0], trainable[-1])


def _optimizer_step(
    stepper: torch.optim.Optimizer, parameters: list[nn.Parameter]
) -> Callable[[], None]:
    def act() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1e-3)
        stepper.step()
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad.zero_()

    return act
