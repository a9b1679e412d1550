"""Step times of Megatron-DeepSpeed on A100s, as vTrain's authors measured them, against ours.

    python benchmarks/vtrain_runs.py --runs single_node.csv --json OUT [--refit | --save]

Columns: GPUs, batches, shape, widths and milliseconds (github.com/VIA-Research/vTrain). Predictions
with the shipped constants are what `mean_relative_error` reports; beside them stand those from
datasheets alone and, with --refit, cross-validated ones; --save fits to these runs and ships.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from beliefs import MEGATRON_KNOBS, MEGATRON_PRIOR, save, shipped
from grids import Trial, World, overfull_bytes, predict
from numpy.typing import NDArray
from scores import HEADER, kendall_tau, line, summary, write

from meshwright.cluster.catalog import catalog
from meshwright.cluster.spec import Cluster, Link, Node, Site
from meshwright.cost.constants import Calibration
from meshwright.cost.fit_constants import cross_validation_folds, fit_constants
from meshwright.cost.profile import Profile
from meshwright.model.config import LanguageModel
from meshwright.model.transformer.counted_graph import counted_graph
from meshwright.model.unfused import with_unfused_attention
from meshwright.plan.spec import Job
from meshwright.techniques.activation_checkpointing.model import with_recomputation
from meshwright.units import parse_bandwidth

Array = NDArray[np.float64]

VOCABULARY = 51200
"""Megatron's GPT-2 vocabulary, padded."""
SHAPE = ("hidden size", "attention heads", "# layers", "sequence length", "# GPUs")
WIDTHS = ("tensor parallelism", "data parallelism", "pipeline parallelism")
COLUMNS = (*SHAPE, *WIDTHS, "micro batch", "global batch")
"""Those that are read, beside the measured `iteration time (ms)`."""
NODE = 8
MOST_FITTED = 144
"""Runs that a fit looks at: evenly drawn from those it may see."""


def machines(gpus: int, network: float) -> Cluster:
    """Nodes of eight A100-80 with NVLink."""
    kind = catalog()["A100-80"]
    sizes = [NODE] * (gpus // NODE) + ([gpus % NODE] if gpus % NODE else [])
    nodes = tuple(
        Node(
            name=f"n{index}",
            site="here",
            devices=("A100-80",) * size,
            inside=kind.inside,
            network=Link(bandwidth=network, latency=15e-6),
        )
        for index, size in enumerate(sizes)
    )
    types = {"A100-80": kind.type}
    return Cluster(name=f"a100-{gpus}", types=types, nodes=nodes, sites=(Site(name="here"),))


def world(row: dict[str, int], network: float) -> World:
    """The GPT of a row on its GPUs."""
    width, heads, sequence = row["hidden size"], row["attention heads"], row["sequence length"]
    shape = LanguageModel(
        name=f"gpt-{width}-{row['# layers']}",
        family="gpt2",
        vocabulary=VOCABULARY,
        positions=sequence,
        width=width,
        layers=row["# layers"],
        heads=heads,
        kv_heads=heads,
        head=width // heads,
        hidden=4 * width,
        tied=True,
    )
    # vTrain's runs are Megatron's, whose fused masked softmax writes the scores in fp16.
    model = with_unfused_attention(counted_graph(shape, sequence, "fp16"), heads)
    return World(
        model=model,
        cluster=machines(row["# GPUs"], network),
        job=Job(global_batch=row["global batch"], sequence=sequence, precision="fp16"),
        profile=Profile(model=model.name, sequence=sequence),
    )


def even_bounds(layers: int, stages: int) -> tuple[int, ...]:
    """Megatron's cuts: equally many blocks on each stage, the embedding with the first of them,
    the head with the last."""
    cuts = [round(layers * s / stages) + 1 for s in range(1, stages)]
    return (0, *cuts, layers + 2)


def read(path: Path, network: float) -> tuple[list[World], list[Trial], Array]:
    """Worlds, trials and measured seconds of a file."""
    worlds: list[World] = []
    known: dict[tuple[int, ...], int] = {}
    trials, measured = [], []
    with path.open(encoding="utf-8", newline="") as file:
        for raw in csv.DictReader(file, skipinitialspace=True):
            row = {name: int(float(raw[name])) for name in COLUMNS}
            key = tuple(row[name] for name in SHAPE)
            if key not in known:
                known[key] = len(worlds)
                worlds.append(world(row, network))
            stages = row["pipeline parallelism"]
            trials.append(
                Trial(
                    world=known[key],
                    data=row["data parallelism"],
                    tensor=row["tensor parallelism"],
                    stages=stages,
                    rows=row["micro batch"],
                    batch=row["global batch"],
                    bounds=even_bounds(row["# layers"], stages),
                )
            )
            measured.append(float(raw["iteration time (ms)"]) / 1e3)
    return worlds, trials, np.array(measured)


def recomputed_where_needed(worlds: list[World], trials: list[Trial]) -> tuple[Trial, ...]:
    """The trials; those that would not fit without recomputation, but ran, with it. The record does
    not say. Appends the worlds they need."""
    excess = overfull_bytes(worlds, trials, MEGATRON_PRIOR)
    again: dict[int, int] = {}
    found = []
    for trial, missing in zip(trials, excess, strict=True):
        if missing > 0 and trial.world not in again:
            again[trial.world] = len(worlds)
            plain = worlds[trial.world]
            worlds.append(replace(plain, model=with_recomputation(plain.model)))
        found.append(replace(trial, world=again[trial.world]) if missing > 0 else trial)
    return tuple(found)


def thinned(runs: NDArray[np.int64]) -> NDArray[np.int64]:
    """At most MOST_FITTED of them, evenly drawn."""
    return runs[:: max(1, -(-len(runs) // MOST_FITTED))]


def main() -> int:
    """Print the table, write the figures of the shipped constants."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--network", default="800 Gbit/s", help="of a node; single nodes need none")
    parser.add_argument(
        "--refit", action="store_true", help="fit to these runs, and cross-validate"
    )
    parser.add_argument("--save", action="store_true", help="fit to these runs, and ship that")
    chosen = parser.parse_args()
    worlds, plain, measured = read(chosen.runs, parse_bandwidth(chosen.network))
    trials = recomputed_where_needed(worlds, plain)
    again = sum(a.world != b.world for a, b in zip(trials, plain, strict=True))
    print(f"{len(trials)} runs, of which {again} would not fit without recomputation")
    predicted = partial(predict, worlds, trials)
    everything = np.arange(len(trials))
    if chosen.save:
        found = fit_constants(
            predicted, measured, MEGATRON_KNOBS, start=MEGATRON_PRIOR, runs=thinned(everything)
        )
        source = f"{chosen.runs.name}, {len(thinned(everything))} of its {len(everything)} runs"
        save("megatron", replace(found, source=source))
    print(HEADER)
    results: dict[str, dict[str, float]] = {}

    def show(name: str, seconds: Array) -> None:
        results[name] = summary(seconds, measured)
        print(line(name, results[name]))

    show("datasheet, no fit", predicted(Calibration(), everything))
    show("stated in advance, no fit", predicted(MEGATRON_PRIOR, everything))
    final = predicted(shipped("megatron"), everything)
    show("shipped", final)
    if chosen.refit:
        refit(predicted, measured, show)
    groups = [(t.world, t.batch, t.rows) for t in trials]
    out = {
        **results["shipped"],
        "kendall_tau": kendall_tau(final, measured, groups),
        "all": results,
    }
    print(f"Kendall tau over the layouts of one model and micro-batch: {out['kendall_tau']:.3f}")
    write(chosen.json, out)
    return 0


def refit(
    predicted: Callable[[Calibration, NDArray[np.int64]], Array],
    measured: Array,
    show: Callable[[str, Array], None],
) -> None:
    """Fit to these runs; then every fifth of them from some of the others."""
    everything = np.arange(len(measured))
    found = fit_constants(
        predicted, measured, MEGATRON_KNOBS, start=MEGATRON_PRIOR, runs=thinned(everything)
    )
    show(f"fitted to {len(thinned(everything))} of these", predicted(found, everything))
    seconds = np.zeros(len(measured))
    fold = np.array(cross_validation_folds(len(measured)))
    for label in range(5):
        others = thinned(np.flatnonzero(fold != label))
        constants = fit_constants(
            predicted, measured, MEGATRON_KNOBS, start=MEGATRON_PRIOR, runs=others
        )
        own = np.flatnonzero(fold == label)
        seconds[own] = predicted(constants, own)
    show(f"5-fold, each from {len(others)} runs", seconds)


if __name__ == "__main__":
    sys.exit(main())
