"""Layers by themselves: their time on the device against the datasheet, and the host's time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from gpu_findings import Findings
from gpu_training import (
    PlainLoop,
    Shape,
    batch_of,
    engine_of,
    graph_of,
    made,
    plan_of,
    shapes_for,
    sizes_of,
    start_alone,
    synchronize,
    without_storage,
)
from overhead import COMPUTING, Clock, medians, sampled, watch
from torch.utils import checkpoint  # noqa: F401 - imported ahead of the clock
from torch.utils._python_dispatch import TorchDispatchMode

from meshwright.cluster.catalog import catalog, type_reported_as
from meshwright.cluster.spec import DeviceType
from meshwright.cost.compute import layer_seconds
from meshwright.cost.constants import DEFAULT_DEVICE, DEFAULT_SYSTEM
from meshwright.cost.profile import LayerTime
from meshwright.profiling.layer_times import (
    DeviceStopwatch,
    LayerBenchmark,
    Stopwatch,
    distinct_layers,
    layer_times,
)

ROWS = (1, 2, 4, 8)
MADE_UP = DeviceType(
    name="made up",
    memory=1 << 34,
    memory_bandwidth=1e10,
    peak={"bf16": 1e10},
    matmul_efficiency=1.0,
    attention_efficiency=1.0,
    memory_efficiency=1.0,
)
"""Stands for a datasheet where there is no GPU: such figures say nothing."""


def device_type(device: torch.device) -> DeviceType | None:
    """The catalogue's entry of a device; None: it has none."""
    if device.type == "cpu":
        return MADE_UP
    name = type_reported_as(torch.cuda.get_device_name(device))
    return None if name is None else catalog()[name].type


def against_datasheet(device: torch.device, found: Findings) -> None:
    """A row for each kind of layer and number of rows."""
    start_alone(device)
    kind = device_type(device)
    found.table(
        "model", "layer", "rows", "forward, ms", "predicted", "ratio",
        "backward, ms", "predicted", "ratio", "spread",
    )  # fmt: skip
    if kind is None:
        found.note(f"{torch.cuda.get_device_name(device)} is not in the catalogue: no prediction.")
    elif kind is MADE_UP:
        found.note("Predicted for a made-up datasheet: only that it runs is of interest.")
    for name, shape in shapes_for(device).items():
        graph = graph_of(shape, "bf16")
        bench = bench_of(shape, DeviceStopwatch(device), sizes_of(device, 8, 2))
        for rows in ROWS[: sizes_of(device, len(ROWS), 2)]:
            seconds = None if kind is None else layer_seconds(graph, kind, 1, rows)
            for layer, measured in measured_layers(bench, rows):
                both = (
                    (None, None)
                    if seconds is None
                    else (float(seconds.forward[layer]), float(seconds.backward[layer]))
                )
                found.row(
                    name, graph.layers[layer].name, rows,
                    *_beside(measured.forward_seconds, both[0]),
                    *_beside(measured.backward_seconds, both[1]),
                    measured.spread,
                )  # fmt: skip


def _beside(measured: float, predicted: float | None) -> tuple[float, float | None, float | None]:
    """Milliseconds, and predicted over measured."""
    if predicted is None:
        return 1e3 * measured, None, None
    return 1e3 * measured, 1e3 * predicted, predicted / measured


def bench_of(shape: Shape, stopwatch: Stopwatch, repeats: int) -> LayerBenchmark:
    """The profile's own way of measuring layers."""
    row = torch.zeros(1, shape.sequence, dtype=torch.long)
    return LayerBenchmark(
        make_model=partial(without_storage, shape), graph=graph_of(shape, "bf16"),
        inputs=(row, row), device_type="here", stopwatch=stopwatch, repeats=repeats,
    )  # fmt: skip


def measured_layers(bench: LayerBenchmark, rows: int) -> list[tuple[int, LayerTime]]:
    """One of each kind, with its number in the model."""
    numbers = sorted(distinct_layers(bench.graph).values())
    times = layer_times(bench, layers=numbers, rows=rows, tensor=1)
    return list(zip(numbers, times, strict=True))


# The host.


class HostStopwatch:
    """Takes what the host spends to issue something, on a device that is idle before and is not
    waited for."""

    micro_batches = 1

    def __init__(self, device: torch.device, clock: Callable[[], float]) -> None:
        self.device, self.clock = device, clock

    def seconds(self, act: Callable[[], object]) -> float:
        """By the clock that was given, which may be the processor's."""
        synchronize(self.device)
        began = self.clock()
        act()
        spent = self.clock() - began
        synchronize(self.device)
        return spent


class OperationCounter:
    """Stands for a stopwatch, and counts operations of PyTorch instead of seconds."""

    micro_batches = 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def seconds(self, act: Callable[[], object]) -> float:
        """Their number."""
        with _Counting() as counting:
            act()
        return float(counting.operations)


class _Counting(TorchDispatchMode):
    """Counts what is dispatched, views included; autograd hands it on to its own threads."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        return func(*args, **(kwargs or {}))


def host(device: torch.device, found: Findings) -> None:
    """Layers and instructions of the smallest model, whose device waits for the host."""
    start_alone(device)
    found.table("what", "host, us", "processor, us", "operations", "us per operation", "stated, us")
    shape = next(iter(shapes_for(device).values()))
    _host_of_layers(shape, device, found)
    _host_of_instructions(shape, device, found)
    found.note(
        "Stated: launch_forward, launch_backward and instruction in cost/constants.py. "
        "Layers: from the call to its return, the device idle before; processor: of all threads. "
        "Instructions: what the interpreter adds to PyTorch's own calls; processor: the whole, of "
        "the thread that issues."
    )


def _host_of_layers(shape: Shape, device: torch.device, found: Findings) -> None:
    repeats = sizes_of(device, 30, 2)
    stopwatches = (
        HostStopwatch(device, time.perf_counter),
        HostStopwatch(device, time.process_time),
        OperationCounter(device),
    )
    measured = [
        measured_layers(bench_of(shape, each, 2 if each is stopwatches[2] else repeats), 1)
        for each in stopwatches
    ]
    stated = {"forward": DEFAULT_DEVICE.launch_forward, "backward": DEFAULT_DEVICE.launch_backward}
    for same in zip(*measured, strict=True):
        layer = graph_of(shape, "bf16").layers[same[0][0]].name
        for part, constant in stated.items():
            wall, processor, operations = (getattr(m, f"{part}_seconds") for _, m in same)
            found.row(
                f"{layer}, {part}", 1e6 * wall, 1e6 * processor, int(operations),
                1e6 * wall / operations, 1e6 * constant,
            )  # fmt: skip


def _host_of_instructions(shape: Shape, device: torch.device, found: Findings) -> None:
    """What a plain loop's step takes, then the interpreter's part of ours by operation."""
    batch, steps = batch_of(shape), sizes_of(device, 20, 4)
    plain, processor = PlainLoop(shape, device, "bf16"), []
    for _ in range(steps + 2):
        synchronize(device)
        began = time.process_time()
        plain.step(batch)
        processor.append(time.process_time() - began)
    step = 1e6 * statistics.median(processor[2:])
    found.row("step of the plain loop", None, step, None, None, None)
    clock = Clock()
    watch(clock)
    with engine_of(shape, plan_of(shape, "bf16"), device) as engine:
        blank = made(shape).to(device)
        samples = sampled(engine, batch, clock, blank, share=shape.rows, steps=steps)
    for op, (whole, _, rest) in medians([samples]).items():
        stated = 1e6 * DEFAULT_SYSTEM.instruction if op in COMPUTING else None
        found.row(f"instruction {op}", rest, whole, None, None, stated)
