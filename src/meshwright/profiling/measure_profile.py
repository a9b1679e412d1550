"""Carries out `meshwright profile`: measures layers, optimizer and links on every rank, and merges
the results.

python -m meshwright.profiling.measure_profile FOLDER      one rank, under a launcher
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import field, replace
from datetime import timedelta
from itertools import product
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from meshwright import files
from meshwright.cluster.discover import discover
from meshwright.cluster.files import load_cluster
from meshwright.cluster.spec import Cluster, Precision, devices_of
from meshwright.cost.profile import (
    LayerTime,
    LinkTimes,
    OptimizerTime,
    Profile,
    TensorWidth,
    versions,
)
from meshwright.errors import ProfileError
from meshwright.model.load import load_model
from meshwright.model.spec import LayerGraph
from meshwright.records import (
    Line,
    Name,
    PositiveShare,
    Rows,
    Tokens,
    dumps,
    load,
    record,
)
from meshwright.runtime.launch_variables import LOCAL_RANK, RANK, WORLD_SIZE
from meshwright.runtime.run_folder import METRICS

if TYPE_CHECKING:
    import torch

    from meshwright.profiling.layer_times import LayerBenchmark

SETTINGS = "profile-settings.json"
"""Name of the file with the ProfileSettings, in a rank's folder."""
TIMEOUT_SECONDS = 1800.0
"""Time that a fast device waits for the slowest one."""


@record
class ProfileSettings:
    """Says what `meshwright profile` shall measure, and where it shall write the profile."""

    model: Line
    sequence: Tokens
    rows: Annotated[tuple[Rows, ...], Field(max_length=100)]
    """Numbers of rows of the micro-batches to measure; empty: only links are measured."""
    tensor: Annotated[tuple[TensorWidth, ...], Field(max_length=100)] = (1,)
    """Tensor-parallel widths to measure."""
    precision: Precision
    cluster: Line | None = None
    """Cluster file that lists the device of each rank; None: this machine, as discovered."""
    output: Line
    """File for the profile."""
    shares: dict[Name, PositiveShare] = field(default_factory=dict)
    """Emulation: share of a core of each device type."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    repeats: Annotated[int, Field(ge=1, le=10_000)] = 7
    """Number of measurements of which the median counts."""
    pairs: Line | None = None
    """File for the links of every class of device pairs; None: the profile itself gets one link for
    each level."""


@record
class ProfileInputs:
    """Holds everything that a profile depends on; its fingerprint tells if a profile is up to
    date."""

    settings: ProfileSettings
    """The settings without the names of files."""
    model: str
    cluster: Cluster | None
    processes: int
    versions: dict[str, str]
    pace: float | None
    """Speed of emulated devices, from `reference_core_seconds`."""


@record
class CachedProfile:
    """Holds the profile in the first rank's output file, if it is up to date."""

    profile: Profile | None = None


@record
class RankTimings:
    """Holds the times that one rank has measured."""

    layers: tuple[LayerTime, ...]
    optimizers: tuple[OptimizerTime, ...]


@record
class LayerCase:
    """Names some layers to be measured with one number of rows and one tensor-parallel width."""

    layers: tuple[int, ...]
    """Numbers of the layers."""
    rows: int
    tensor: int
    """Tensor-parallel width."""


def layer_cases(
    settings: ProfileSettings, graph: LayerGraph, layers: Iterable[int]
) -> Iterator[LayerCase]:
    """Yields every pair of tensor width and rows, with those of the distinct layers that the width
    can divide."""
    for tensor, rows in product(settings.tensor, settings.rows):
        legal = tuple(n for n in layers if graph.layers[n].along("tensor").units % tensor == 0)
        if legal:
            yield LayerCase(layers=legal, rows=rows, tensor=tensor)


def reference_core_seconds(settings: ProfileSettings) -> float | None:
    """Returns the CPU seconds that define the speed of emulated devices on this machine (see
    `emulation/core_speed.py`); None if real devices are measured."""
    if not settings.shares:
        return None
    from meshwright.emulation.core_speed import usual_seconds

    return usual_seconds()


def cached_profile(settings: ProfileSettings, mark: str) -> Profile | None:
    """Returns the profile in the output file, if its fingerprint is `mark`."""
    path = Path(settings.output)
    if not files.is_file(path):
        return None
    with suppress(ProfileError):  # the file holds something else, and will be overwritten
        profile = load(path, Profile, error=ProfileError)
        return profile if profile.source == mark else None
    return None


def save_profile(settings: ProfileSettings, profile: Profile) -> Profile:
    """Writes the profile to the output file and returns it."""
    files.write_text(Path(settings.output), dumps(profile), durable=True)
    return profile


def measure_profile(
    settings: ProfileSettings,
    graph: LayerGraph,
    folder: Path | None,
    *,
    mark: str = "",
    again: bool = True,
) -> tuple[Profile, bool]:
    """Measures as one rank and returns the merged profile, and True if it was found in the output
    file. Rank 0 writes that file. `again`: measure even if it is up to date."""
    import torch
    import torch.distributed as dist

    from meshwright.runtime.exchange import all_gather_records, broadcast_record
    from meshwright.runtime.rendezvous import join_run
    from meshwright.runtime.world import pick_device

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    device = pick_device(int(os.environ.get(LOCAL_RANK, "0")))
    timeout = timedelta(seconds=TIMEOUT_SECONDS)
    join_run(int(os.environ[RANK]), int(os.environ[WORLD_SIZE]), device, timeout)
    first = dist.get_rank() == 0
    # Only the first rank's file counts: those of the others may be on other machines.
    held = cached_profile(settings, mark) if first and not again else None
    there = broadcast_record(0, CachedProfile(profile=held), CachedProfile)
    if there.profile is not None:
        dist.destroy_process_group()
        return there.profile, True
    cluster = _machines(settings, device)
    own = _own_times(settings, graph, _bench(settings, graph, cluster, device), folder)
    links = _links(settings, cluster, device)
    profile = _merged(graph, all_gather_records(own, RankTimings), links, mark)
    if first:
        save_profile(settings, profile)
    found = broadcast_record(0, profile, Profile)
    dist.destroy_process_group()
    return found, False


def _merged(
    graph: LayerGraph, ranks: Sequence[RankTimings], links: LinkTimes | None, mark: str
) -> Profile:
    """Returns one profile of what all ranks have measured."""
    return Profile(
        model=graph.name,
        sequence=graph.sequence,
        versions=versions(),
        source=mark,
        layers=merged_layers([one for own in ranks for one in own.layers]),
        optimizers=merged_optimizers([one for own in ranks for one in own.optimizers]),
        links=links,
    )


def _own_times(
    settings: ProfileSettings, graph: LayerGraph, bench: LayerBenchmark, folder: Path | None
) -> RankTimings:
    """Measures the layers and the optimizer on this rank's device, all ranks at once."""
    import torch.distributed as dist

    from meshwright.profiling.layer_times import distinct_layers, layer_times, optimizer_time
    from meshwright.runtime.training_loop import OPTIMIZERS

    layers: list[LayerTime] = []
    todo = list(layer_cases(settings, graph, distinct_layers(graph).values()))
    total = sum(len(case.layers) for case in todo)
    for case in todo:
        for layer in layer_times(bench, layers=case.layers, rows=case.rows, tensor=case.tensor):
            layers.append(layer)
            _tell(folder, dist.get_rank(), len(layers), total)
            dist.barrier()
    steps = []
    if settings.rows:
        factory = OPTIMIZERS[settings.optimizer](1e-4)
        steps.append(optimizer_time(bench, factory, settings.optimizer))
    return RankTimings(layers=tuple(layers), optimizers=tuple(steps))


def _machines(settings: ProfileSettings, device: torch.device) -> Cluster:
    """Returns the cluster that the settings name, else this machine as discovered. It is described
    by its CPUs if these are measured: their times are not those of a GPU that PyTorch cannot use.
    """
    if settings.cluster:
        return load_cluster(Path(settings.cluster))
    return discover(cpus=device.type == "cpu")


def _links(settings: ProfileSettings, cluster: Cluster, device: torch.device) -> LinkTimes | None:
    import torch.distributed as dist

    from meshwright.profiling.link_times import measure_links, measure_pairs

    if settings.pairs is None:
        return measure_links(cluster, device, repeats=settings.repeats)
    report = measure_pairs(cluster, device)
    if dist.get_rank() == 0:
        files.write_text(Path(settings.pairs), dumps(report))
    step = report.all_reduce.step_latency if report.all_reduce else None
    return LinkTimes(all_reduce_latency=step)


def _bench(
    settings: ProfileSettings, graph: LayerGraph, cluster: Cluster, device: torch.device
) -> LayerBenchmark:
    """Returns the model on the meta device, and this rank's device type as the cluster names it."""
    import torch
    import torch.distributed as dist

    from meshwright.emulation.dilation import Dilation, Dilator, EmulatedStopwatch
    from meshwright.model.zoo.build import build_model
    from meshwright.profiling.layer_times import DeviceStopwatch, LayerBenchmark

    kind = devices_of(cluster)[dist.get_rank()].type
    share = settings.shares.get(kind)
    tokens = torch.zeros((1, settings.sequence), dtype=torch.long)

    def make_model() -> torch.nn.Module:
        with torch.device("meta"):
            return build_model(settings.model, settings.sequence)

    return LayerBenchmark(
        make_model=make_model,
        graph=graph,
        inputs=(tokens, tokens),
        device_type=kind,
        stopwatch=EmulatedStopwatch(Dilator(Dilation(share=share)))
        if share
        else DeviceStopwatch(device),
        repeats=settings.repeats,
    )


def _tell(folder: Path | None, rank: int, done: int, total: int) -> None:
    if folder is not None and rank == 0:
        with files.append_file(folder / METRICS) as progress:
            files.add_line(progress, json.dumps({"done": done, "total": total}))


def merged_layers(times: list[LayerTime]) -> tuple[LayerTime, ...]:
    """Merges what several ranks of a device type have measured into one entry: the medians."""
    groups: dict[tuple[str, str, int, int], list[LayerTime]] = defaultdict(list)
    for one in times:
        groups[one.device, one.signature, one.tensor, one.rows].append(one)
    return tuple(
        replace(
            same[0],
            forward_seconds=median(one.forward_seconds for one in same),
            backward_seconds=median(one.backward_seconds for one in same),
            input_seconds=_median(one.input_seconds for one in same),
            weight_seconds=_median(one.weight_seconds for one in same),
            spread=max(one.spread for one in same),
        )
        for _, same in sorted(groups.items())
    )


def _median(measured: Iterable[float | None]) -> float | None:
    known = [each for each in measured if each is not None]
    return median(known) if known else None


def merged_optimizers(times: list[OptimizerTime]) -> tuple[OptimizerTime, ...]:
    """Merges the times of a device type into one entry: the medians."""
    groups: dict[tuple[str, str], list[OptimizerTime]] = defaultdict(list)
    for one in times:
        groups[one.device, one.optimizer].append(one)
    return tuple(
        replace(
            same[0],
            seconds_per_parameter=median(one.seconds_per_parameter for one in same),
            overhead_seconds=median(one.overhead_seconds for one in same),
        )
        for _, same in sorted(groups.items())
    )


def main() -> None:
    """Measures as one rank, under a launcher."""
    from meshwright.runtime.failure import rank_process

    folder = Path(sys.argv[1])
    with rank_process(folder):
        settings = load(folder / SETTINGS, ProfileSettings, error=ProfileError)
        graph = load_model(settings.model, settings.sequence, settings.precision)
        measure_profile(settings, graph, folder)


if __name__ == "__main__":
    main()
