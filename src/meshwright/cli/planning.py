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
    CompiledOption,
    ForbidOption,
    FrontOption,
    JsonOption,
    LimitOption,
    MarginOption,
    MeasuredTimes,
    ModelOption,
    NewPlanFile,
    ObjectiveChoice,
    ObjectiveOption,
    OptimizerChoice,
    PageOption,
    PlanFile,
    PrecisionOption,
    PricesOption,
    ProfileOption,
    RuntimeChoice,
    RuntimeOption,
    SequenceOption,
    app,
    check_outputs,
    say,
    search_limits,
)
from meshwright.cli.renting import expense_text, money_terms, planned

if TYPE_CHECKING:
    from meshwright.cli.progress import SearchProgress
    from meshwright.cluster.spec import Cluster
    from meshwright.money.spec import MoneyTerms
    from meshwright.plan.spec import Plan
    from meshwright.report.whatif import WhatIf
    from meshwright.workflows.session import Session


@app.command()
def plan(
    model: ModelOption,
    cluster: Annotated[Path, typer.Option(help="Cluster file.")],
    global_batch: Annotated[int, typer.Option(help="Rows per optimizer step.")],
    sequence: SequenceOption = 1024,
    precision: PrecisionOption = None,
    optimizer: OptimizerChoice = OptimizerChoice.ADAMW,
    runtime: RuntimeOption = RuntimeChoice.MESHWRIGHT,
    compiled: CompiledOption = False,
    profile: MeasuredTimes = None,
    output: NewPlanFile = Path("plan.json"),
    budget: BudgetOption = None,
    forbid: ForbidOption = None,
    margin: MarginOption = None,
    prices: PricesOption = None,
    objective: ObjectiveOption = ObjectiveChoice.TIME,
    limit: LimitOption = None,
    front: FrontOption = None,
) -> None:
    """Find the fastest plan for a model on a cluster, or by hourly prices the devices to rent for
    it. Ctrl-C ends the search with the best plan so far."""
    from meshwright.cli.progress import search_progress

    with search_progress() as watch:
        from meshwright.workflows.session import open_session

        limits = search_limits(budget, forbid, margin)
        check_outputs(output, front)
        terms = money_terms(prices, objective, limit, front)
        session = open_session(
            model=model,
            cluster=cluster,
            profile=profile,
            global_batch=global_batch,
            sequence=sequence,
            precision=precision.value if precision else None,
            optimizer=optimizer.value,
            runtime=runtime.value,
            compiled=compiled,
        )
        for warning in session.warnings:
            say(f"warning: {warning}", to_errors=True)
        found = planned(session, limits, terms, front, watch)
    _write_plan(found, output, *_plan_texts(found, session, terms))
    _tell_interruption(watch, f"{output} holds the best plan found so far")


def _tell_interruption(watch: SearchProgress, result: str) -> None:
    """Says on stderr what came of a search if Ctrl-C ended it."""
    if watch.interrupted:
        say(f"interrupted: {result}", to_errors=True)


@app.command()
def explain(plan_file: PlanFile, prices: PricesOption = None) -> None:
    """Explain a plan: its stages, what limits the step, why others lost, and what it costs."""
    from meshwright.report.tables import explain as print_explanation
    from meshwright.workflows.session import reopen_plan, with_prediction

    terms = money_terms(prices)
    session, opened = reopen_plan(plan_file)
    found = opened.plan if opened.plan.prediction else with_prediction(opened)
    print_explanation(found)
    if found.prediction:
        expense = expense_text(found, session, terms, found.prediction.step_seconds)
        for text in filter(None, (_certificate_text(found), expense)):
            say(text)


def _plan_texts(found: Plan, session: Session, terms: MoneyTerms | None) -> tuple[str, ...]:
    """Says how good a plan is, how certain its step is, and what it costs; empty if unknown."""
    from meshwright.workflows.session import error_text

    if found.prediction is None:
        return ()
    seconds = found.prediction.step_seconds
    expense = expense_text(found, session, terms, seconds)
    return _certificate_text(found), error_text(session, seconds), expense


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


TraceOption = Annotated[
    Path | None, typer.Option(help="Write a Chrome trace; it opens in Perfetto.")
]


@app.command()
def simulate(
    plan_file: PlanFile,
    cluster: ClusterOption = None,
    profile: ProfileOption = None,
    runtime: Annotated[
        RuntimeChoice | None,
        typer.Option(help="The system that runs it; default: the plan's own."),
    ] = None,
    compiled: CompiledOption | None = None,
    trace: TraceOption = None,
    program: Annotated[Path | None, typer.Option(help="Write the program as text.")] = None,
    report: PageOption = None,
    prices: PricesOption = None,
) -> None:
    """Simulate one step of a plan with the cost model."""
    from meshwright import files
    from meshwright.report.tables import timeline_summary
    from meshwright.workflows.session import error_text, reopen_plan, simulate_priced

    check_outputs(trace, program, report)
    terms = money_terms(prices)
    session, found = reopen_plan(
        plan_file,
        cluster=cluster,
        profile=profile,
        runtime=runtime.value if runtime else None,
        compiled=compiled,
    )
    timeline = simulate_priced(found)
    timeline_summary(found.plan, timeline)
    expense = expense_text(found.plan, session, terms, timeline.step_seconds)
    for text in filter(None, (error_text(session, timeline.step_seconds), expense)):
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

        notes = (expense,) if expense else ()
        write_report(
            report, found.plan, found.cluster, found.model, predicted=timeline, notes=notes
        )
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


WithoutOption = Annotated[
    list[str] | None,
    typer.Option(help="Remove a node, a device (node:0), a device type or a site."),
]
AddOption = Annotated[
    list[str] | None,
    typer.Option(help="Add a node of '4 x A100-40', or '2 x NODE' like an existing one."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a figure: link.network=100Gbit/s, device.T4.memory=..."),
]


@app.command()
def whatif(
    plan_file: PlanFile,
    without: WithoutOption = None,
    add: AddOption = None,
    set_: SetOption = None,
    budget: BudgetOption = None,
    forbid: ForbidOption = None,
    prices: PricesOption = None,
    objective: ObjectiveOption = ObjectiveChoice.TIME,
    limit: LimitOption = None,
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

        limits = search_limits(budget, forbid, margin=0.0)
        check_outputs(output)
        terms = money_terms(prices, objective, limit)
        told = {"without": without, "added": add, "settings": set_}
        edits = ClusterEdits(**{name: tuple(each or ()) for name, each in told.items()})
        session, opened = reopen_plan(plan_file)
        found, edited = what_if(
            session, opened.plan, edits, limits, terms, progress=watch.tell, stop=watch.stop
        )
    _show_whatif(found, edited, output, json=json)
    _tell_interruption(watch, "compared are the best plans found so far")


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
    from meshwright.units import format_seconds
    from meshwright.workflows.export_plan import export_plan, seconds_there
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
    seconds = seconds_there(session, found.plan, to)
    say(f"predicted there: {format_seconds(seconds)} a step, with the habits of its runtime")
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
