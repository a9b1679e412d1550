"""Makes a profile: decides what must be measured, reuses a known profile, and starts the processes
that measure."""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import psutil
from pydantic import Field
from rich.console import Console
from rich.progress import Progress

from meshwright import files
from meshwright.cluster.files import load_cluster
from meshwright.cluster.spec import Cluster, devices_of
from meshwright.cost.profile import Profile, versions
from meshwright.errors import LaunchError, Problem, ProfileError
from meshwright.launch.local import PROCESS_BYTES, Launcher
from meshwright.model.load import load_model
from meshwright.model.spec import Layer, LayerGraph, content_fingerprint
from meshwright.profiling import measure_profile as measuring
from meshwright.profiling.measure_profile import (
    SETTINGS,
    ProfileInputs,
    ProfileSettings,
    cached_profile,
    measure_profile,
    reference_core_seconds,
    save_profile,
)
from meshwright.records import dumps, fingerprint, load
from meshwright.runtime.launch_variables import RANK, WORLD_SIZE
from meshwright.units import format_bytes

Processes = Annotated[int, Field(ge=1, le=4096)]
"""Number of processes that measure on one machine."""


def profile_here(
    settings: ProfileSettings,
    processes: int,
    *,
    again: bool = False,
    console: Console | None = None,
) -> tuple[Profile, bool]:
    """Measures a profile and writes it; returns it, and True if the file already held these
    measurements.

    A process that a launcher started measures as a rank; otherwise `processes` processes are
    started on this machine. Raises ProfileError or LaunchError.
    """
    graph = load_model(settings.model, settings.sequence, settings.precision)
    launched = RANK in os.environ
    world = int(os.environ[WORLD_SIZE]) if launched else processes
    cluster = load_cluster(Path(settings.cluster)) if settings.cluster else None
    if cluster:
        _check_ranks(settings, cluster, world)
    mark = fingerprint(
        ProfileInputs(
            settings=replace(settings, cluster=None, output="", pairs=None),
            model=content_fingerprint(graph),
            cluster=cluster,
            processes=world,
            versions=versions(),
            pace=reference_core_seconds(settings),
        )
    )
    if launched:
        return measure_profile(settings, graph, None, mark=mark, again=again)
    there = None if again else cached_profile(settings, mark)
    if there is not None:
        return there, True
    _check_memory(settings, graph, processes)
    with tempfile.TemporaryDirectory(prefix="meshwright-") as scratch:
        _measure_in_processes(settings, processes, Path(scratch), console or Console())
    found = load(Path(settings.output), Profile, error=ProfileError)
    return save_profile(settings, replace(found, source=mark)), False


def _check_ranks(settings: ProfileSettings, cluster: Cluster, world: int) -> None:
    devices = devices_of(cluster)
    if world > len(devices):
        found = f"{world} processes"
        wanted = f"at most {len(devices)}, the devices of {cluster.name}"
        raise LaunchError(Problem(str(settings.cluster), "node", found, wanted))


def _check_memory(settings: ProfileSettings, graph: LayerGraph, processes: int) -> None:
    """Raises LaunchError if processors would measure more than this machine's free memory: the
    system would then kill these processes, or others."""
    import torch

    if torch.cuda.is_available():
        return
    free = psutil.virtual_memory().available
    room = max(free // PROCESS_BYTES, 1)
    if processes > room:
        wanted = f"at most {room}, for which this machine has memory free"
        raise LaunchError(Problem("profile", "processes", str(processes), wanted))
    width, rows = min(settings.tensor), max(settings.rows, default=0)
    needed = processes * max(_measured_bytes(layer, rows, width) for layer in graph.layers)
    if needed > free:
        found = f"{rows} rows of a micro-batch, which take {format_bytes(needed)}"
        wanted = f"at most the {format_bytes(free)} that this machine has free"
        raise LaunchError(Problem("profile", "rows", found, wanted, "measure fewer rows"))


def _measured_bytes(layer: Layer, rows: int, width: int) -> float:
    """Returns the least bytes that a layer takes with its gradients and this number of rows."""
    saved = layer.saved_bytes - layer.along("tensor").saved_bytes * (1 - 1 / width)
    weights = 8 * layer.parameters + 4 * layer.frozen_parameters
    return (saved + layer.workspace_bytes / width) * rows + weights / width


def _measure_in_processes(
    settings: ProfileSettings, processes: int, folder: Path, console: Console
) -> None:
    absolute = replace(settings, output=str(Path(settings.output).resolve()))
    files.write_text(folder / SETTINGS, dumps(absolute))
    with Progress(console=console, disable=not sys.stdout.isatty()) as progress:
        bar = progress.add_task("measuring", total=None)

        def show(line: dict[str, float]) -> None:
            progress.update(bar, total=line["total"], completed=line["done"])

        with Launcher() as launcher:
            devices = [f"here:{rank}" for rank in range(processes)]
            launcher.run(
                devices,
                folder,
                module=measuring.__name__,
                on_metrics=show,
                timeout_seconds=measuring.TIMEOUT_SECONDS,
            )
