"""Verifies predictions: trains a plan and its rivals for a few steps each, and compares predicted
with measured times."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from meshwright import files
from meshwright.cluster.spec import devices_of
from meshwright.cost.profile import version_mismatches
from meshwright.errors import FitError, PlanError, Problem, TrainingError
from meshwright.model.spec import without_division
from meshwright.plan.files import save_plan
from meshwright.plan.ranks import (
    describe_plan,
    stage_placements,
    uses_tensor_parallelism,
)
from meshwright.plan.spec import Plan
from meshwright.program.timeline import Timeline
from meshwright.records import dumps, load, record
from meshwright.report.page import Rival, write_report
from meshwright.report.terminal import plain_text
from meshwright.report.verification import kinds_table, strategies_table
from meshwright.runtime.run_folder import TIMELINE, RunSettings
from meshwright.simulate.compare_timelines import TimelineComparison, compare_timelines
from meshwright.testbed.cpu_load import CpuLoadMeter
from meshwright.testbed.launcher import TestbedLauncher
from meshwright.testbed.undisturbed_runs import TestbedRun, train_on
from meshwright.text import file_name
from meshwright.workflows.session import (
    Session,
    manual_plan,
    priced,
    simulate_priced,
    with_prediction,
)
from meshwright.workflows.train import train_here

Array = NDArray[np.float64]
RIVALS = {"dp": "ddp", "megatron": "even", "amp": "amp"}
"""Baselines of the search by the names that users give."""
Train = Callable[[Session, Plan, RunSettings, Path, str], TestbedRun]
"""A function that trains one plan; the last argument is its title."""
TENSOR_ON_A_TESTBED = (
    "the plan has tensor parallelism: emulated devices share cores, and wait for each other's turn "
    "at every sum inside a layer as no devices of their own do"
)


@record
class Verified:
    """Holds the predicted and measured times of one strategy."""

    name: str
    plan: str
    """The plan in one line."""
    predicted_seconds: float
    measured_seconds: float
    """Median step seconds without the first steps."""
    spread: float
    """(largest - smallest) / median of the measured steps."""
    foreign_share: float
    """Share of the machine's processor time that other processes used meanwhile; -1 if it was not
    measured."""
    disturbed: bool
    parts: TimelineComparison | None = None
    """Predicted and measured times of one step, instruction by instruction."""

    @property
    def error(self) -> float:
        """Returns the relative error of the prediction, (predicted - measured) / measured."""
        return self.predicted_seconds / self.measured_seconds - 1


@record
class Verification:
    """Compares a plan with its rivals."""

    strategies: tuple[Verified, ...]
    """Strategies, the plan itself first."""
    absent: tuple[str, ...] = ()
    """Sentences on what the testbed does not emulate, and why."""
    warnings: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    """Rivals that could not be tried, and why."""

    @property
    def rank_correlation(self) -> float | None:
        """Returns Spearman's rank correlation of predicted and measured seconds over all
        strategies; None for fewer than three."""
        return spearman(
            [each.predicted_seconds for each in self.strategies],
            [each.measured_seconds for each in self.strategies],
        )

    @property
    def regret(self) -> float:
        """Returns how much slower the plan is than the fastest strategy: the ratio of their
        measured seconds, less 1."""
        best = min(each.measured_seconds for each in self.strategies)
        return self.strategies[0].measured_seconds / best - 1


def spearman(left: Sequence[float], right: Sequence[float]) -> float | None:
    """Computes the rank correlation, with mean ranks for equal values; None if there are fewer than
    three values or all are equal (Spearman 1904)."""
    if len(left) < 3 or len(set(left)) == 1 or len(set(right)) == 1:
        return None
    return float(np.corrcoef(_ranks(left), _ranks(right))[0, 1])


def _ranks(values: Sequence[float]) -> Array:
    array = np.asarray(values)
    below = (array[:, None] > array[None, :]).sum(axis=1)
    equal = (array[:, None] == array[None, :]).sum(axis=1)
    ranks: Array = below + (equal - 1) / 2
    return ranks


def rivals_of(
    session: Session, names: Sequence[str]
) -> tuple[list[tuple[str, Plan]], tuple[str, ...]]:
    """Returns the plans of these rivals, and why some have none. Raises PlanError for an unknown
    name."""
    unknown = [name for name in names if name not in RIVALS]
    PlanError.check(
        Problem("--against", "", repr(name), "one of " + ", ".join(RIVALS)) for name in unknown
    )
    found, left_out = [], []
    for name in names:
        try:
            found.append((name, manual_plan(session, RIVALS[name])))
        except (FitError, PlanError) as failure:
            left_out.append(f"{name}: {failure}")
    return found, tuple(left_out)


def verify(
    session: Session,
    strategies: Sequence[tuple[str, Plan]],
    train: Train,
    settings: RunSettings,
    folder: Path,
) -> tuple[Verified, ...]:
    """Trains a few steps of every strategy and compares each with its prediction. Each leaves a
    run folder with its plan and both timelines."""
    return tuple(
        _verified(session, name, plan, train, settings, folder / file_name(name))
        for name, plan in strategies
    )


def _verified(
    session: Session,
    name: str,
    plan: Plan,
    train: Train,
    settings: RunSettings,
    folder: Path,
) -> Verified:
    found = priced(session, plan)
    expected = simulate_priced(found)
    files.make_folder(folder)
    save_plan(with_prediction(found), folder / "predicted.json")
    run = train(session, plan, settings, folder, name)
    outcome = run.outcome
    if len(outcome.metrics) < 2:
        raise TrainingError(Problem(name, "steps", str(len(outcome.metrics)), "at least 2"))
    warm = [line.step_seconds for line in outcome.metrics[min(2, len(outcome.metrics) - 1) :]]
    measured = median(warm)
    files.write_text(folder / "predicted-timeline.json", dumps(expected))
    return Verified(
        name=name,
        plan=describe_plan(plan),
        predicted_seconds=expected.step_seconds,
        measured_seconds=measured,
        spread=(max(warm) - min(warm)) / measured,
        foreign_share=run.foreign_share,
        disturbed=run.disturbed,
        parts=compare_timelines(expected, outcome.timeline) if outcome.timeline else None,
    )


def unmeasured(session: Session, plan: Plan) -> tuple[str, ...]:
    """Returns sentences about the layer times of a plan that its profile does not contain."""
    if session.profile is None:
        return ()
    rows: dict[str, set[int]] = defaultdict(set)
    for entry in session.profile.layers:
        rows[entry.device].add(entry.rows)
    types = {device.name: device.type for device in devices_of(session.cluster)}
    found: dict[str, None] = {}
    for stage in stage_placements(plan):
        for placement in stage.mesh.members:
            kind, count = types[placement.device], placement.rows[1] - placement.rows[0]
            known = ", ".join(map(str, sorted(rows[kind])))
            if not rows[kind]:
                found[f"{kind} was not measured: its layers are priced by the datasheet"] = None
            elif count not in rows[kind]:
                way = "inter" if min(rows[kind]) < count < max(rows[kind]) else "extra"
                found[f"{count} rows on {kind}: {way}polated from {known}"] = None
    return tuple(found)


def verify_here(
    session: Session,
    plan: Plan,
    names: Sequence[str],
    launcher: TestbedLauncher | None,
    settings: RunSettings,
    folder: Path,
    console: Console,
) -> Verification:
    """Trains the plan and these rivals on a testbed or on this machine; prints the comparison, and
    writes it to `folder` as verification.json and report.html.

    Raises what training raises, and PlanError for an unknown rival.
    """
    warnings = list(version_mismatches(session.profile)) if session.profile else []
    virtual = launcher is not None and launcher.testbed.testbed.mode == "virtual"
    if not virtual:
        warnings += unmeasured(session, plan)
    if session.profile is None and not virtual:
        warnings.append("no profile: predictions come from datasheets, see `meshwright profile`")
    model = without_division(session.model, "tensor") if launcher else session.model
    fair = replace(session, model=model)
    rivals, left_out = rivals_of(fair, names)
    if launcher and uses_tensor_parallelism(plan):
        warnings.append(TENSOR_ON_A_TESTBED)
    train = _on_testbed(launcher, console) if launcher else _on_this_machine(console)
    strategies = verify(session, [("plan", plan), *rivals], train, settings, folder)
    verification = Verification(
        strategies=strategies,
        absent=launcher.testbed.absent if launcher else (),
        warnings=tuple(warnings),
        left_out=left_out,
    )
    _print(verification, console)
    files.write_text(folder / "verification.json", dumps(verification))
    _report(session, plan, verification, folder)
    return verification


def _on_testbed(launcher: TestbedLauncher, console: Console) -> Train:
    def train(
        session: Session, plan: Plan, settings: RunSettings, folder: Path, title: str
    ) -> TestbedRun:
        return train_on(launcher, session, plan, settings, folder, title=title, console=console)

    return train


def _on_this_machine(console: Console) -> Train:
    def train(
        session: Session, plan: Plan, settings: RunSettings, folder: Path, title: str
    ) -> TestbedRun:
        watch = CpuLoadMeter()
        outcome = train_here(session, plan, settings, folder, title=title, console=console)
        foreign = watch.foreign_share()
        return TestbedRun(outcome=outcome, foreign_share=foreign, attempts=1, disturbed=False)

    return train


def _print(verification: Verification, console: Console) -> None:
    plan = verification.strategies[0]
    if plan.parts:
        console.print(kinds_table(plan.parts))
        console.print()
    rows = [
        (s.name, s.plan, s.predicted_seconds, s.measured_seconds, s.spread)
        for s in verification.strategies
    ]
    console.print(strategies_table(rows))
    console.print()
    says = [f"regret of the plan: {verification.regret:.1%}"]
    if verification.rank_correlation is not None:
        says.append(f"rank correlation: {verification.rank_correlation:.3f}")
    says += [
        f"{s.name}: others used {s.foreign_share:.0%} of the processor meanwhile; measure again "
        "on a quiet machine"
        for s in verification.strategies
        if s.disturbed
    ]
    says += [f"not emulated: {each}" for each in verification.absent]
    says += [f"left out: {each}" for each in verification.left_out]
    says += [f"warning: {each}" for each in verification.warnings]
    for sentence in says:
        console.print(plain_text(f"• {sentence}"))


def _report(session: Session, plan: Plan, verification: Verification, folder: Path) -> None:
    own, *rivals = verification.strategies
    path = folder / "plan" / TIMELINE
    write_report(
        folder / "report.html",
        plan,
        session.cluster,
        session.model,
        predicted=simulate_priced(priced(session, plan)),
        measured=(
            load(path, Timeline, error=TrainingError, large=True) if files.exists(path) else None
        ),
        rivals=tuple(
            Rival(
                name=each.name,
                predicted_seconds=each.predicted_seconds,
                measured_seconds=each.measured_seconds,
            )
            for each in (*rivals, own)
        ),
        comparison=own.parts,
    )
