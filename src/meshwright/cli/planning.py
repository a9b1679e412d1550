"""Defines the verbs that need no PyTorch: plan, explain, simulate, compare, whatif, export,
reorder.

Heavy imports are inside the functions.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meshwright.cli.options import (
    BudgetOption,
    ClusterOption,
    ForbidOption,
    JsonOption,
    MeasuredTimes,
    ModelOption,
    NewPlanFile,
    OptimizerChoice,
    PageOption,
    PlanFile,
    PrecisionOption,
    ProfileOption,
    SequenceOption,
    app,
    check_outputs,
    say,
    search_limits,
)

if TYPE_CHECKING:
    from meshwright.cluster.spec import Cluster
    from meshwright.plan.spec import Plan
    from meshwright.report.whatif import WhatIf


@app.command()
def plan(
    model: ModelOption,
    cluster: Annotated[Path, typer.Option(help="Cluster file.")],
    global_batch: Annotated[int, typer.Option(help="Rows per optimizer step.")],
    sequence: SequenceOption = 1024,
    precision: PrecisionOption = None,
    optimizer: OptimizerChoice = OptimizerChoice.ADAMW,
    profile: MeasuredTimes = None,
    output: NewPlanFile = Path("plan.json"),
    budget: BudgetOption = None,
    forbid: ForbidOption = None,
) -> None:
    """Find the fastest plan for a model on a cluster. Ctrl-C ends the search with the best plan so
    far."""
    from meshwright.cli.progress import search_progress

    with search_progress() as watch:
        from meshwright.workflows.session import error_text, open_session, search_plan

        limits = search_limits(budget, forbid)
        check_outputs(output)
        session = open_session(
            model=model,
            cluster=cluster,
            profile=profile,
            global_batch=global_batch,
            sequence=sequence,
            precision=precision.value if precision else None,
            optimizer=optimizer.value,
        )
        for warning in session.warnings:
            say(f"warning: {warning}", to_errors=True)
        found = search_plan(
            session, limits, progress=watch.tell, stop=watch.stop, found=watch.found
        )
    error = error_text(session, found.prediction.step_seconds) if found.prediction else ""
    _write_plan(found, output, _certificate_text(found), error)
    if watch.interrupted:
        say(f"interrupted: {output} holds the best plan found so far", to_errors=True)


@app.command()
def explain(plan_file: PlanFile) -> None:
    """Explain a plan: its stages, what limits the step, and why other strategies lost."""
    from meshwright.report.tables import explain as print_explanation
    from meshwright.workflows.session import reopen_plan, with_prediction

    _, opened = reopen_plan(plan_file)
    found = opened.plan if opened.plan.prediction else with_prediction(opened)
    print_explanation(found)
    if text := _certificate_text(found):
        say(text)


def _certificate_text(found: Plan) -> str:
    """Says how far a plan may be from the best possible; empty if that is not known."""
    from meshwright.search.certificate import sentence

    return sentence(found.prediction) if found.prediction else ""


def _write_plan(found: Plan, output: Path, *texts: str) -> None:
    """Writes a plan, explains it, and prints those of the texts that are not empty."""
    from meshwright.plan.files import save_plan

    save_plan(found, output)
    from meshwright.report.tables import explain as print_explanation

    print_explanation(found)
    for text in filter(None, texts):
        say(text)
    say(f"wrote {output}")


@app.command()
def simulate(
    plan_file: PlanFile,
    cluster: ClusterOption = None,
    profile: ProfileOption = None,
    trace: Annotated[
        Path | None, typer.Option(help="Write a Chrome trace; it opens in Perfetto.")
    ] = None,
    program: Annotated[Path | None, typer.Option(help="Write the program as text.")] = None,
    report: PageOption = None,
) -> None:
    """Simulate one step of a plan with the cost model."""
    from meshwright import files
    from meshwright.report.tables import timeline_summary
    from meshwright.workflows.session import error_text, reopen_plan, simulate_priced

    check_outputs(trace, program, report)
    session, found = reopen_plan(plan_file, cluster=cluster, profile=profile)
    timeline = simulate_priced(found)
    timeline_summary(found.plan, timeline)
    if text := error_text(session, timeline.step_seconds):
        say(text)
    if program:
        from meshwright.program.instructions import format_program

        files.write_text(program, format_program(found.program))
        say(f"wrote {program}")
    if trace:
        from meshwright.report.chrome_trace import save_chrome_trace

        save_chrome_trace(timeline, trace)
        say(f"wrote {trace}")
    if report:
        from meshwright.report.page import write_report

        write_report(report, found.plan, found.cluster, found.model, predicted=timeline)
        say(f"wrote {report}")


@app.command()
def compare(
    first: PlanFile,
    second: PlanFile,
    report: PageOption = None,
    json: JsonOption = False,
) -> None:
    """Compare two plans for one model: time, memory, links, and why one wins."""
    from meshwright.report.comparison import (
        comparison_json,
        print_comparison,
        short_names,
        write_comparison,
    )
    from meshwright.simulate.plan_figures import check_comparable, compare_plans, simulate_figures
    from meshwright.workflows.session import reopen_plan

    check_outputs(report)
    one, two = (
        simulate_figures(name, reopen_plan(file)[1])
        for file, name in zip((first, second), short_names(first, second), strict=True)
    )
    check_comparable(one, two)
    verdict = compare_plans(one, two)
    if json:
        typer.echo(comparison_json(one, two, verdict), nl=False)
    else:
        print_comparison(one, two, verdict)
    if report:
        write_comparison(report, one, two, verdict)
        say(f"wrote {report}", to_errors=json)


@app.command()
def whatif(
    plan_file: PlanFile,
    without: Annotated[
        list[str] | None,
        typer.Option(help="Remove a node, a device (node:0), a device type or a site."),
    ] = None,
    add: Annotated[
        list[str] | None,
        typer.Option(help="Add a node of '4 x A100-40', or '2 x NODE' like an existing one."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a figure: link.network=100Gbit/s, device.T4.memory=..."),
    ] = None,
    budget: BudgetOption = None,
    forbid: ForbidOption = None,
    json: JsonOption = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the edited cluster file.")
    ] = None,
) -> None:
    """Show what another cluster would gain: edit the cluster, plan again, compare. Options may be
    repeated."""
    from meshwright.cli.progress import search_progress

    with search_progress() as watch:
        from meshwright.workflows.session import reopen_plan
        from meshwright.workflows.what_if import ClusterEdits, what_if

        limits = search_limits(budget, forbid)
        check_outputs(output)
        told = {"without": without, "added": add, "settings": set_}
        edits = ClusterEdits(**{name: tuple(each or ()) for name, each in told.items()})
        session, opened = reopen_plan(plan_file)
        found, edited = what_if(
            session, opened.plan, edits, limits, progress=watch.tell, stop=watch.stop
        )
    _show_whatif(found, edited, output, json=json)
    if watch.interrupted:
        say("interrupted: compared are the best plans found so far", to_errors=True)


def _show_whatif(found: WhatIf, edited: Cluster, output: Path | None, *, json: bool) -> None:
    """Prints what the edited cluster would gain, and writes its file if asked to."""
    from meshwright import files
    from meshwright.cluster.files import dump_cluster
    from meshwright.report.whatif import print_whatif, whatif_json

    if json:
        typer.echo(whatif_json(found), nl=False)
    else:
        print_whatif(found)
    if output:
        files.write_text(output, dump_cluster(edited))
        say(f"wrote {output}", to_errors=json)


@app.command()
def export(
    plan_file: PlanFile,
    to: Annotated[
        str,
        typer.Option("--to", help="torchtitan, megatron, deepspeed, accelerate or pipelining-csv."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder.")] = Path("export"),
    nearest: Annotated[
        bool,
        typer.Option(help="If the tool cannot express the plan: export the fastest that it can."),
    ] = False,
) -> None:
    """Write a plan as the settings of another tool, with a script that starts it, and a list of
    what these files do not express."""
    from meshwright import files
    from meshwright.plan.files import save_plan
    from meshwright.plan.ranks import describe_plan
    from meshwright.workflows.export_plan import export_plan
    from meshwright.workflows.session import reopen_plan

    files.check_folder(output)
    session, opened = reopen_plan(plan_file)
    found = export_plan(session, opened.plan, to, nearest=nearest)
    files.make_folder(output)
    for name, text in found.files.items():
        files.write_text(output / name, text)
        say(f"wrote {output / name}")
    for sentence in found.not_expressed:
        say(f"not expressed: {sentence}")
    if found.plan != opened.plan:
        save_plan(found.plan, output / "plan.json")
        say(f"wrote {output / 'plan.json'}: the nearest plan, {describe_plan(found.plan)}")


@app.command()
def reorder(
    plan_file: PlanFile,
    order: Annotated[
        str,
        typer.Option(help="A schedule: 1f1b, zb-h1, ...; list: one made for the plan's own times."),
    ] = "list",
    csv: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Import a torch.distributed.pipelining CSV; once, or for every pipeline.",
        ),
    ] = None,
    output: NewPlanFile = Path("plan.json"),
) -> None:
    """Give a plan another schedule: a standard one, one made for the plan, or one imported from
    CSV."""
    from meshwright.workflows.reorder import with_imported_schedule, with_schedule_named
    from meshwright.workflows.session import reopen_plan

    check_outputs(output)
    session, opened = reopen_plan(plan_file)
    plan = opened.plan
    found = (
        with_imported_schedule(session, plan, csv)
        if csv
        else with_schedule_named(session, plan, order)
    )
    _write_plan(found, output)
