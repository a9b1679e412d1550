"""Prints plans and steps as tables in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby

from rich.console import Console
from rich.table import Table
from rich.text import Text

from meshwright.cost.memory import total_bytes
from meshwright.plan.mesh import mesh_text
from meshwright.plan.ranks import (
    StagePlacement,
    describe_plan,
    stage_placements,
)
from meshwright.plan.spec import DeviceMemory, Plan, RunnerUp
from meshwright.program.timeline import Timeline, busy_seconds
from meshwright.report.palette import MEMORY, PARTS
from meshwright.report.sentences import limits, parts_sentence, tokens_per_second
from meshwright.report.terminal import plain_text
from meshwright.simulate.critical_path import step_breakdown
from meshwright.units import format_bytes, format_seconds

_BAR = 28
"""Width of the bars in characters."""
_WIDE = 130
"""Number of columns from which a terminal has room for every kind of memory."""


def explain(plan: Plan, console: Console | None = None) -> None:
    """Prints the stages of a plan, the parts of a step, the memory of devices, and the
    runners-up."""
    console = console or Console()
    job = plan.job
    console.print(plain_text(describe_plan(plan), style="bold"))
    console.print(
        plain_text(
            f"{plan.model.name} on {plan.cluster.name}: {job.global_batch} rows of {job.sequence} "
            f"a step, {job.precision}, {job.optimizer}\n"
        )
    )
    console.print(plan_table(plan))
    prediction = plan.prediction
    if prediction is None:
        return
    seconds = prediction.step_seconds
    rate = tokens_per_second(plan, seconds)
    console.print()
    console.print(_speed(seconds, rate, "predicted"))
    console.print(parts_table({"predicted": prediction.parts}))
    if prediction.memory:
        console.print()
        console.print(device_memory_table(prediction.memory, wide=console.width >= _WIDE))
    console.print()
    for sentence in limits(plan):
        console.print(plain_text(f"• {sentence}"))
    if prediction.runners_up:
        console.print()
        console.print(runners_up_table(prediction.runners_up, seconds))
    if prediction.dropped:
        console.print()
        console.print(dropped_table(prediction.dropped))


def _speed(seconds: float, rate: float, source: str) -> Text:
    step = (f"{format_seconds(seconds)} a step", "bold")
    return Text.assemble(step, f", {rate:,.0f} tokens/s, {source}")


def plan_table(plan: Plan) -> Table:
    """Returns a table of the plan with one line per stage."""
    table = Table(box=None, pad_edge=False, title_justify="left")
    for name in ("stage", "layers", "count", "data x tensor", "rows", "devices"):
        table.add_column(name, justify="right" if name in ("stage", "count") else "left")
    rows = [pipeline.rows for pipeline in plan.pipelines]
    for stage in stage_placements(plan):
        if stage.is_first and len(plan.pipelines) > 1:
            pipeline = plan.pipelines[stage.pipeline]
            share = pipeline.rows * pipeline.micro_batches
            table.add_row(Text(f"pipeline {stage.pipeline}: {share} rows a step", style="italic"))
        first, last = stage.layers
        table.add_row(
            str(stage.number),
            f"{first}:{last}",
            str(last - first),
            mesh_text(stage.mesh),
            rows_text(stage, rows[stage.pipeline]),
            plain_text(devices_text(tuple(each.device for each in stage.mesh.members))),
        )
    return table


def rows_text(stage: StagePlacement, rows: int) -> str:
    """Formats the rows of a micro-batch, replica by replica: `8 = 4 + 4`."""
    shares = [replica[0].rows[1] - replica[0].rows[0] for replica in stage.mesh.replicas]
    if len(shares) == 1:
        return str(rows)
    if len(set(shares)) == 1:
        return f"{rows} = {len(shares)} x {shares[0]}"
    return f"{rows} = " + " + ".join(map(str, shares))


def devices_text(devices: tuple[str, ...]) -> str:
    """Formats device names, shortened where indices count up: `p3-0:0-3 g4-0:0`."""
    found = []
    split = [(node, int(index)) for node, _, index in (d.rpartition(":") for d in devices)]
    runs = groupby(enumerate(split), key=lambda item: (item[1][0], item[1][1] - item[0]))
    for (node, _), run in runs:
        indices = [index for _, (_, index) in run]
        end = f"-{indices[-1]}" if len(indices) > 1 else ""
        found.append(f"{node}:{indices[0]}{end}")
    return " ".join(found)


def parts_table(steps: Mapping[str, Mapping[str, float]]) -> Table:
    """Returns a table of the parts of a step: one line per part, one column per step."""
    table = Table(box=None, pad_edge=False)
    table.add_column("part")
    for name in steps:
        table.add_column(name, justify="right")
        table.add_column("share", justify="right")
    table.add_column("")
    longest = max((max(s.values(), default=0.0) for s in steps.values()), default=0.0)
    last = list(steps.values())[-1]
    for part, colour in PARTS.items():
        if not any(step.get(part) for step in steps.values()):
            continue
        cells: list[Text | str] = [part]
        for step in steps.values():
            seconds = step.get(part, 0.0)
            cells += [format_seconds(seconds), f"{seconds / sum(step.values()):.0%}"]
        table.add_row(*cells, _bar(((last.get(part, 0.0), colour),), longest))
    return table


def _bar(pieces: tuple[tuple[float, str], ...], full: float) -> Text:
    """Draws a bar of coloured blocks. The ends of pieces are rounded, not their sizes, so that the
    total length is right."""
    text, done, drawn = Text(), 0.0, 0
    for size, colour in pieces:
        done += size
        end = round(_BAR * done / full) if full else 0
        text.append("█" * (end - drawn), style=colour)
        drawn = end
    return text


def device_memory_table(memory: tuple[DeviceMemory, ...], *, wide: bool = True) -> Table:
    """Returns a table of the peak memory of each device, by kind, and its capacity. Equal devices
    share a line.

    A dot marks free memory; a bar as long as the column is full. If not `wide`, the table fits 80
    columns and shows the kinds of memory by colour alone.
    """
    kinds = tuple(MEMORY) if wide else ()
    caption = None if wide else _legend()
    table = Table(box=None, pad_edge=False, caption=caption, caption_justify="right")
    table.add_column("memory of")
    for name in (*kinds, "total", "of"):
        table.add_column(name, justify="right")
    table.add_column("")
    for _, run in groupby(memory, key=_amounts):
        alike = tuple(run)
        one = alike[0]
        table.add_row(
            plain_text(devices_text(tuple(each.device for each in alike))),
            *(format_bytes(getattr(one, kind)) for kind in kinds),
            format_bytes(total_bytes(one)),
            format_bytes(one.capacity),
            _memory_bar(one),
        )
    return table


def _memory_bar(memory: DeviceMemory) -> Text:
    pieces = tuple((float(getattr(memory, kind)), colour) for kind, colour in MEMORY.items())
    bar = _bar(pieces, memory.capacity)
    return bar.append("·" * max(0, _BAR - len(bar)), style="dim")


def _legend() -> Text:
    """Returns the names of the kinds of memory in their colours."""
    return Text(" ").join(Text(kind, style=colour) for kind, colour in MEMORY.items())


def _amounts(memory: DeviceMemory) -> tuple[int, ...]:
    return (*(getattr(memory, kind) for kind in MEMORY), memory.capacity)


def runners_up_table(runners_up: tuple[RunnerUp, ...], best_seconds: float) -> Table:
    """Returns a table of the next best strategies, with the parts of a step that made them
    slower."""
    table = Table(box=None, pad_edge=False)
    for name in ("runner-up", "step", "slower", "why"):
        table.add_column(name, justify="right" if name in ("step", "slower") else "left")
    for each in runners_up:
        seconds = each.step_seconds
        step = "-" if seconds is None else format_seconds(seconds)
        slower = "" if seconds is None else f"{seconds / best_seconds - 1:+.1%}"
        table.add_row(plain_text(each.name), step, slower, plain_text(each.reason))
    return table


def dropped_table(dropped: Mapping[str, int]) -> Table:
    """Returns a table of the numbers of pruned candidates by reason, largest first."""
    table = Table(box=None, pad_edge=False)
    table.add_column("pruned", justify="right")
    table.add_column("because")
    for reason, count in sorted(dropped.items(), key=lambda item: (-item[1], item[0])):
        table.add_row(str(count), plain_text(reason))
    return table


def timeline_summary(plan: Plan, timeline: Timeline, console: Console | None = None) -> None:
    """Prints the time of one step, its parts, and how busy every device is."""
    console = console or Console()
    seconds, found = timeline.step_seconds, step_breakdown(timeline)
    rate = tokens_per_second(plan, seconds)
    console.print(_speed(seconds, rate, timeline.source))
    console.print(parts_table({timeline.source: found}))
    console.print()
    console.print(busy_table(timeline))
    console.print()
    console.print(plain_text(f"• {parts_sentence(found)}"))


def busy_table(timeline: Timeline) -> Table:
    """Returns a table of the time that each device computes, and its peak memory if the timeline
    has it."""
    table = Table(box=None, pad_edge=False)
    for name in ("rank", "device", "computes", "share", "peak memory"):
        table.add_column(name, justify="left" if name == "device" else "right")
    table.add_column("")
    peaks = dict.fromkeys(range(len(timeline.devices)), 0)
    for point in timeline.memory:
        peaks[point.rank] = max(peaks[point.rank], point.bytes)
    for rank, device in enumerate(timeline.devices):
        busy = busy_seconds(timeline, rank)
        table.add_row(
            str(rank),
            plain_text(device),
            format_seconds(busy),
            f"{busy / timeline.step_seconds:.0%}",
            format_bytes(peaks[rank]) if peaks[rank] else "",
            _bar(((busy, PARTS["compute"]),), timeline.step_seconds),
        )
    return table


def comparison_table(predicted: Timeline, measured: Timeline) -> Table:
    """Returns a table of predicted and measured times: the step, its parts, and their errors."""
    table = Table(box=None, pad_edge=False)
    for name in ("", "predicted", "measured", "error"):
        table.add_column(name, justify="right" if name else "left")
    before, after = step_breakdown(predicted), step_breakdown(measured)
    rows = {"step": (predicted.step_seconds, measured.step_seconds)}
    rows |= {part: (before[part], after[part]) for part in before}
    for name, (guess, truth) in rows.items():
        if guess or truth:
            error = f"{(guess - truth) / truth:+.1%}" if truth else ""
            table.add_row(name, format_seconds(guess), format_seconds(truth), error)
    return table
