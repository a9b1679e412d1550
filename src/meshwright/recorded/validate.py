"""Checks runs of other tools: layouts that contradict themselves, and figures that cannot be."""

from __future__ import annotations

from collections.abc import Iterator

from meshwright.cluster.spec import DeviceType
from meshwright.errors import Problem
from meshwright.model.config import NAMED, size_problems
from meshwright.recorded.spec import (
    SHAPE,
    SHARDED,
    RecordedRun,
    seconds_at,
    shape_of,
    step_flops,
    step_seconds_of,
)
from meshwright.units import format_bytes, format_flops, format_seconds

AGREEMENT = 0.05
"""The most by which a step time and a throughput of the same run may differ: figures are
rounded."""


def run_problems(run: RecordedRun, place: str) -> Iterator[Problem]:
    """Yields a Problem for everything in a run that cannot be, whatever its devices are."""
    shaped = list(_shape_problems(run, place))
    yield from shaped
    yield from _layout_problems(run, place)
    if not shaped:
        yield from _division_problems(run, place)
        yield from _figure_problems(run, place)


def _shape_problems(run: RecordedRun, place: str) -> Iterator[Problem]:
    if run.layers is None and run.model in NAMED:
        return
    missing = [name for name in SHAPE if getattr(run, name) is None]
    if missing:
        wanted = f"a model known by name, or its {', '.join(missing)} as well"
        yield Problem(place, "model", run.model, wanted, f"known: {', '.join(NAMED)}")
        return
    yield from size_problems(shape_of(run), place)


def _layout_problems(run: RecordedRun, place: str) -> Iterator[Problem]:
    world = run.data * run.tensor * run.stages
    if world != run.devices:
        product = f"{run.data} x {run.tensor} x {run.stages}"
        wanted = f"data x tensor x stages = {product} = {world}"
        yield Problem(place, "devices", str(run.devices), wanted)
    if run.devices > run.devices_per_node and run.devices % run.devices_per_node:
        wanted = f"a multiple of devices_per_node = {run.devices_per_node}"
        yield Problem(place, "devices", str(run.devices), wanted)
    if run.devices > run.devices_per_node and run.network is None:
        wanted = "the bandwidth of a node, as several nodes are in use"
        yield Problem(place, "network", "nothing", wanted, 'such as "400 Gbit/s"')
    if run.global_batch % (run.data * run.rows):
        wanted = f"a multiple of data x rows = {run.data} x {run.rows}"
        yield Problem(place, "global_batch", str(run.global_batch), wanted)
    if run.sharding in SHARDED and (run.tensor, run.stages) != (1, 1):
        wanted = "none or optimizer, with several stages or tensor ranks"
        yield Problem(place, "sharding", run.sharding, wanted)
    if run.chunks > 1 and run.schedule not in (None, "interleaved-1f1b"):
        wanted = "interleaved-1f1b, which alone plays several chunks on a device"
        yield Problem(place, "schedule", str(run.schedule), wanted)
    if run.schedule == "interleaved-1f1b" and (run.chunks == 1 or run.stages == 1):
        wanted = "more than 1, with more than one stage, for interleaved-1f1b"
        yield Problem(place, "chunks", str(run.chunks), wanted)


def _division_problems(run: RecordedRun, place: str) -> Iterator[Problem]:
    shape = shape_of(run)
    if shape.heads % run.tensor:
        wanted = f"a divisor of the {shape.heads} attention heads"
        yield Problem(place, "tensor", str(run.tensor), wanted)
    parts = run.stages * run.chunks
    most = shape.layers + (2 if run.cut == "all" else 0)
    if parts > most:
        wanted = f"at most the {most} layers that are cut"
        yield Problem(place, "stages", f"{run.stages} x {run.chunks} chunks", wanted)


def _figure_problems(run: RecordedRun, place: str) -> Iterator[Problem]:
    """Yields the problems of what was measured."""
    if run.step is None and run.throughput is None and run.memory is None:
        yield Problem(place, "step", "nothing measured", "a step, a throughput or a memory")
    if run.throughput is None:
        return
    if "FLOP" in run.throughput and run.flops is None:
        wanted = "model or hardware: what the TFLOP/s count"
        yield Problem(place, "flops", "nothing", wanted)
        return
    try:
        seconds = seconds_at(run, run.throughput)
    except ValueError as failure:
        yield Problem(place, "throughput", repr(run.throughput), str(failure))
        return
    if run.step is not None and abs(run.step / seconds - 1) > AGREEMENT:
        wanted = f"{format_seconds(run.step)} a step, as the column step says"
        yield Problem(place, "throughput", f"{format_seconds(seconds)} a step", wanted)


def device_problems(run: RecordedRun, kind: DeviceType, place: str) -> Iterator[Problem]:
    """Yields a Problem for everything that the run's device type cannot do."""
    peak = kind.peak.get(run.precision)
    if peak is None:
        wanted = f"one that {kind.name} offers: {', '.join(kind.peak)}"
        yield Problem(place, "precision", run.precision, wanted)
        return
    seconds = step_seconds_of(run)
    if seconds is not None:
        reached = step_flops(run) / seconds / run.devices
        if reached > peak:
            column = "throughput" if run.step is None else "step"
            wanted = f"at most the peak of {kind.name}, {format_flops(peak)}"
            mend = "check the unit, the batch and the shape of the model"
            yield Problem(place, column, f"{format_flops(reached)} a device", wanted, mend)
    if run.memory is not None and run.memory > kind.memory * MOST_OF_A_DEVICE:
        wanted = f"at most what {kind.name} has, {format_bytes(kind.memory)}"
        yield Problem(place, "memory", format_bytes(run.memory), wanted)


MOST_OF_A_DEVICE = 1.1
"""Memory that a run may have used over the catalogue's, which leaves out what a driver keeps and
takes the smallest of several editions."""
