"""A training run from the outside: its folder, its commands, its progress, its report."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import psutil
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from meshwright import files
from meshwright.cluster.spec import devices_of
from meshwright.cost.memory import device_memory
from meshwright.errors import LaunchError, ModelError, Problem, TrainingError
from meshwright.model.hf import language_model
from meshwright.plan.files import save_plan
from meshwright.plan.spec import Plan
from meshwright.program.timeline import Timeline
from meshwright.records import dumps, load, record
from meshwright.report.terminal import words
from meshwright.runtime.corpus import check_corpus, open_corpus
from meshwright.runtime.launch import run_here, torchrun_commands
from meshwright.runtime.run import (
    METRICS,
    OWN_NAMES,
    PLAN,
    SETTINGS,
    TIMELINE,
    Metrics,
    RunSettings,
)
from meshwright.session import Session
from meshwright.text import printable
from meshwright.units import format_bytes

Launch = Callable[[tuple[str, ...], Path, Callable[[dict[str, float]], None]], None]
"""Runs a prepared folder on these devices, waits, and hands on its metrics line by line."""


@record
class Outcome:
    """What a finished run measured."""

    metrics: tuple[Metrics, ...]
    timeline: Timeline | None
    step_seconds: float
    """Median over the steps after the first few."""

    @property
    def losses(self) -> tuple[float, ...]:
        return tuple(line.loss for line in self.metrics)


def prepare(session: Session, plan: Plan, settings: RunSettings, folder: Path) -> None:
    """Write what every process of the run reads. Raises DataError, ModelError for a corpus or a
    model that cannot be trained on, before any process starts."""
    vocabulary = language_model(settings.model, plan.job.sequence).vocabulary
    corpus = open_corpus(settings.data, vocabulary)
    check_corpus(corpus, sequence=plan.job.sequence, global_batch=plan.job.global_batch)
    files.make_folder(folder)
    data = str(Path(settings.data).resolve()) if settings.data else None
    settings = replace(settings, model=_kept_model(settings.model, folder), data=data)
    save_plan(replace(plan, model=replace(plan.model, source=settings.model)), folder / PLAN)
    types = {device.name: device.type for device in devices_of(session.cluster)}
    known = {
        device: session.cluster.types[types[device]].peak[plan.job.precision]
        for device in plan.devices
        if session.cluster.types[types[device]].processor == "gpu"
    }
    settings = replace(settings, peak_flops=known)
    files.write_text(folder / SETTINGS, dumps(settings), durable=True)


def _kept_model(source: str, folder: Path) -> str:
    """A config file goes along with the run: other nodes may not have it where it is."""
    path = Path(source)
    if not files.is_file(path):
        return source
    copy = folder / (path.name if path.name not in OWN_NAMES else "model-config.json")
    if path.resolve() != copy.resolve():
        files.copy(path, copy, error=ModelError)
    return str(copy)


def training_commands(plan: Plan, folder: Path) -> tuple[str, ...]:
    """The torchrun command of every node."""
    return torchrun_commands(plan, folder)


def check_this_machine(session: Session, plan: Plan) -> None:
    """Raise LaunchError unless all ranks of the plan can run on this machine together."""
    import torch

    devices = torch.cuda.device_count()
    if 0 < devices < len(plan.devices):
        raise LaunchError(
            Problem(
                plan.name,
                "devices",
                f"{len(plan.devices)} devices",
                f"at most {devices}, the accelerators of this machine",
                "start the printed commands on the plan's own nodes",
            )
        )
    memory = device_memory(plan, session.model, session.cluster)
    needed = sum(m.parameters + m.gradients + m.optimizer + m.activations for m in memory)
    available = psutil.virtual_memory().available
    if devices == 0 and needed > available:
        raise LaunchError(
            Problem(
                plan.name,
                "devices",
                f"{len(plan.devices)} processes that need {format_bytes(needed)} together",
                f"at most the {format_bytes(available)} that this machine has free",
                "start the printed commands on the plan's own nodes",
            )
        )


def train_here(
    session: Session,
    plan: Plan,
    settings: RunSettings,
    folder: Path,
    *,
    title: str = "training",
    console: Console | None = None,
    launch: Launch | None = None,
) -> Outcome:
    """Run all ranks on this machine, with a progress bar on a terminal and lines elsewhere.

    `launch` starts them in another way than torchrun: on a testbed. Raises LaunchError if they do
    not fit here, TrainingError if the run has to stop.
    """
    console = console or Console()
    check_this_machine(session, plan)
    prepare(session, plan, settings, folder)
    metrics: list[Metrics] = []
    with _progress(console) as progress:
        bar = progress.add_task(
            escape(printable(title)), total=settings.steps, loss="", speed="starting"
        )

        def show(line: dict[str, float]) -> None:
            metrics.append(Metrics(**line))  # type: ignore[arg-type]
            last = metrics[-1]
            loss, speed = f"loss {last.loss:.4f}", f"{last.tokens_per_second:,.0f} tokens/s"
            progress.update(bar, advance=1, loss=loss, speed=speed)
            if not sys.stdout.isatty() and _worth_a_line(last.step, settings.steps):
                console.print(words(f"{title}: step {last.step}  {loss}  {speed}"))

        if launch is None:
            run_here(len(plan.devices), folder, on_metrics=show)
        else:
            launch(plan.devices, folder, show)
    return outcome(folder, tuple(metrics))


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, disable=not sys.stdout.isatty())


def _worth_a_line(step: int, steps: int) -> bool:
    return step % max(1, steps // 10) == 0 or step == steps - 1


def outcome(folder: Path, metrics: tuple[Metrics, ...]) -> Outcome:
    """What a run folder holds when the run is over."""
    if not metrics:
        wanted = "one line per step"
        raise TrainingError(Problem(str(folder / METRICS), "", "no steps", wanted))
    timeline = folder / TIMELINE
    warm = metrics[min(3, len(metrics) - 1) :]
    return Outcome(
        metrics=metrics,
        timeline=(
            load(timeline, Timeline, error=TrainingError, large=True)
            if files.exists(timeline)
            else None
        ),
        step_seconds=median(line.step_seconds for line in warm),
    )
