"""Defines the verbs that train on this machine: train, launch, demo.

Heavy imports are inside the functions.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meshwright.cli.emulating import (
    current_launcher,
    train_with_launcher,
)
from meshwright.cli.options import (
    BudgetOption,
    ForbidOption,
    PageOption,
    PlanFile,
    app,
    check_outputs,
    say,
    search_limits,
)

if TYPE_CHECKING:
    from meshwright.cost.priced_plan import PricedPlan
    from meshwright.plan.spec import Plan
    from meshwright.runtime.run_folder import RunSettings
    from meshwright.workflows.train import RunOutcome


SETTINGS = {
    "data": "--data",
    "learning_rate": "--learning-rate",
    "warmup_steps": "--warmup-steps",
    "options.steps": "--steps",
    "options.clip_norm": "--clip-norm",
    "options.seed": "--seed",
    "options.save_weights": "--save-weights",
    "options.debug": "--debug",
    "options.timeout_seconds": "--timeout",
    "options.compile": "--compile",
}
"""Options of `train`, keyed by the field of RunSettings that each one sets; they have its
default."""


DataOption = Annotated[
    str | None,
    typer.Option(help="Text or token file (.bin, .npy); default: Python's standard library."),
]
DryRunOption = Annotated[
    bool, typer.Option(help="Prepare the folder, and print each node's command.")
]
MEETING = "the port where the nodes meet."


@app.command()
def train(
    plan_file: PlanFile,
    data: DataOption = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 100,
    learning_rate: Annotated[float, typer.Option(help="Peak of the schedule.")] = 3e-4,
    warmup_steps: Annotated[int, typer.Option(help="Steps of linear warm-up.")] = 10,
    clip_norm: Annotated[float, typer.Option(help="Gradient norm limit; 0: none.")] = 1.0,
    seed: int = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="Run folder.")] = Path("runs/run"),
    save_weights: Annotated[bool, typer.Option(help="Write model.safetensors.")] = False,
    report: PageOption = None,
    debug: Annotated[bool, typer.Option(help="Check messages, trace NaN to its layer.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds until a silent rank is lost.")] = 300.0,
    compile: Annotated[bool, typer.Option(help="Run layers through torch.compile.")] = False,
    dry_run: DryRunOption = False,
    port: Annotated[int, typer.Option(min=1, max=65535, help=f"With --dry-run: {MEETING}")] = 29500,
) -> None:
    """Train by a plan on this machine, with one process for each device of the plan.

    `--dry-run` only prepares the run folder, and prints the command for each node of the plan.
    """
    with current_launcher(warm=not dry_run) as launcher:
        from meshwright import files
        from meshwright.workflows.session import reopen_plan
        from meshwright.workflows.train import prepared_commands

        session, found = reopen_plan(plan_file, runtime="meshwright")
        told = {"steps": steps, "clip_norm": clip_norm, "seed": seed, "save_weights": save_weights}
        told |= {"debug": debug, "timeout_seconds": timeout, "compile": compile}
        settings = _run_settings(found.plan, told, data, learning_rate, warmup_steps)
        files.check_folder(output)
        check_outputs(report)
        if dry_run:
            for command in prepared_commands(session, found.plan, settings, output, port):
                say(command)
            return
        outcome = train_with_launcher(launcher, session, found.plan, settings, output)
    say(f"loss {outcome.losses[-1]:.4f}, {outcome.step_seconds:.4g} s a step; see {output}")
    clipped = settings.options.waits_for_norm(found.plan.job.precision)
    _show(replace(found, clipped=clipped), outcome, report)


def _run_settings(
    plan: Plan, told: dict[str, Any], data: str | None, learning_rate: float, warmup_steps: int
) -> RunSettings:
    """Checks what the options of `train` have set; `told` holds those of TrainingOptions."""
    from meshwright.records import checked
    from meshwright.runtime.run_folder import RunSettings

    return checked(
        RunSettings,
        SETTINGS,
        model=plan.model.source,
        data=data,
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        options=told,
    )


def _show(found: PricedPlan, outcome: RunOutcome, report: Path | None) -> None:
    """Prints the measured step next to the predicted one, and writes an HTML page if asked to."""
    from rich.console import Console

    from meshwright.report.tables import comparison_table
    from meshwright.workflows.session import simulate_priced

    predicted = simulate_priced(found)
    if outcome.timeline is not None:
        Console().print(comparison_table(predicted, outcome.timeline))
    if report:
        from meshwright.report.page import write_report

        write_report(
            report,
            found.plan,
            found.cluster,
            found.model,
            predicted=predicted,
            measured=outcome.timeline,
            losses={found.plan.name: outcome.losses},
        )
        say(f"wrote {report}")


@app.command()
def launch(
    what: Annotated[
        list[str],
        typer.Argument(help="A run folder of `train --dry-run`; or, after --, a command."),
    ],
    node: Annotated[str, typer.Option(help="Name of the node that this machine is.")],
    plan_file: Annotated[
        Path | None, typer.Option("--plan", help="Run a command on all devices of this plan.")
    ] = None,
    cluster: Annotated[
        Path | None, typer.Option(help="Run a command on all devices of this cluster.")
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help=f"For a command: {MEETING}")] = 29500,
) -> None:
    """Start one node's processes of a run over several machines; run this on every node.

    The processes meet at the address of the first node. Each node uses the network interface that
    has the node's address in the cluster file.
    """
    if plan_file is not None or cluster is not None:
        raise typer.Exit(_launch_command(what, node, plan_file, cluster, port))
    if len(what) != 1:
        wanted = "one run folder; or --plan or --cluster, and a command after --"
        raise typer.BadParameter(f"found {' '.join(what)}; wanted {wanted}")
    from rich.console import Console

    from meshwright.workflows.train import train_node

    folder = Path(what[0])
    outcome = train_node(folder, node, Console())
    if outcome is not None:
        text = f"loss {outcome.losses[-1]:.4f}, {outcome.step_seconds:.4g} s a step; see {folder}"
        say(text)


def _launch_command(
    command: list[str], node: str, plan_file: Path | None, cluster: Path | None, port: int
) -> int:
    from meshwright.cluster.files import load_cluster
    from meshwright.cluster.spec import devices_of
    from meshwright.launch.nodes import launch_command
    from meshwright.workflows.session import reopen_plan

    if plan_file is not None:
        session, found = reopen_plan(plan_file, cluster=cluster, runtime="meshwright")
        return launch_command(found.plan.devices, session.cluster, node, command, port)
    assert cluster is not None
    machines = load_cluster(cluster)
    devices = [device.name for device in devices_of(machines)]
    return launch_command(devices, machines, node, command, port)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Run folder.")] = Path("runs/demo"),
    steps: Annotated[int, typer.Option(min=2, help="Optimizer steps of each plan.")] = 10,
    budget: BudgetOption = None,
    forbid: ForbidOption = None,
) -> None:
    """Emulate a mixed cluster on this machine, find a plan for it, and train by this plan and by
    the even one."""
    from meshwright import files
    from meshwright.records import checked_value
    from meshwright.runtime.run_folder import Steps
    from meshwright.workflows.demo import run_demo

    limits = search_limits(budget, forbid)
    files.check_folder(output)
    run_demo(output, checked_value(Steps, steps, "--steps"), limits)
