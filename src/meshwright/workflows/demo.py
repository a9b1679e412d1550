"""Runs the whole workflow on one machine: emulates a mixed cluster, profiles it, plans, trains,
compares.

Four processes emulate two fast and two slow devices: each computes for real, then sleeps until its
instruction has lasted its CPU time divided by the device's share of a core. Messages are real too.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from meshwright import files
from meshwright.errors import Problem, TrainingError
from meshwright.launch.local import Launcher
from meshwright.model.spec import without_division
from meshwright.plan.files import save_plan
from meshwright.plan.ranks import describe_plan
from meshwright.plan.spec import Plan
from meshwright.profiling.measure_profile import ProfileSettings
from meshwright.records import record
from meshwright.report.chrome_trace import save_chrome_trace
from meshwright.report.page import Rival, write_report
from meshwright.report.tables import explain
from meshwright.report.terminal import plain_text
from meshwright.runtime.run_folder import RunSettings, TrainingOptions
from meshwright.testbed.launcher import EMULATED_WORKER
from meshwright.workflows.profile_model import profile_here
from meshwright.workflows.session import (
    SearchLimits,
    Session,
    manual_plan,
    open_session,
    priced,
    search_plan,
    simulate_priced,
)
from meshwright.workflows.train import RunOutcome, train_here

MODEL = "gpt-tiny"
SEQUENCE = 128
GLOBAL_BATCH = 32
SHARES = {"fast": 0.3, "slow": 0.09}
"""Emulated speed as a share of a core. The shares add up to less than one core, so that four
processes that compute in turns on one of two cores never wait for each other."""

CLUSTER = """\
# Four processes of this machine: two nodes with two emulated devices each.
format = 1
name = "demo"

[device.fast]
like = "cpu"

[device.slow]
like = "cpu"

[[node]]
name = "fast"
devices = ["2 x fast"]
inside = { bandwidth = "8 Gbit/s", latency = "100 us", shared = true }
network = { bandwidth = "8 Gbit/s", latency = "100 us" }

[[node]]
name = "slow"
devices = ["2 x slow"]
inside = { bandwidth = "8 Gbit/s", latency = "100 us", shared = true }
network = { bandwidth = "8 Gbit/s", latency = "100 us" }
"""


@record
class TimedPlan:
    """Holds one plan of the comparison, with its predicted and measured times."""

    title: str
    plan: Plan
    outcome: RunOutcome

    @property
    def predicted_seconds(self) -> float:
        assert self.plan.prediction is not None
        return self.plan.prediction.step_seconds


def run_demo(folder: Path, steps: int, limits: SearchLimits) -> None:
    """Runs the whole demo; it leaves cluster, profile, plans, runs, traces and report.html in
    `folder`."""
    console = Console()
    files.make_folder(folder)
    session = _prepare(folder, console)
    console.rule("plan")
    found = search_plan(session, limits)
    even = manual_plan(session, "even")
    explain(found, console)
    console.rule("train")
    with Launcher(worker=EMULATED_WORKER) as launcher:
        trained = tuple(
            _train(session, title, plan, folder, steps, console, launcher)
            for title, plan in (("even plan", even), ("plan found", found))
        )
    console.rule("result")
    _check_losses(trained)
    console.print(_table(trained))
    _verdict(trained, console)
    _report(session, trained, folder)
    console.print(plain_text(f"report: {folder / 'report.html'}"))


def _prepare(folder: Path, console: Console) -> Session:
    """Writes the cluster file, profiles the cluster, and opens a session."""
    cluster, profile = folder / "cluster.toml", folder / "profile.json"
    files.write_text(cluster, CLUSTER)
    console.rule("profile")
    console.print("4 processes on this machine emulate 2 fast and 2 slow devices (speeds 10 : 3)")
    settings = ProfileSettings(
        model=MODEL,
        sequence=SEQUENCE,
        rows=(1, 2, 4, 8),
        precision="fp32",
        cluster=str(cluster),
        output=str(profile),
        shares=SHARES,
    )
    profile_here(settings, processes=4, again=True, console=console)
    session = open_session(
        model=MODEL,
        cluster=cluster,
        profile=profile,
        global_batch=GLOBAL_BATCH,
        sequence=SEQUENCE,
        precision="fp32",
        optimizer="adamw",
    )
    # Emulated devices that share a core would wait for each other inside every layer.
    return replace(session, model=without_division(session.model, "tensor"))


def _train(
    session: Session,
    title: str,
    plan: Plan,
    folder: Path,
    steps: int,
    console: Console,
    launcher: Launcher,
) -> TimedPlan:
    name = title.replace(" ", "-")
    save_plan(plan, folder / f"{name}.json")
    kinds = {f"{node.name}:{i}": kind for node in session.cluster.nodes
             for i, kind in enumerate(node.devices)}  # fmt: skip
    settings = RunSettings(
        model=MODEL,
        learning_rate=1e-3,
        options=TrainingOptions(steps=steps),
        shares={device: SHARES[kinds[device]] for device in plan.devices},
    )
    run = folder / name
    outcome = train_here(
        session, plan, settings, run, title=title, console=console, launcher=launcher
    )
    if outcome.timeline is not None:
        save_chrome_trace(outcome.timeline, folder / f"{name}-measured-trace.json")
    save_chrome_trace(
        simulate_priced(priced(session, plan)), folder / f"{name}-predicted-trace.json"
    )
    return TimedPlan(title=title, plan=plan, outcome=outcome)


def _check_losses(trained: tuple[TimedPlan, ...]) -> None:
    """Checks that both plans train the same model: their losses differ only by the order of float32
    sums."""
    first, second = (each.outcome.losses for each in trained)
    worst = max(abs(a - b) / abs(a) for a, b in zip(first, second, strict=True))
    if worst > 1e-3:
        raise TrainingError(
            Problem(
                "demo", "loss", f"losses that differ by {worst:.1e}", "the same from both plans"
            )
        )
    if second[-1] >= second[0]:
        found = f"{second[0]:.3f} to {second[-1]:.3f}"
        raise TrainingError(Problem("demo", "loss", found, "a loss that falls"))


def _table(trained: tuple[TimedPlan, ...]) -> Table:
    table = Table("", "plan", "predicted", "measured", "error")
    for each in trained:
        measured = each.outcome.step_seconds
        table.add_row(
            plain_text(each.title),
            plain_text(describe_plan(each.plan)),
            f"{each.predicted_seconds:.3f} s",
            f"{measured:.3f} s",
            f"{each.predicted_seconds / measured - 1:+.1%}",
        )
    return table


def _verdict(trained: tuple[TimedPlan, ...], console: Console) -> None:
    even, found = trained
    measured = even.outcome.step_seconds / found.outcome.step_seconds
    foretold = even.predicted_seconds / found.predicted_seconds
    losses = found.outcome.losses
    console.print(
        plain_text(
            f"The plan found trains {measured:.2f}x as fast as the best even plan (predicted: "
            f"{foretold:.2f}x), to the same loss: {losses[0]:.4f} to {losses[-1]:.4f}."
        )
    )


def _report(session: Session, trained: tuple[TimedPlan, ...], folder: Path) -> None:
    found = trained[-1]
    write_report(
        folder / "report.html",
        found.plan,
        session.cluster,
        session.model,
        predicted=simulate_priced(priced(session, found.plan)),
        measured=found.outcome.timeline,
        losses={each.title: each.outcome.losses for each in trained},
        rivals=tuple(
            Rival(
                name=each.title,
                predicted_seconds=each.predicted_seconds,
                measured_seconds=each.outcome.step_seconds,
            )
            for each in trained
        ),
    )
