"""Trains on a testbed that is up, and measures how much other programs have disturbed the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from meshwright import files
from meshwright.plan.spec import Plan
from meshwright.records import dumps, record
from meshwright.runtime.run import RunSettings
from meshwright.session import Session, priced
from meshwright.testbed.launch import BedLauncher
from meshwright.testbed.load import Watch
from meshwright.testbed.times import TIMES, virtual_times
from meshwright.training import Launch, Outcome, train_here


@record
class Run:
    """One training run on a testbed."""

    outcome: Outcome
    foreign_share: float
    """Share of the machine's CPU time that other programs used during the run."""
    attempts: int
    """Number of attempts made."""
    disturbed: bool
    """True if others used more than the testbed allows in every attempt; this is the least
    disturbed one."""


def train_on(
    launcher: BedLauncher,
    session: Session,
    plan: Plan,
    settings: RunSettings,
    folder: Path,
    *,
    title: str = "training",
    console: Console | None = None,
) -> Run:
    """Trains by a plan on the testbed, and tries again if others disturb the run.

    Raises what `training.train_here` raises, and LaunchError for a plan that virtual devices cannot
    follow.
    """
    bed = launcher.up.bed
    runs: list[Run] = []
    for attempt in range(1, bed.attempts + 1):
        outcome, foreign = _attempt(launcher, session, plan, settings, folder, title, console)
        runs.append(
            Run(
                outcome=outcome,
                foreign_share=foreign,
                attempts=attempt,
                disturbed=foreign > bed.foreign_share,
            )
        )
        if not runs[-1].disturbed:
            return runs[-1]
    calmest = min(runs, key=lambda run: run.foreign_share)
    return replace(calmest, attempts=len(runs))


def _attempt(
    launcher: BedLauncher,
    session: Session,
    plan: Plan,
    settings: RunSettings,
    folder: Path,
    title: str,
    console: Console | None,
) -> tuple[Outcome, float]:
    up = launcher.up
    watch = Watch(launcher.ranks.processor_seconds)
    outcome = train_here(
        session,
        plan,
        replace(settings, shares={d: up.shares[d] for d in plan.devices if d in up.shares}),
        folder,
        title=title,
        console=console,
        launch=launch_for(launcher, session, plan),
    )
    return outcome, watch.foreign_share()


def launch_for(launcher: BedLauncher, session: Session, plan: Plan) -> Launch:
    """Returns the function by which `train_here` starts ranks on this testbed. Raises LaunchError,
    see `virtual_times`."""
    up = launcher.up
    if up.bed.mode != "virtual":
        return partial(_launch, launcher, None)
    times = virtual_times(replace(priced(session, plan), cluster=up.bed.cluster))
    return partial(_launch, launcher, dumps(times))


def _launch(
    launcher: BedLauncher,
    times: str | None,
    devices: tuple[str, ...],
    folder: Path,
    settings: RunSettings,
    tell: Callable[[dict[str, float]], None],
) -> None:
    timeout = settings.options.timeout_seconds
    run = partial(launcher.ranks.run, on_metrics=tell, timeout_seconds=timeout)
    if times is not None:
        files.write_text(folder / TIMES, times)
    run(devices, folder)
