"""Steps on one device: our runtime against a plain loop, and what reading the loss costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_findings import Findings
from gpu_training import (
    PlainLoop,
    Shape,
    batch_of,
    engine_of,
    engine_step,
    plan_of,
    shapes_for,
    sizes_of,
    start_alone,
    synchronize,
)

from meshwright.runtime.engine import Engine

WARM_UP = 3
"""Steps that do not count: kernels are chosen, memory is taken."""
LOSS_STEPS = 5
"""That must have equal losses; later, differences of rounding have grown."""
LOSS_TOLERANCE = 0.01
"""Relative: bf16 keeps three digits, and sums may be in another order."""
SIDE_SECONDS = 20.0
"""For the steps of one shape, whatever their number."""


def eager(device: torch.device, found: Findings) -> None:
    """Step by step in turns, in one process."""
    compare(device, found, compile=False)


def compiled(device: torch.device, found: Findings) -> None:
    """The same with torch.compile on both sides, layer by layer."""
    compare(device, found, compile=True)


def compare(device: torch.device, found: Findings, *, compile: bool) -> None:
    """A row for each shape: medians of both sides, their ratio turn by turn, and their losses."""
    start_alone(device)
    found.table(
        "model", "ours, ms", "plain, ms", "ours / plain", "quartiles", "host, ours / plain",
        f"loss {LOSS_STEPS}, ours", "plain", "apart, %", "steps",
    )  # fmt: skip
    for name, shape in shapes_for(device).items():
        batch = batch_of(shape)
        plain = PlainLoop(shape, device, "bf16", compile=compile)
        with engine_of(shape, plan_of(shape, "bf16"), device, compile=compile) as engine:
            sides = {
                "ours": lambda: engine_step(engine, batch),  # noqa: B023 - called in this turn
                "plain": lambda: plain.step(batch).item(),  # noqa: B023
            }
            seconds, host, losses = in_turns(sides, device, sizes_of(device, 40, 2))
        report(found, name, seconds, host, losses)


Samples = dict[str, list[float]]


def in_turns(
    sides: dict[str, Callable[[], float]], device: torch.device, turns: int
) -> tuple[Samples, Samples, Samples]:
    """Seconds of each step, of them the processor's, and losses, by side: each begins every second
    turn."""
    seconds: Samples = {name: [] for name in sides}
    host: Samples = {name: [] for name in sides}
    losses: Samples = {name: [] for name in sides}
    end = time.perf_counter() + SIDE_SECONDS
    for turn in range(WARM_UP + turns):
        if turn >= WARM_UP + 2 and time.perf_counter() > end:
            break
        order = list(sides.items())
        for name, step in order if turn % 2 else reversed(order):
            synchronize(device)
            began = time.perf_counter(), time.process_time()
            losses[name].append(step())
            synchronize(device)
            if turn >= WARM_UP:
                seconds[name].append(time.perf_counter() - began[0])
                host[name].append(time.process_time() - began[1])
    return seconds, host, losses


def report(found: Findings, name: str, seconds: Samples, host: Samples, losses: Samples) -> None:
    """The row of a model, and whether both sides learnt the same."""
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["plain"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    ours, plain = (statistics.median(seconds[side]) for side in ("ours", "plain"))
    processor = statistics.median(host["ours"]) / statistics.median(host["plain"])
    both = [*zip(losses["ours"], losses["plain"], strict=True)][:LOSS_STEPS]
    apart = max(abs(a - b) / abs(b) for a, b in both)
    found.row(
        name, 1e3 * ours, 1e3 * plain, middle, f"{low:.3f}-{high:.3f}", processor, *both[-1],
        100 * apart, len(ratios),
    )  # fmt: skip
    found.check(apart <= LOSS_TOLERANCE, f"{name}: losses differ by up to {100 * apart:.2g} %")


# The read at the end of a step.


def read(device: torch.device, found: Findings) -> None:
    """Steps one after the other: what the host waits for in the read, and how long the device then
    stands still."""
    start_alone(device)
    found.table(
        "model", "side", "step, ms", "wait in the read, ms", "share of the step",
        "device idle between steps, ms", "steps",
    )  # fmt: skip
    steps = sizes_of(device, 30, 2)
    for name, shape in shapes_for(device).items():
        for side, run in sides_of_read(shape, device).items():
            step, waited, idle = run(steps)
            found.row(name, side, 1e3 * step, 1e3 * waited, waited / step, idle, steps)
    found.note(
        "The wait is what could hide behind the read: the host has issued the whole step by then. "
        "The idle time is what the read costs, since nothing is issued until it has returned."
    )


def sides_of_read(shape: Shape, device: torch.device) -> dict[str, Callable[[int], Any]]:
    """Our runtime, which reads at the end of each step, and a plain loop that reads or not."""
    return {
        "ours": lambda steps: ours_reading(shape, device, steps),
        "plain, reading": lambda steps: plain_reading(shape, device, steps, reads=True),
        "plain, not reading": lambda steps: plain_reading(shape, device, steps, reads=False),
    }


class ReadTimes:
    """What is noted around the reads of steps."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.waited = 0.0
        self._starts: list[Any] = []
        self._ends: list[Any] = []

    def begin(self) -> None:
        """A step begins: the device gets there as soon as it is given something."""
        self._mark(self._starts)

    def around(self, act: Callable[[], Any]) -> Any:
        """Of the read: all that the step computes has been issued."""
        self._mark(self._ends)
        began = time.perf_counter()
        value = act()
        self.waited += time.perf_counter() - began
        return value

    def _mark(self, events: list[Any]) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            events.append(event)

    def idle_ms(self) -> float | None:
        """From the end of one step's work to the start of the next one's; the median."""
        synchronize(self.device)
        pairs = zip(self._ends, self._starts[1:], strict=False)
        gaps = [end.elapsed_time(start) for end, start in pairs]
        return statistics.median(gaps) if gaps else None


def ours_reading(
    shape: Shape, device: torch.device, steps: int
) -> tuple[float, float, float | None]:
    """Seconds of a step, of them in the read, and the idle milliseconds between two."""
    batch = batch_of(shape)
    with engine_of(shape, plan_of(shape, "bf16"), device) as engine:
        for _ in range(WARM_UP):
            engine_step(engine, batch)
        times = ReadTimes(device)
        watch_reads(engine, times)

        def step() -> None:
            times.begin()
            engine_step(engine, batch)

        return repeated(step, steps, times)


def watch_reads(engine: Engine, times: ReadTimes) -> None:
    """Take the time of the engine's own read of loss and norm."""
    real = engine._end._read

    def read_sums(*arguments: Any) -> None:
        times.around(lambda: real(*arguments))

    engine._end._read = read_sums  # type: ignore[method-assign]


def plain_reading(
    shape: Shape, device: torch.device, steps: int, *, reads: bool
) -> tuple[float, float, float | None]:
    """The same of a plain loop."""
    batch, plain = batch_of(shape), PlainLoop(shape, device, "bf16")
    for _ in range(WARM_UP):
        plain.step(batch)
    times = ReadTimes(device)

    def step() -> None:
        times.begin()
        loss = plain.step(batch)
        times.around(loss.item if reads else lambda: None)

    return repeated(step, steps, times)


def repeated(
    step: Callable[[], None], steps: int, times: ReadTimes
) -> tuple[float, float, float | None]:
    """Steps in a row; the device is waited for before the first and after the last."""
    synchronize(times.device)
    began = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize(times.device)
    return (time.perf_counter() - began) / steps, times.waited / steps, times.idle_ms()
