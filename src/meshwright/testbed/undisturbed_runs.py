"""Trains on a testbed that is up, and measures how much other programs have disturbed the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from meshwright import files
from meshwright.emulation.virtual_times import TIMES_FILE, virtual_times
from meshwright.plan.spec import Plan
from meshwright.records import dumps, record
from meshwright.runtime.run_folder import RunSettings
from meshwright.testbed.cpu_load import CpuLoadMeter
from meshwright.testbed.launcher import TestbedLauncher
from meshwright.workflows.session import Session, priced
from meshwright.workflows.train import Launch, RunOutcome, train_here


@record
class TestbedRun:
    """Describes one training run on a testbed, and how much other programs disturbed it."""

    outcome: RunOutcome
    foreign_share: float
    """Share of the machine's CPU time that other programs used during the run."""
    attempts: int
    """Number of attempts made."""
    disturbed: bool
    """True if others used more than the testbed allows in every attempt; this is the least
    disturbed one."""


def train_on(
    launcher: TestbedLauncher,
    session: Session,
    plan: Plan,
    settings: RunSettings,
    folder: Path,
    *,
    title: str = "training",
    console: Console | None = None,
) -> TestbedRun:
    """Trains by a plan on the testbed, and tries again if others disturb the run. Raises what
    `workflows.train.train_here` raises, and LaunchError for a plan that virtual devices cannot
    follow."""
    testbed = launcher.testbed.testbed
    runs: list[TestbedRun] = []
    for attempt in range(1, testbed.attempts + 1):
        outcome, foreign = _attempt(launcher, session, plan, settings, folder, title, console)
        runs.append(
            TestbedRun(
                outcome=outcome,
                foreign_share=foreign,
                attempts=attempt,
                disturbed=foreign > testbed.foreign_share,
            )
        )
        if not runs[-1].disturbed:
            return runs[-1]
    calmest = min(runs, key=lambda run: run.foreign_share)
    return replace(calmest, attempts=len(runs))


def _attempt(
    launcher: TestbedLauncher,
    session: Session,
    plan: Plan,
    settings: RunSettings,
    folder: Path,
    title: str,
    console: Console | None,
) -> tuple[RunOutcome, float]:
    running = launcher.testbed
    watch = CpuLoadMeter(launcher.launcher.processor_seconds)
    outcome = train_here(
        session,
        plan,
        replace(
            settings, shares={d: running.shares[d] for d in plan.devices if d in running.shares}
        ),
        folder,
        title=title,
        console=console,
        launch=launch_for(launcher, session, plan),
    )
    return outcome, watch.foreign_share()


def launch_for(launcher: TestbedLauncher, session: Session, plan: Plan) -> Launch:
    """Returns the function by which `train_here` starts ranks on this testbed. Raises LaunchError,
    see `virtual_times`."""
    running = launcher.testbed
    if running.testbed.mode != "virtual":
        return partial(_launch, launcher, None)
    times = virtual_times(replace(priced(session, plan), cluster=running.testbed.cluster))
    return partial(_launch, launcher, dumps(times))


def _launch(
    launcher: TestbedLauncher,
    times: str | None,
    devices: tuple[str, ...],
    folder: Path,
    settings: RunSettings,
    tell: Callable[[dict[str, float]], None],
) -> None:
    timeout = settings.options.timeout_seconds
    run = partial(launcher.launcher.run, on_metrics=tell, timeout_seconds=timeout)
    if times is not None:
        files.write_text(folder / TIMES_FILE, times)
    run(devices, folder)
