"""Order on a device: NCCL's collectives in a world of one, and what the runtime issues."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from gpu_findings import Findings
from gpu_training import (
    Shape,
    batch_of,
    engine_of,
    engine_step,
    plan_of,
    shapes_for,
    start_alone,
)
from torch import Tensor

from meshwright.plan.spec import Plan, StateDivision
from meshwright.program.instructions import Program
from meshwright.program.timeline import Interval, Timeline
from meshwright.runtime.engine import Engine
from meshwright.runtime.world import World, reduction_groups

MIB = 2**20
SIZES_MIB = (1, 16, 256)
BUSY_SECONDS = 0.02
"""For which a stream is kept busy where order is tested: long beside any of the collectives."""
REPEATS = 10
RACE_SECONDS = 2e-5
"""Two streams that wait for the same moment may note it so far apart."""

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

Start = Callable[[Tensor, Tensor], Any]
"""Starts a collective from one tensor into another; what it returns can be waited for."""


def _start_all_reduce(out: Tensor, data: Tensor) -> Any:
    out.copy_(data)
    return dist.all_reduce(out, async_op=True)


COLLECTIVES: dict[str, Start] = {
    "all-reduce": _start_all_reduce,
    "all-gather": lambda out, data: _all_gather(out, data, async_op=True),
    "reduce-scatter": lambda out, data: _reduce_scatter(out, data, async_op=True),
}


def collectives_are_identities(device: torch.device, size_mib: int) -> list[str]:
    """The collectives that do not give back, in a world of one, what they were given."""
    data = torch.arange(size_mib * MIB // 4, dtype=torch.float32, device=device)
    wrong = []
    for name, start in COLLECTIVES.items():
        out = torch.full_like(data, -1.0)
        start(out, data).wait()
        if not torch.equal(out, data):
            wrong.append(name)
    return wrong


# NCCL by itself.


def nccl(device: torch.device, found: Findings) -> None:
    """A row for the start, one for each collective and size, and one for each question of order."""
    found.table("what", "MiB", "host, us", "device, us", "GB/s", "as it should")
    one = torch.zeros(1, device=device)  # the context is there before the clock runs
    free, began = torch.cuda.mem_get_info(device)[0], time.perf_counter()
    start_alone(device)
    dist.all_reduce(one)
    torch.cuda.synchronize(device)
    taken = (free - torch.cuda.mem_get_info(device)[0]) // MIB
    found.row("init and first all-reduce", taken, 1e6 * (time.perf_counter() - began),
              None, None, True)  # fmt: skip
    for size in SIZES_MIB:
        wrong = collectives_are_identities(device, size)
        data = torch.ones(size * MIB // 4, device=device)
        out = torch.empty_like(data)
        for name, start in COLLECTIVES.items():
            host, own = _timed(lambda: start(out, data), device)  # noqa: B023 - called at once
            found.row(name, size, 1e6 * host, 1e6 * own, size * MIB / own / 1e9, name not in wrong)
        found.check(not wrong, f"{size} MiB: {', '.join(wrong)} changed what a world of one has")
    for name, start in COLLECTIVES.items():
        _order(name, start, device, found)
    found.note("MiB of the first row: what the communicator took from the device.")
    found.note("A world of one copies, or does nothing: GB/s are those of the device's memory.")


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _timed(start: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Medians: seconds of the host to start a collective, and of the device until it is through."""
    host, own = [], []
    for _ in range(REPEATS):
        torch.cuda.synchronize(device)
        first, began = _event(), time.perf_counter()
        work = start()
        host.append(time.perf_counter() - began)
        work.wait()
        last = _event()
        torch.cuda.synchronize(device)
        own.append(first.elapsed_time(last) / 1e3)
    return statistics.median(host), statistics.median(own)


def _cycles(device: torch.device) -> int:
    """For which a device spins BUSY_SECONDS; measured, since clocks differ."""
    tried = 10_000_000
    for _ in range(2):  # the first one wakes the device up
        first = _event()
        torch.cuda._sleep(tried)
        last = _event()
        torch.cuda.synchronize(device)
    return int(tried * BUSY_SECONDS / (first.elapsed_time(last) / 1e3))


def _order(name: str, start: Start, device: torch.device, found: Findings) -> None:
    """A collective follows what was issued before it, and does not wait for what comes after."""
    data = torch.ones(16 * MIB // 4, device=device)
    out, cycles = torch.empty_like(data), _cycles(device)
    torch.cuda.synchronize(device)
    first = _event()
    torch.cuda._sleep(cycles)
    work = start(out, data)
    after = _ended(work, device)
    work.wait()
    torch.cuda.synchronize(device)
    follows = first.elapsed_time(after) / 1e3
    first = _event()
    work = start(out, data)
    torch.cuda._sleep(cycles)
    beside = _ended(work, device)
    last = _event()
    torch.cuda.synchronize(device)
    overlaps, whole = (first.elapsed_time(end) / 1e3 for end in (beside, last))
    for words, seconds, holds in (
        ("follows earlier compute", follows, follows >= 0.5 * BUSY_SECONDS),
        ("runs beside later compute", overlaps, overlaps < 0.5 * whole),
    ):
        found.row(f"{name} {words}", 16, None, 1e6 * seconds, None, holds)
        found.check(holds, f"{name}: not so that it {words}")


def _ended(work: Any, device: torch.device) -> torch.cuda.Event:
    """The moment at which a collective is through, on a stream that waits for nothing else."""
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        work.wait()
        return _event()


# What the runtime issues.


def streams(device: torch.device, found: Findings) -> None:
    """The first of two replicas, whose sums are those of a world of one: what each collective
    follows and what it runs beside, and whether copies of the batch wait for the device."""
    start_alone(device)
    found.table(
        "program", "collective", "number", "median, us", "beside compute",
        "follows what it needs", "ends before updates",
    )  # fmt: skip
    shape = [*shapes_for(device).values()][-1]
    for name, states in (("sums", None), ("divided states", StateDivision(optimizer="all"))):
        plan = plan_of(shape, "bf16", data=2, states=states)
        with engine_of(shape, plan, device, world=_alone(device), bucket_bytes=_bucket(shape)) as e:
            timeline, order = recorded(e, batch_of(shape))
        _rows(name, timeline, order, found)
    if device.type == "cuda":
        _copies(shape, device, found)
    else:
        found.note("copies and compute on CUDA streams: needs CUDA: skipped")


def _bucket(shape: Shape) -> int:
    """So that every block has one."""
    return 4 * 12 * shape.width**2


def _alone(device: torch.device) -> Callable[[Plan, Program], World]:
    """This process is rank 0, and the only one in every group; sums are those of its own."""

    def world(plan: Plan, program: Program) -> World:
        everyone = dist.group.WORLD
        assert everyone is not None
        return World(
            rank=0, size=len(plan.devices), device=device, everyone=everyone, forward=everyone,
            backward=everyone, reduce=dict.fromkeys(reduction_groups(program), everyone),
            owned=False,
        )  # fmt: skip

    return world


def recorded(engine: Engine, batch: tuple[Tensor, Tensor]) -> tuple[Timeline, list[str]]:
    """A step as its events saw it, after some that warm up; and its operations in their order."""
    for _ in range(3):
        engine_step(engine, batch)
    _, timeline = engine.record(lambda first, last: tuple(x[first:last] for x in batch))
    assert timeline is not None
    return timeline, [str(i.op) for i in engine.program.ranks[0]]


def _rows(name: str, timeline: Timeline, order: Sequence[str], found: Findings) -> None:
    """A row for each collective on gradients or weights, as the program's order has them."""
    compute = [each for each in timeline.intervals if each.op in ("F", "B")]
    updates = [each for each in timeline.intervals if each.op == "OPTIMIZER_STEP"]
    last = max(each.start_seconds for each in compute)
    first_update = min(each.start_seconds for each in updates)
    for op in dict.fromkeys(order):
        own = [each for each in timeline.intervals if each.op == op]
        if op in ("REDUCE_GRAD", "REDUCE_SCATTER"):
            after = all(each.start_seconds >= last for each in own)
            before = all(each.end_seconds <= first_update + RACE_SECONDS for each in own)
        elif op == "GATHER_PARAMETERS":
            after, before = all(each.start_seconds >= first_update for each in own), None
        else:
            continue
        beside = sum(any(_overlap(each, other) for other in compute) for each in own)
        median = statistics.median(each.end_seconds - each.start_seconds for each in own)
        found.row(name, op, len(own), 1e6 * median, beside, after, before)
        found.check(after, f"{name}: {op} does not follow what it sums or gathers")
        found.check(before is not False, f"{name}: {op} ends after an update of weights began")


def _overlap(a: Interval, b: Interval) -> bool:
    return a.start_seconds < b.end_seconds and b.start_seconds < a.end_seconds


def _copies(shape: Shape, device: torch.device, found: Findings) -> None:
    """How long the host takes to hand over a batch while the device is busy: as it lies in memory,
    and pinned."""
    cycles, (tokens, _) = _cycles(device), batch_of(shape)
    for kind, batch in (("pageable", tokens), ("pinned", tokens.pin_memory())):
        torch.cuda.synchronize(device)
        torch.cuda._sleep(cycles)
        began = time.perf_counter()
        batch.to(device, non_blocking=True)
        seconds = time.perf_counter() - began
        torch.cuda.synchronize(device)
        waits = seconds >= 0.5 * BUSY_SECONDS
        found.note(
            f"A batch of {batch.nbytes} bytes, {kind}: the host takes {1e6 * seconds:.0f} us to "
            f"hand it over, and {'waits' if waits else 'does not wait'} for a device that is busy."
        )
