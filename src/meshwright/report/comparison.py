"""Compares two plans side by side: in the terminal, as JSON, and as an HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from meshwright import __version__, files
from meshwright.cost.memory import total_bytes
from meshwright.plan.mesh import mesh_text
from meshwright.plan.ranks import stage_placements
from meshwright.plan.spec import Plan
from meshwright.records import dumps, plain, record
from meshwright.report.page import Bar, Piece
from meshwright.report.palette import PARTS
from meshwright.report.plan_drawing import plan_svg
from meshwright.report.resources import NamedLoad, named_loads
from meshwright.report.tables import devices_text, plan_table
from meshwright.report.template import render, template_source
from meshwright.report.terminal import plain_text
from meshwright.simulate.plan_figures import PlanFigures, SimulatedPlan, Verdict
from meshwright.units import format_bytes, format_seconds

MOST_LINKS = 12
"""Largest number of lines in the table of links; the JSON has all of them."""


@record
class ComparedPlans:
    """Holds the comparison of two plans as `--json` prints it."""

    plans: tuple[dict[str, Any], dict[str, Any]]
    """Facts of the two plans, with names for the links."""
    verdict: Verdict


def short_names(first: Path, second: Path) -> tuple[str, str]:
    """Returns the names of two files for a table: their file names, or their paths if these are
    equal."""
    if first.name != second.name:
        return first.name, second.name
    if first != second:
        return str(first), str(second)
    return f"{first.name} (first)", f"{second.name} (second)"


def comparison_json(first: SimulatedPlan, second: SimulatedPlan, verdict: Verdict) -> str:
    """Formats the comparison as JSON, in seconds and bytes."""
    plans = _named(first.figures), _named(second.figures)
    return dumps(ComparedPlans(plans=plans, verdict=verdict))


def _named(facts: PlanFigures) -> dict[str, Any]:
    return {**plain(facts), "links": [plain(load) for load in named_loads(facts.links)]}


def verdict_sentence(first: PlanFigures, second: PlanFigures, verdict: Verdict) -> str:
    """Says which plan is faster, by how much, and what the other one loses."""
    if verdict.winner is None:
        rate = f"{first.tokens_per_second:,.0f} tokens/s"
        return f"{first.name} and {second.name} are equally fast: {rate}."
    loser = second if verdict.winner == first.name else first
    text = f"{verdict.winner} is {verdict.speed_up:.3g} times as fast as {loser.name}: "
    alike = first.tokens_per_step == second.tokens_per_step
    work = "" if alike else "for as many tokens, "
    return f"{text}{work}{loser.name} spends {verdict.reason}."


def print_comparison(
    first: SimulatedPlan, second: SimulatedPlan, verdict: Verdict, console: Console | None = None
) -> None:
    """Prints the stages of both plans, the parts of a step, the load of the links, and the
    verdict."""
    console = console or Console()
    for each in (first, second):
        console.print(plain_text(f"{each.figures.name}: {each.figures.plan}", style="bold"))
        console.print(plan_table(each.plan))
        console.print()
    for difference in verdict.differences:
        console.print(plain_text(f"• not alike: {difference}"))
    if verdict.differences:
        console.print()
    console.print(figures_table(first.figures, second.figures))
    console.print()
    console.print(link_loads_table(first.figures, second.figures))
    console.print()
    sentence = verdict_sentence(first.figures, second.figures, verdict)
    console.print(plain_text(f"• {sentence}"))


ComparisonRow = tuple[str, str, str, str]
"""A line of the comparison: label, value of the first plan, of the second, and the change."""


def comparison_rows(first: PlanFigures, second: PlanFigures) -> list[ComparisonRow]:
    """Returns the lines of the table that compares two plans."""
    parts = [part for part in PARTS if first.parts.get(part) or second.parts.get(part)]
    return [
        ("step", *_seconds(first.step_seconds, second.step_seconds)),
        *((f"  {part}", *_seconds(first.parts[part], second.parts[part])) for part in parts),
        (
            "tokens/s",
            f"{first.tokens_per_second:,.0f}",
            f"{second.tokens_per_second:,.0f}",
            _change(first.tokens_per_second, second.tokens_per_second),
        ),
        ("bubble, of the step", f"{first.bubble_share:.1%}", f"{second.bubble_share:.1%}", ""),
        ("devices", str(first.devices), str(second.devices), ""),
        *_memory_lines(first, second),
    ]


def _memory_lines(first: PlanFigures, second: PlanFigures) -> list[ComparisonRow]:
    one, two = total_bytes(first.fullest), total_bytes(second.fullest)
    return [
        ("fullest device", first.fullest.device, second.fullest.device, ""),
        ("  holds", format_bytes(one), format_bytes(two), _change(one, two)),
        ("  of its memory", f"{first.fullest_share:.0%}", f"{second.fullest_share:.0%}", ""),
    ]


def _seconds(first: float, second: float) -> tuple[str, str, str]:
    return format_seconds(first), format_seconds(second), _change(first, second)


def _change(first: float, second: float) -> str:
    if first == second or first == 0:
        return ""
    return f"{second / first - 1:+.1%}"


def figures_table(first: PlanFigures, second: PlanFigures) -> Table:
    """Returns a table of the figures of both plans, and the second's change from the first."""
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in (first.name, second.name):
        table.add_column(_heading(name), justify="right", max_width=24)
    table.add_column("change", justify="right")
    for line in comparison_rows(first, second):
        table.add_row(*map(plain_text, line))
    return table


def _heading(name: str) -> Text:
    heading = plain_text(name)
    heading.overflow = "fold"
    return heading


def link_rows(
    first: PlanFigures, second: PlanFigures
) -> list[tuple[str, NamedLoad | None, NamedLoad | None]]:
    """Returns every link that either plan uses, longest busy first."""
    one, two = ({load.name: load for load in named_loads(each.links)} for each in (first, second))

    def busiest(name: str) -> float:
        return max(load.seconds for load in (one.get(name), two.get(name)) if load)

    names = sorted({*one, *two}, key=lambda name: (-busiest(name), name))
    return [(name, one.get(name), two.get(name)) for name in names]


def link_loads_table(first: PlanFigures, second: PlanFigures) -> Table:
    """Returns a table of the bytes of a step by link, and the share of the step that they take at
    full bandwidth."""
    rows = link_rows(first, second)
    left = len(rows) - MOST_LINKS
    caption = f"{left} links that are busy less: --json has them all" if left > 0 else None
    table = Table(box=None, pad_edge=False, caption=caption, caption_justify="left")
    table.add_column("link, bytes a step")
    for name in (first.name, second.name):
        table.add_column(_heading(name), justify="right", max_width=24)
        table.add_column("busy", justify="right")
    for name, one, two in rows[:MOST_LINKS]:
        cells: list[str] = []
        for load, facts in ((one, first), (two, second)):
            cells += _load_cells(load, facts.step_seconds)
        table.add_row(plain_text(name), *cells)
    if not rows:
        table.add_row("nothing", "-", "", "-", "")
    return table


def _load_cells(load: NamedLoad | None, step_seconds: float) -> tuple[str, str]:
    if load is None:
        return "-", ""
    return format_bytes(load.bytes), f"{load.seconds / step_seconds:.0%}"


def write_comparison(
    path: Path, first: SimulatedPlan, second: SimulatedPlan, verdict: Verdict
) -> None:
    """Writes the comparison as one self-contained HTML page."""
    room = max(each.figures.step_seconds for each in (first, second))
    text = render(
        "compare.html",
        css=template_source("page.css") + template_source("plan.css"),
        version=__version__,
        heading=verdict_sentence(first.figures, second.figures, verdict),
        differences=verdict.differences,
        sides=[
            {
                "facts": each.figures,
                "svg": plan_svg(each.plan, each.cluster, each.model),
                "stages": _stage_lines(each.plan),
            }
            for each in (first, second)
        ],
        figures=comparison_rows(first.figures, second.figures),
        step_parts=[_part_bar(each.figures, room) for each in (first, second)],
        part_colours=PARTS,
        links=[
            (name, *_load_cells(one, first.figures.step_seconds),
             *_load_cells(two, second.figures.step_seconds))
            for name, one, two in link_rows(first.figures, second.figures)
        ],
    )  # fmt: skip
    files.write_text(path, text)


def _stage_lines(plan: Plan) -> list[tuple[int, str, str, str]]:
    return [
        (
            stage.number,
            f"{stage.layers[0]}:{stage.layers[1]}",
            mesh_text(stage.mesh, "×"),
            devices_text(tuple(each.device for each in stage.mesh.members)),
        )
        for stage in stage_placements(plan)
    ]


def _part_bar(facts: PlanFigures, room: float) -> Bar:
    pieces = tuple(
        Piece(name=part, colour=PARTS[part], amount=seconds, share=seconds / room)
        for part, seconds in facts.parts.items()
        if seconds > 0
    )
    return Bar(name=facts.name, total=facts.step_seconds, pieces=pieces)
