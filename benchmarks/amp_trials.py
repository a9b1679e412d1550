"""Real step times of the AMP paper's trials against ours, and against AMP's own predictions.

    python benchmarks/amp_trials.py --trials F.json --cluster C.toml --profiles P.json --json OUT

F names the model (`gpt2` or `transgan`) and lists strategies with measured seconds, null where the
trial failed; P holds forward seconds per sample of every layer on g4dn (T4) and p3 (V100) nodes
(github.com/MccRee177/AMP). The shipped constants predict; with `--fit F2 C2` (more than once, if
need be) those fitted to other trials do, and `--save` ships them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from amp_models import model_of
from beliefs import AMP_KNOBS, AMP_PRIOR, save, shipped
from grids import Trial, World, overfull_bytes, predict, simulate
from numpy.typing import NDArray
from scores import spearman, summary, write

from meshwright import records
from meshwright.cluster.files import cluster_from
from meshwright.cluster.spec import Cluster
from meshwright.cluster.topology import topology
from meshwright.cost.collective import all_reduce, uncontended_seconds
from meshwright.cost.compute import device_seconds, host_seconds, launch_seconds
from meshwright.cost.constants import Calibration, device_constants
from meshwright.cost.fit_constants import fit_constants
from meshwright.cost.links import ring_step_seconds
from meshwright.cost.profile import LayerTime, Profile
from meshwright.cost.reached_links import reached_links
from meshwright.errors import ClusterError
from meshwright.model.spec import Layer, LayerGraph
from meshwright.plan.spec import Job

Array = NDArray[np.float64]
NODES = {"T4": "G4", "V100": "P3"}
"""Device types, by the beginnings of their names, and the nodes they were measured on."""
LATENCY = {"inside": "10 us", "network": "50 us"}
"""Of links whose file names none: PCIe or NVLink, and TCP."""


Forward = tuple[float, float]
"""Seconds of a layer's forward on one tensor rank, sums apart, and the host's part of them."""


def layer_times(
    model: LayerGraph, cluster: Cluster, recorded: dict[str, Any], constants: Calibration
) -> tuple[LayerTime, ...]:
    """The record's forward times of one sample, with the backward that they imply.

    The host's share of the backward is in proportion of the launches, the device's twice the
    forward's. A type on which this model was not measured takes those of one on which it was: the
    same host, and device seconds in proportion of the work.
    """
    known = {kind: forwards(model, cluster, kind, recorded, constants) for kind in cluster.types}
    found = []
    for kind, device in cluster.types.items():
        launch = launch_seconds(device_constants(constants, device))
        for tensor, times in (
            known[kind] or borrowed(model, cluster, kind, known, constants)
        ).items():
            for layer, (seconds, host) in zip(model.layers, times, strict=True):
                found.append(
                    LayerTime(
                        device=kind,
                        signature=layer.signature,
                        precision="fp16",
                        tensor=tensor,
                        rows=1,
                        forward_seconds=seconds,
                        backward_seconds=host * launch[1] / launch[0] + 2 * (seconds - host),
                    )
                )
    return tuple(found)


def forwards(
    model: LayerGraph,
    cluster: Cluster,
    kind: str,
    recorded: dict[str, Any],
    constants: Calibration,
) -> dict[int, list[Forward]]:
    """Of every layer, by tensor width; empty where the record lacks this model on this type.

    The sums over tensor ranks, as priced on the node, are taken off: they overlap nothing. The host
    took what exceeds the device's work, at most a launch.
    """
    node = next((node for start, node in NODES.items() if kind.startswith(start)), None)
    own = device_constants(constants, cluster.types[kind])
    launch, found = launch_seconds(own), {}
    for width, row in recorded.get(f"{model.name}_{node}", {}).items():
        sums = summing_seconds(model, cluster, kind, int(width), constants)
        found[int(width)] = []
        for layer, whole, communication in zip(model.layers, row, sums, strict=True):
            seconds = max(whole - communication, whole / 10)
            work = device_seconds(layer, cluster.types[kind], "fp16", int(width), 1, own)
            host = host_seconds(np.array([seconds, seconds]), work, launch)[0]
            found[int(width)].append((seconds, float(host)))
    return found


def borrowed(
    model: LayerGraph,
    cluster: Cluster,
    kind: str,
    known: dict[str, dict[int, list[Forward]]],
    constants: Calibration,
) -> dict[int, list[Forward]]:
    """The times of the first type that was measured, carried over to another one."""
    lender = next((name for name, widths in known.items() if widths), kind)

    def work(name: str, layer: Layer, tensor: int) -> float:
        own = device_constants(constants, cluster.types[name])
        return float(device_seconds(layer, cluster.types[name], "fp16", tensor, 1, own)[0])

    found: dict[int, list[Forward]] = {}
    for tensor, times in known[lender].items():
        found[tensor] = []
        for layer, (seconds, host) in zip(model.layers, times, strict=True):
            theirs = work(lender, layer, tensor)
            ratio = work(kind, layer, tensor) / theirs if theirs else 1.0
            found[tensor].append((host + (seconds - host) * ratio, host))
    return found


def summing_seconds(
    model: LayerGraph, cluster: Cluster, kind: str, tensor: int, constants: Calibration
) -> list[float]:
    """Seconds of every layer's forward all-reduces among tensor ranks of a node of this type."""
    profile = Profile(model=model.name, sequence=model.sequence, calibration=constants)
    node = next(node for node in cluster.nodes if kind in node.devices)
    ranks = [f"{node.name}:{index}" for index in range(min(tensor, len(node.devices)))]
    links, latency = topology(reached_links(cluster, profile)), ring_step_seconds(profile)
    cost: dict[float, float] = {}
    sums = [layer.along("tensor").forward_all_reduce_bytes for layer in model.layers]
    for size in {size for sizes in sums for size in sizes}:
        cost[size] = uncontended_seconds(
            links, all_reduce(links, ranks, size, step_latency=latency)
        )
    return [sum(cost[size] for size in sizes) for sizes in sums]


def machines(path: Path) -> Cluster:
    """The cluster of a file, which need not say what latency a nominal bandwidth comes with, nor
    more of a link than the bandwidth. Raises ClusterError."""
    data = records.read(path, error=ClusterError)
    data.setdefault("format", 1)
    data.setdefault("name", path.stem)
    for table in (data.get("links", {}), *data.get("node", ())):
        for level, latency in LATENCY.items():
            if isinstance(table.get(level), str):
                table[level] = {"bandwidth": table[level]}
            if isinstance(table.get(level), dict):
                table[level].setdefault("latency", latency)
    return cluster_from(data, source=str(path))


class Predictor:
    """Predictions of one file's trials: layer times depend on the constants that split them."""

    def __init__(self, trials: Path, cluster: Path, profiles: Path) -> None:
        record = json.loads(trials.read_text(encoding="utf-8"))
        self.model = model_of(record)
        self.cluster = machines(cluster)
        times = json.loads(profiles.read_text(encoding="utf-8"))
        self.recorded = times["forward_seconds_per_sample"]
        self.batch = record["global_batch_size"]
        self.rows = record["trials"]
        seconds = [row.get("measured_step_seconds") for row in self.rows]
        self.measured = np.array([np.nan if each is None else each for each in seconds])
        self.trials = tuple(
            Trial(
                world=0,
                data=row["data_parallel"],
                tensor=row["tensor_parallel"],
                stages=row["pipeline_parallel"],
                rows=row["micro_batch_size"],
                batch=self.batch,
                bounds=tuple(row["stage_boundaries"]),
            )
            for row in self.rows
        )

    def world(self, constants: Calibration) -> World:
        job = Job(global_batch=self.batch, sequence=self.model.sequence, precision="fp16")
        layers = layer_times(self.model, self.cluster, self.recorded, constants)
        profile = Profile(model=self.model.name, sequence=self.model.sequence, layers=layers)
        return World(model=self.model, cluster=self.cluster, job=job, profile=profile)

    def seconds(self, constants: Calibration, runs: NDArray[np.int64]) -> Array:
        """Predicted seconds of the trials with these indices."""
        return predict([self.world(constants)], self.trials, constants, runs)

    def overfull(self, constants: Calibration) -> NDArray[np.bool_]:
        """Trials that our memory model refuses."""
        return overfull_bytes([self.world(constants)], self.trials, constants) > 0

    def simulated(self, constants: Calibration, runs: NDArray[np.int64]) -> Array:
        """The same by the simulator."""
        return simulate(self.world(constants), [self.trials[i] for i in runs], constants)

    @property
    def ran(self) -> NDArray[np.int64]:
        """Indices of the trials that produced a time."""
        return np.flatnonzero(np.isfinite(self.measured))


def fit_to(sets: Sequence[Predictor]) -> Calibration:
    """Constants fitted to the trials of several files together."""
    measured = np.concatenate([each.measured[each.ran] for each in sets])
    owner = np.concatenate([np.full(len(each.ran), index) for index, each in enumerate(sets)])
    own = np.concatenate([each.ran for each in sets])

    def seconds(constants: Calibration, runs: NDArray[np.int64]) -> Array:
        parts = [
            each.seconds(constants, own[runs[owner[runs] == i]]) for i, each in enumerate(sets)
        ]
        return np.concatenate(parts)

    return fit_constants(seconds, measured, AMP_KNOBS, start=AMP_PRIOR)


def judge(found: Predictor, constants: Calibration) -> dict[str, Any]:
    """All figures of one file under given constants."""
    everything = np.arange(len(found.trials))
    seconds, ran = found.seconds(constants, everything), found.ran
    overfull, failed = found.overfull(constants), ~np.isfinite(found.measured)
    ranking = [int(i) for i in np.argsort(seconds, kind="stable") if not overfull[i]]
    best = np.nanmin(found.measured)
    first = found.measured[ranking[0]] if ranking else np.nan
    return {
        **summary(seconds[ran], found.measured[ran]),
        "spearman": spearman(seconds[ran], found.measured[ran]),
        "regret": float(first / best) if np.isfinite(first) else float("inf"),
        "failures": int(failed.sum()),
        "failures_foreseen": int((overfull & failed).sum()),
        "false_alarms": int((overfull & ~failed).sum()),
        "failures_among_first_ten": int(failed[ranking[:10]].sum()),
    }


def of_amp(found: Predictor) -> dict[str, Any] | None:
    """AMP's own figures, where its predictions are recorded."""
    own = [row.get("amp_predicted_step_seconds") for row in found.rows]
    if None in own:
        return None
    seconds, ran = np.array(own, dtype=np.float64), found.ran
    first = found.measured[int(np.argmin(seconds))]
    return {
        **summary(seconds[ran], found.measured[ran]),
        "spearman": spearman(seconds[ran], found.measured[ran]),
        "regret": float(first / np.nanmin(found.measured)),
        "failures_foreseen": 0,
        "false_alarms": 0,
        "failures_among_first_ten": int(
            (~np.isfinite(found.measured))[np.argsort(seconds)[:10]].sum()
        ),
    }


COLUMNS = {
    "runs": "{:.0f}",
    "spearman": "{:.3f}",
    "mean_relative_error": "{:.1%}",
    "median_relative_error": "{:.1%}",
    "regret": "{:.2f}",
    "failures_foreseen": "{:.0f}",
    "false_alarms": "{:.0f}",
    "failures_among_first_ten": "{:.0f}",
}


def show(name: str, figures: dict[str, Any]) -> None:
    """A row of the table."""
    cells = [form.format(figures[column]) for column, form in COLUMNS.items()]
    print(f"| {name} | {' | '.join(cells)} |")


def main() -> int:
    """Print the table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--trials", type=Path, required=True)
    parser.add_argument("--cluster", type=Path, required=True)
    parser.add_argument("--profiles", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--fit", type=Path, nargs=2, action="append", metavar=("TRIALS", "CLUSTER"))
    parser.add_argument("--save", action="store_true", help="ship what was fitted")
    chosen = parser.parse_args()
    found = Predictor(chosen.trials, chosen.cluster, chosen.profiles)
    constants = shipped("amp") if not chosen.fit else None
    if constants is None:
        constants = fit_to([Predictor(*pair, chosen.profiles) for pair in chosen.fit])
        constants = replace(constants, source=", ".join(pair[0].name for pair in chosen.fit))
    if chosen.save:
        save("amp", constants)
    print(f"| {chosen.trials.stem} | {' | '.join(c.replace('_', ' ') for c in COLUMNS)} |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    theirs = of_amp(found)
    if theirs:
        show("AMP", theirs)
    show("stated in advance, no fit", judge(found, AMP_PRIOR))
    result = judge(found, constants)
    show(f"fitted to {constants.source}", result)
    played = found.simulated(constants, found.ran)
    result["simulator"] = summary(played, found.measured[found.ran])
    result["simulator"]["spearman"] = spearman(played, found.measured[found.ran])
    print(f"simulator: Spearman {result['simulator']['spearman']:.3f}")
    write(chosen.json, {**result, "amp": theirs})
    return 0


if __name__ == "__main__":
    sys.exit(main())
