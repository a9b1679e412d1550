"""Writes one self-contained HTML page about a plan: no network access, no addresses, the same bytes
every time.

Drawings are inline SVG and timelines a canvas with a few lines of script of our own, so that a page
is not much larger than its data; a charting library would add megabytes to each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from meshwright import __version__, files
from meshwright.cluster.spec import Cluster
from meshwright.cost.memory import total_bytes
from meshwright.model.spec import LayerGraph, num_frozen_parameters, num_parameters
from meshwright.plan.mesh import mesh_text
from meshwright.plan.ranks import stage_placements
from meshwright.plan.spec import DeviceMemory, Plan
from meshwright.program.compile import compile_plan
from meshwright.program.instructions import format_program
from meshwright.program.timeline import Timeline
from meshwright.records import record
from meshwright.report.charts import loss_svg
from meshwright.report.palette import KIND_NAMES, KINDS, MEMORY, PARTS, stage_colours
from meshwright.report.plan_drawing import layers_text, plan_svg
from meshwright.report.sentences import (
    busiest_sentence,
    limits,
    title,
    tokens_per_second,
    verdict,
)
from meshwright.report.tables import devices_text, rows_text
from meshwright.report.template import render, template_source
from meshwright.report.timeline_data import timeline_data
from meshwright.simulate.compare_timelines import TimelineComparison
from meshwright.simulate.critical_path import step_breakdown

PROGRAM_LINES = 20_000
"""Largest number of program lines on a page; a longer program is cut off."""


@record
class Rival:
    """Holds the times of one strategy: of a plan that was tried for comparison, or of the plan on
    the page."""

    name: str
    predicted_seconds: float
    measured_seconds: float | None = None

    @property
    def seconds(self) -> float:
        """Returns the measured seconds of a step, or predicted ones if it was not measured."""
        return self.measured_seconds or self.predicted_seconds


@record
class StageRow:
    """Holds one line of the table of stages."""

    number: int
    pipeline: int
    colour: str
    layers: str
    count: int
    mesh: str
    rows: str
    devices: str


@record
class Piece:
    """Describes one coloured piece of a bar."""

    name: str
    colour: str
    amount: float
    share: float
    """Share of the width of the bar's scale."""


@record
class Bar:
    """Describes a bar of coloured pieces; `mark` is the position of `limit` as a share of the
    scale."""

    name: str
    pieces: tuple[Piece, ...]
    total: float
    limit: float = 0.0
    mark: float = 0.0


def write_report(  # noqa: PLR0913 - a page shows what there is
    path: Path,
    plan: Plan,
    cluster: Cluster,
    model: LayerGraph,
    *,
    predicted: Timeline,
    measured: Timeline | None = None,
    losses: Mapping[str, Sequence[float]] | None = None,
    rivals: Sequence[Rival] = (),
    comparison: TimelineComparison | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Writes the page.

    `losses` are per run; `rivals` are in the order of their rows, the plan itself last. Its
    measured step there, a median of many, takes precedence over the single step that `measured`
    shows. `notes` are further sentences on the plan, such as what it costs.
    """
    text = report_html(
        plan,
        cluster,
        model,
        predicted=predicted,
        measured=measured,
        losses=losses or {},
        rivals=rivals,
        comparison=comparison,
        notes=notes,
    )
    files.write_text(path, text)


def report_html(  # noqa: PLR0913 - a page shows what there is
    plan: Plan,
    cluster: Cluster,
    model: LayerGraph,
    *,
    predicted: Timeline,
    measured: Timeline | None,
    losses: Mapping[str, Sequence[float]],
    rivals: Sequence[Rival],
    comparison: TimelineComparison | None = None,
    notes: Sequence[str] = (),
) -> str:
    """Returns the page as HTML text."""
    prediction = plan.prediction
    timelines = [each for each in (predicted, measured) if each is not None]
    seconds = _measured_seconds(measured, rivals)
    return render(
        "page.html",
        css=template_source("page.css") + template_source("plan.css"),
        script=template_source("timeline.js"),
        version=__version__,
        plan=plan,
        parameters=num_parameters(model),
        frozen=num_frozen_parameters(model),
        heading=verdict(plan, predicted.step_seconds, seconds),
        subtitle=title(plan),
        tiles=_tiles(plan, predicted.step_seconds, seconds, rivals),
        svg=plan_svg(plan, cluster, model),
        stages=_stages(plan, model),
        data=timeline_data(timelines, cluster, plan),
        kinds=[(KIND_NAMES[kind], colour) for kind, colour in KINDS.items()],
        step_parts=_step_parts(timelines),
        part_colours=PARTS,
        memory=_memory_bars(prediction.memory if prediction else ()),
        memory_colours=MEMORY,
        sentences=(*_sentences(plan, predicted, cluster), *notes),
        rivals=_rival_bars(rivals),
        losses=loss_svg(losses) if any(losses.values()) else "",
        comparison=comparison,
        prediction=prediction,
        program=_program(plan, model),
    )


def _measured_seconds(measured: Timeline | None, rivals: Sequence[Rival]) -> float | None:
    """Returns the measured seconds of a step: the run's median, else the one step that was
    recorded."""
    if rivals and rivals[-1].measured_seconds:
        return rivals[-1].measured_seconds
    return measured.step_seconds if measured else None


def _tiles(
    plan: Plan, predicted: float, measured: float | None, rivals: Sequence[Rival]
) -> list[tuple[str, float | str, str]]:
    """Returns the figures at the top of the page: label, value, and how to format it."""
    tiles: list[tuple[str, float | str, str]] = [("step, predicted", predicted, "seconds")]
    if measured is not None:
        tiles.append(("step, measured", measured, "seconds"))
        tiles.append(("prediction error", f"{(predicted - measured) / measured:+.1%}", "text"))
    rate = tokens_per_second(plan, measured or predicted)
    tiles.append(("tokens/s", f"{rate:,.0f}", "text"))
    if len(rivals) > 1:
        speed_up = rivals[0].seconds / rivals[-1].seconds
        tiles.append((f"as fast as the {rivals[0].name}", f"{speed_up:.2f}×", "text"))
    return tiles


def _stages(plan: Plan, model: LayerGraph) -> list[StageRow]:
    stages = stage_placements(plan)
    colours = stage_colours(len(stages))
    return [
        StageRow(
            number=stage.number,
            pipeline=stage.pipeline,
            colour=colours[stage.number],
            layers=layers_text(model, stage.layers),
            count=stage.layers[1] - stage.layers[0],
            mesh=mesh_text(stage.mesh, "×"),
            rows=rows_text(stage, plan.pipelines[stage.pipeline].rows),
            devices=devices_text(tuple(each.device for each in stage.mesh.members)),
        )
        for stage in stages
    ]


def _step_parts(timelines: Sequence[Timeline]) -> list[Bar]:
    room = max(timeline.step_seconds for timeline in timelines)
    names = {"simulated": "predicted", "measured": "measured"}
    return [
        Bar(
            name=names[timeline.source],
            total=timeline.step_seconds,
            pieces=tuple(
                Piece(name=part, colour=PARTS[part], amount=seconds, share=seconds / room)
                for part, seconds in step_breakdown(timeline).items()
                if seconds > 0
            ),
        )
        for timeline in timelines
    ]


def _memory_bars(memory: Sequence[DeviceMemory]) -> list[Bar]:
    """Returns the memory bars on one scale: the largest of all capacities and needs."""
    room = max((max(total_bytes(each), each.capacity) for each in memory), default=1)
    return [
        Bar(
            name=each.device,
            total=total_bytes(each),
            limit=each.capacity,
            mark=each.capacity / room,
            pieces=tuple(
                Piece(
                    name=kind,
                    colour=colour,
                    amount=getattr(each, kind),
                    share=getattr(each, kind) / room,
                )
                for kind, colour in MEMORY.items()
            ),
        )
        for each in memory
    ]


def _rival_bars(rivals: Sequence[Rival]) -> list[Bar]:
    times = [(f"{r.name}, predicted", r.predicted_seconds, "#56b4e9") for r in rivals]
    times += [
        (f"{r.name}, measured", r.measured_seconds, "#0072b2") for r in rivals if r.measured_seconds
    ]
    order = {rival.name: index for index, rival in enumerate(rivals)}
    times.sort(key=lambda each: order[each[0].rpartition(",")[0]])
    room = max((seconds for _, seconds, _ in times), default=1.0)
    return [
        Bar(
            name=name,
            total=seconds,
            pieces=(Piece(name=name, colour=colour, amount=seconds, share=seconds / room),),
        )
        for name, seconds, colour in times
    ]


def _sentences(plan: Plan, predicted: Timeline, cluster: Cluster) -> tuple[str, ...]:
    known = limits(plan)
    return (*known[:1], busiest_sentence(predicted, cluster), *known[1:])


def _program(plan: Plan, model: LayerGraph) -> str:
    lines = format_program(compile_plan(plan, model)).splitlines()
    if len(lines) > PROGRAM_LINES:
        rest = len(lines) - PROGRAM_LINES
        note = f"({rest} more lines: `meshwright simulate PLAN --program FILE` writes them all)"
        lines = [*lines[:PROGRAM_LINES], note]
    return "\n".join(lines)
