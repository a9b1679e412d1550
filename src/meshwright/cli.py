"""The command line: one function per verb. Everything heavy is imported inside the verbs."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Finds the fastest way to train a model on the machines you have, and trains it that way.",
)


class PrecisionChoice(StrEnum):
    """Arithmetic of forward and backward."""

    FP64 = "fp64"
    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


class OptimizerChoice(StrEnum):
    """Update rule."""

    ADAMW = "adamw"
    SGD = "sgd"


PlanFile = Annotated[Path, typer.Argument(help="A plan, as `meshwright plan` writes it.")]
ClusterOption = Annotated[
    Path | None, typer.Option("--cluster", help="Cluster file; default: the plan's own.")
]
ProfileOption = Annotated[
    Path | None, typer.Option("--profile", help="Measured times; default: the plan's own.")
]
ModelOption = Annotated[
    str, typer.Option("--model", help="A name (gpt2-xl), a config.json, or a model.toml.")
]


@app.command()
def plan(
    model: ModelOption,
    cluster: Annotated[Path, typer.Option(help="Cluster file.")],
    global_batch: Annotated[int, typer.Option(help="Rows per optimizer step.")],
    sequence: Annotated[int, typer.Option(help="Tokens per row.")] = 1024,
    precision: Annotated[
        PrecisionChoice | None, typer.Option(help="Default: the best that every device has.")
    ] = None,
    optimizer: OptimizerChoice = OptimizerChoice.ADAMW,
    profile: Annotated[Path | None, typer.Option(help="Measured times.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write it.")] = Path(
        "plan.json"
    ),
    budget: Annotated[
        str, typer.Option(help="Stop improving after so long: 5s, 500 ms. Default: when done.")
    ] = "",
) -> None:
    """Find the fastest plan for a model on a cluster."""
    from meshwright.plan.files import save_plan
    from meshwright.report.tables import explain as print_explanation
    from meshwright.search.certificate import sentence
    from meshwright.session import error_text, open_session, search
    from meshwright.units import parse_seconds

    try:
        seconds = parse_seconds(budget) if budget else None
    except ValueError as failure:
        raise typer.BadParameter(str(failure), param_hint="--budget") from None
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
        typer.echo(f"warning: {warning}", err=True)
    found = search(session, budget_seconds=seconds)
    save_plan(found, output)
    print_explanation(found)
    if found.prediction and (text := sentence(found.prediction)):
        typer.echo(text)
    if found.prediction and (text := error_text(session, found.prediction.step_seconds)):
        typer.echo(text)
    typer.echo(f"wrote {output}")


@app.command()
def explain(plan_file: PlanFile) -> None:
    """Who holds what, what limits the step, and why the others lost."""
    from meshwright.report.tables import explain as print_explanation
    from meshwright.search.certificate import sentence
    from meshwright.session import predicted, reopen

    session, found = reopen(plan_file)
    found = found if found.prediction else predicted(session, found)
    print_explanation(found)
    if found.prediction and (text := sentence(found.prediction)):
        typer.echo(text)


@app.command()
def simulate(
    plan_file: PlanFile,
    cluster: ClusterOption = None,
    profile: ProfileOption = None,
    trace: Annotated[
        Path | None, typer.Option(help="Write a Chrome trace; it opens in Perfetto.")
    ] = None,
    program: Annotated[Path | None, typer.Option(help="Write the program as text.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write an HTML page.")] = None,
) -> None:
    """Play one step of a plan on the cost model."""
    from meshwright.report.tables import timeline_summary
    from meshwright.session import error_text, reopen, simulated

    session, found = reopen(plan_file, cluster=cluster, profile=profile)
    timeline = simulated(session, found)
    timeline_summary(found, timeline)
    if text := error_text(session, timeline.step_seconds):
        typer.echo(text)
    if program:
        from meshwright.program.compile import compile_plan
        from meshwright.program.instructions import dumps

        program.write_text(dumps(compile_plan(found, session.model)))
        typer.echo(f"wrote {program}")
    if trace:
        from meshwright.report.trace import dump_trace

        dump_trace(timeline, trace)
        typer.echo(f"wrote {trace}")
    if report:
        from meshwright.report.page import write_report

        write_report(report, found, session.cluster, session.model, predicted=timeline)
        typer.echo(f"wrote {report}")


@app.command()
def compare(
    first: PlanFile,
    second: PlanFile,
    report: Annotated[Path | None, typer.Option(help="Write an HTML page.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Two plans for one model side by side: time, memory, links, and why one wins."""
    from meshwright.report.comparison import (
        comparison_json,
        print_comparison,
        short_names,
        write_comparison,
    )
    from meshwright.session import measured, reopen
    from meshwright.simulate.facts import check_comparable, judge

    one, two = (
        measured(*reopen(file), name)
        for file, name in zip((first, second), short_names(first, second), strict=True)
    )
    check_comparable(one, two)
    verdict = judge(one, two)
    if json:
        typer.echo(comparison_json(one, two, verdict), nl=False)
    else:
        print_comparison(one, two, verdict)
    if report:
        write_comparison(report, one, two, verdict)
        typer.echo(f"wrote {report}", err=json)


@app.command()
def whatif(
    plan_file: PlanFile,
    without: Annotated[
        list[str] | None,
        typer.Option(help="Take away a node, a device (node:0), a device type or a site."),
    ] = None,
    add: Annotated[
        list[str] | None,
        typer.Option(help="Add a node of '4 x A100-40', or '2 x NODE' like an existing one."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a figure: link.network=100Gbit/s, device.T4.memory=..."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the edited cluster file.")
    ] = None,
) -> None:
    """What another cluster would buy: edit it, plan again, compare. Options may be repeated."""
    from meshwright.cluster.files import dump_cluster
    from meshwright.report.whatif import print_whatif, whatif_json
    from meshwright.session import reopen
    from meshwright.whatif import Edits, what_if

    edits = Edits(without=tuple(without or ()), added=tuple(add or ()), settings=tuple(set_ or ()))
    found, cluster = what_if(*reopen(plan_file), edits)
    if json:
        typer.echo(whatif_json(found), nl=False)
    else:
        print_whatif(found)
    if output:
        output.write_text(dump_cluster(cluster))
        typer.echo(f"wrote {output}", err=json)


@app.command()
def export(
    plan_file: PlanFile,
    to: Annotated[
        str,
        typer.Option("--to", help="torchtitan, megatron, deepspeed, accelerate or pipelining-csv."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder.")] = Path("export"),
    nearest: Annotated[
        bool, typer.Option(help="If the tool cannot express it: the fastest plan that it can.")
    ] = False,
) -> None:
    """Write a plan as the settings of another tool, with the script that starts it."""
    from meshwright.exporting import exported
    from meshwright.plan.files import save_plan
    from meshwright.plan.ranks import describe
    from meshwright.session import reopen

    session, plan = reopen(plan_file)
    found = exported(session, plan, to, nearest=nearest)
    output.mkdir(parents=True, exist_ok=True)
    for name, text in found.files.items():
        (output / name).write_text(text)
        typer.echo(f"wrote {output / name}")
    if found.plan != plan:
        save_plan(found.plan, output / "plan.json")
        typer.echo(f"wrote {output / 'plan.json'}: the nearest plan, {describe(found.plan)}")


@app.command()
def profile(
    model: ModelOption,
    sequence: Annotated[int, typer.Option(help="Tokens per row.")] = 1024,
    rows: Annotated[str, typer.Option(help="Micro-batch sizes to measure.")] = "1,2,4",
    tensor: Annotated[str, typer.Option(help="Tensor widths to measure.")] = "1",
    precision: PrecisionChoice = PrecisionChoice.FP32,
    cluster: Annotated[
        Path | None,
        typer.Option(help="Under torchrun: which device each rank is. Else: this device alone."),
    ] = None,
    processes: Annotated[
        int, typer.Option(help="Measure with this many processes here, links between them too.")
    ] = 1,
    output: Annotated[Path, typer.Option("--output", "-o")] = Path("profile.json"),
) -> None:
    """Measure layer times on this device, and links between ranks; `plan` reads the result."""
    from meshwright.runtime.profile import ProfileSettings, profile_here

    settings = ProfileSettings(
        model=model,
        sequence=sequence,
        rows=_numbers(rows, "--rows"),
        tensor=_numbers(tensor, "--tensor"),
        precision=precision.value,
        cluster=str(cluster) if cluster else None,
        output=str(output),
    )
    profile_here(settings, processes)
    if os.environ.get("RANK", "0") == "0":
        typer.echo(f"wrote {output}")


def _numbers(text: str, option: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"found {text!r}; wanted numbers such as 1,2,4", param_hint=option)
    return tuple(int(part) for part in parts)


@app.command()
def train(
    plan_file: PlanFile,
    data: Annotated[
        str | None,
        typer.Option(help="Text or token file (.bin, .npy); default: Python's standard library."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 100,
    learning_rate: Annotated[float, typer.Option(help="Peak of the schedule.")] = 3e-4,
    warmup_steps: Annotated[int, typer.Option(help="Steps of linear warm-up.")] = 10,
    clip_norm: Annotated[float, typer.Option(help="Gradient norm limit; 0: none.")] = 1.0,
    seed: int = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="Run folder.")] = Path("runs/run"),
    save_weights: Annotated[bool, typer.Option(help="Write model.safetensors.")] = False,
    report: Annotated[Path | None, typer.Option(help="Write an HTML page.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Only print the commands.")] = False,
) -> None:
    """Train by a plan: prints the torchrun commands it stands for, then runs them here."""
    from meshwright.runtime.run import RunSettings
    from meshwright.session import reopen, simulated
    from meshwright.training import prepare, train_here, training_commands

    session, found = reopen(plan_file)
    settings = RunSettings(
        model=found.model.source,
        data=data,
        steps=steps,
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        clip_norm=clip_norm or None,
        seed=seed,
        save_weights=save_weights,
    )
    prepare(session, found, settings, output)
    for command in training_commands(found, output):
        typer.echo(command)
    if dry_run:
        return
    outcome = train_here(session, found, settings, output)
    typer.echo(f"loss {outcome.losses[-1]:.4f}, {outcome.step_seconds:.4g} s a step; see {output}")
    if report:
        from meshwright.report.page import write_report

        write_report(
            report,
            found,
            session.cluster,
            session.model,
            predicted=simulated(session, found),
            measured=outcome.timeline,
            losses={found.name: outcome.losses},
        )
        typer.echo(f"wrote {report}")


@app.command()
def calibrate(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Run folders, as `meshwright train` writes them.")
    ] = None,
    propose: Annotated[
        int, typer.Option(help="Write so many plans that are worth a short run, and stop.")
    ] = 0,
    model: Annotated[str, typer.Option("--model", help="To propose: as for `plan`.")] = "",
    cluster: Annotated[Path | None, typer.Option(help="Cluster file.")] = None,
    global_batch: Annotated[int, typer.Option(help="To propose: rows per step.")] = 8,
    sequence: Annotated[int, typer.Option(help="To propose: tokens per row.")] = 1024,
    precision: Annotated[PrecisionChoice | None, typer.Option(help="As for `plan`.")] = None,
    profile: Annotated[Path | None, typer.Option(help="Measured times.")] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Profile to write, or folder of plans.")
    ] = Path("calibrated.json"),
) -> None:
    """Fit the cost model to runs on this cluster; `plan --profile` then uses what was fitted."""
    from meshwright.calibration import from_runs, proposals
    from meshwright.plan.files import save_plan
    from meshwright.records import dumps
    from meshwright.session import open_session, with_sources

    if not propose:
        found = from_runs(runs or [], cluster)
        output.write_text(dumps(found), encoding="utf-8")
        fitted = found.calibration
        if fitted and fitted.error:
            low, high = fitted.error.low, fitted.error.high
            typer.echo(f"left out, four of five runs took {low:.2f} to {high:.2f} of the predicted")
        typer.echo(f"wrote {output}")
        return
    if not model or cluster is None:
        raise typer.BadParameter("--propose needs --model and --cluster", param_hint="--propose")
    session = open_session(
        model=model,
        cluster=cluster,
        profile=profile,
        global_batch=global_batch,
        sequence=sequence,
        precision=precision.value if precision else None,
        optimizer="adamw",
    )
    folder = output if output.suffix == "" else Path("calibration")
    folder.mkdir(parents=True, exist_ok=True)
    for index, proposed in enumerate(proposals(session, propose)):
        path = folder / f"{index}-{proposed.name}.json"
        save_plan(with_sources(session, proposed), path)
        typer.echo(f"meshwright train {path} --steps 12 -o {folder / f'run-{index}'}")
    typer.echo(f"then: meshwright calibrate {folder}/run-* -o calibrated.json")


@app.command()
def discover(
    output: Annotated[Path, typer.Option("--output", "-o")] = Path("cluster.toml"),
) -> None:
    """Describe the machine this runs on."""
    from meshwright.cluster.discover import discover_toml

    output.write_text(discover_toml())
    typer.echo(f"wrote {output}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Run folder.")] = Path("runs/demo"),
    steps: Annotated[int, typer.Option(help="Optimizer steps of each plan.")] = 10,
) -> None:
    """Emulate a mixed cluster here, plan for it, and train by the plan and by the even one."""
    from meshwright.demo import run_demo

    run_demo(output, steps)


def main() -> None:
    """Entry point: a user's mistake ends with its message and status 2, never a traceback."""
    from meshwright.errors import MeshwrightError

    try:
        app()
    except MeshwrightError as error:
        sys.stderr.write(f"{type(error).__name__}:\n{error}\n")
        sys.exit(2)
