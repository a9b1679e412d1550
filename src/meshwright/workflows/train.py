"""Runs a training from the outside: prepares its folder, starts its processes, shows its progress,
reads its results."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import psutil
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from meshwright import files
from meshwright.cluster.spec import devices_of
from meshwright.cost.memory import device_memory
from meshwright.errors import LaunchError, ModelError, Problem, TrainingError
from meshwright.launch.local import Launcher
from meshwright.launch.lock import lock_folder
from meshwright.launch.nodes import launch_commands, launch_node, write_nodes
from meshwright.model.hf import language_model
from meshwright.model.source import model_source
from meshwright.plan.files import save_plan
from meshwright.plan.spec import Plan
from meshwright.program.timeline import Timeline
from meshwright.records import dumps, load, record
from meshwright.report.terminal import plain_text
from meshwright.runtime.corpus import check_corpus, open_corpus
from meshwright.runtime.run_folder import (
    METRICS,
    OWN_NAMES,
    PLAN,
    SETTINGS,
    TIMELINE,
    Metrics,
    RunSettings,
    load_settings,
)
from meshwright.text import printable
from meshwright.units import format_bytes
from meshwright.workflows.session import Session

Launch = Callable[[tuple[str, ...], Path, RunSettings, Callable[[dict[str, float]], None]], None]
"""A function that runs a prepared folder on these devices, waits for the end, and passes on its
metrics line by line."""


@record
class RunOutcome:
    """Holds what was measured in a finished run."""

    metrics: tuple[Metrics, ...]
    timeline: Timeline | None
    step_seconds: float
    """Median step seconds without the first few steps."""

    @property
    def losses(self) -> tuple[float, ...]:
        return tuple(line.loss for line in self.metrics)


def prepare_run(session: Session, plan: Plan, settings: RunSettings, folder: Path) -> None:
    """Writes the files that every process of the run reads."""
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


def check_data(plan: Plan, settings: RunSettings) -> None:
    """Raises DataError or ModelError if the corpus or the model cannot be trained on."""
    vocabulary = language_model(settings.model, plan.job.sequence).vocabulary
    corpus = open_corpus(settings.data, vocabulary)
    check_corpus(corpus, sequence=plan.job.sequence, global_batch=plan.job.global_batch)


def _kept_model(source: str, folder: Path) -> str:
    """Copies a model's config file into the run folder, since other nodes may not have it; returns
    its path there."""
    found = model_source(source)
    path = Path(found.base)
    if not files.is_file(path):
        return source
    copy = folder / (path.name if path.name not in OWN_NAMES else "model-config.json")
    if path.resolve() != copy.resolve():
        files.copy(path, copy, error=ModelError)
    return found.at(str(copy))


def check_this_machine(session: Session, plan: Plan, accelerators: int) -> None:
    """Raises LaunchError unless all ranks of the plan can run together on this machine, which has
    this number of accelerators."""
    if 0 < accelerators < len(plan.devices):
        raise LaunchError(
            Problem(
                plan.name,
                "devices",
                f"{len(plan.devices)} devices",
                f"at most {accelerators}, the accelerators of this machine",
                "start the printed commands on the plan's own nodes",
            )
        )
    memory = device_memory(plan, session.model, session.cluster)
    needed = sum(m.parameters + m.gradients + m.optimizer + m.activations for m in memory)
    available = psutil.virtual_memory().available
    if accelerators == 0 and needed > available:
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
    launcher: Launcher | None = None,
    launch: Launch | None = None,
) -> RunOutcome:
    """Runs all ranks on this machine, with a progress bar on a terminal and lines elsewhere.

    Processes are started by `launcher` (by default a new one), or by `launch`, which testbeds pass
    for their emulated devices. Raises DataError or ModelError as `check_data` does, LaunchError if
    the ranks do not fit here or another run uses the folder, and TrainingError if the run has to
    stop.
    """
    console, timeout = console or Console(), settings.options.timeout_seconds
    with lock_folder(folder), ExitStack() as stack:
        own = None
        if launch is None:
            own = (launcher or stack.enter_context(Launcher())).preload()
            launch = partial(_launch_here, own)
        check_data(plan, settings)
        check_this_machine(session, plan, own.accelerators(timeout) if own else 0)
        prepare_run(session, plan, settings, folder)
        with _shown(settings.options.steps, title, console) as show:
            launch(plan.devices, folder, settings, show)
    return read_outcome(folder, tuple(show.metrics))


def _launch_here(
    launcher: Launcher,
    devices: tuple[str, ...],
    folder: Path,
    settings: RunSettings,
    tell: Callable[[dict[str, float]], None],
) -> None:
    timeout = settings.options.timeout_seconds
    launcher.run(devices, folder, on_metrics=tell, timeout_seconds=timeout)


def prepared_commands(
    session: Session, plan: Plan, settings: RunSettings, folder: Path, port: int
) -> list[str]:
    """Prepares a run over several machines, and returns the command for each of its nodes.

    Raises what `check_data` does, and LaunchError if another run uses the folder.
    """
    check_data(plan, settings)
    with lock_folder(folder):
        prepare_run(session, plan, settings, folder)
        write_nodes(folder, plan.devices, session.cluster, port)
    return launch_commands(plan.devices, folder)


def train_node(folder: Path, node: str, console: Console) -> RunOutcome | None:
    """Runs the ranks of one node of a prepared run; returns None if the results are on another
    node.

    Raises what `launch_node` does."""
    settings = load_settings(folder, error=LaunchError)
    with _shown(settings.options.steps, f"training on {node}", console) as show:
        launch_node(folder, node, show)
    shown = show.metrics
    return read_outcome(folder, tuple(shown)) if shown else None


@contextmanager
def _shown(steps: int, title: str, console: Console) -> Iterator[_Show]:
    """Yields a function that shows metrics as they come: with a progress bar on a terminal, a few
    lines elsewhere."""
    with _progress(console) as progress:
        bar = progress.add_task(escape(printable(title)), total=steps, loss="", speed="starting")
        yield _Show(steps, title, console, progress, bar, [])


@dataclass
class _Show:
    """Shows the lines of metrics.jsonl one by one, and keeps them."""

    steps: int
    title: str
    console: Console
    progress: Progress
    bar: TaskID
    metrics: list[Metrics]

    def __call__(self, line: dict[str, float]) -> None:
        last = Metrics(**line)  # type: ignore[arg-type]
        self.metrics.append(last)
        loss, speed = f"loss {last.loss:.4f}", f"{last.tokens_per_second:,.0f} tokens/s"
        self.progress.update(self.bar, advance=1, loss=loss, speed=speed)
        if not sys.stdout.isatty() and _worth_a_line(last.step, self.steps):
            self.console.print(plain_text(f"{self.title}: step {last.step}  {loss}  {speed}"))


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


def read_outcome(folder: Path, metrics: tuple[Metrics, ...]) -> RunOutcome:
    """Reads the measurements from the folder of a finished run."""
    if not metrics:
        wanted = "one line per step"
        raise TrainingError(Problem(str(folder / METRICS), "", "no steps", wanted))
    timeline = folder / TIMELINE
    warm = metrics[min(3, len(metrics) - 1) :]
    return RunOutcome(
        metrics=metrics,
        timeline=(
            load(timeline, Timeline, error=TrainingError, large=True)
            if files.exists(timeline)
            else None
        ),
        step_seconds=median(line.step_seconds for line in warm),
    )
