"""Step times of FSDP training, as llm-foundry's benchmarks published them, against ours.

    python benchmarks/fsdp_runs.py --runs F.csv [--runs G.csv] --json OUT [--refit | --save]

Columns as in llm-foundry's benchmarking README (github.com/mosaicml/llm-foundry): model, sequence,
GPUs, micro-batch, accumulation, checkpointing, sharding, throughput. Links are not among them:
NVLink inside nodes of eight, InfiniBand between, see NETWORK.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from beliefs import FSDP_PRIOR, fsdp_knobs, save, shipped
from numpy.typing import NDArray
from scores import HEADER, kendall_tau, line, summary, write

from meshwright.cluster.catalog import catalog
from meshwright.cluster.spec import Cluster, DeviceType, Link, Node, Precision, Site
from meshwright.cost.constants import Calibration
from meshwright.cost.fit_constants import fit_constants, held_out_predictions
from meshwright.cost.profile import Profile
from meshwright.cost.sharded import ShardedStep, sharded_step_seconds
from meshwright.model.config import LanguageModel
from meshwright.model.spec import LayerGraph
from meshwright.model.transformer.counted_graph import counted_graph
from meshwright.units import parse_bandwidth

Array = NDArray[np.float64]

SHAPES = {
    "125m": (12, 768, 12),
    "350m": (24, 1024, 16),
    "760m": (24, 1536, 12),
    "1b": (24, 2048, 16),
    "3b": (32, 2560, 20),
    "7b": (32, 4096, 32),
    "13b": (40, 5120, 40),
    "30b": (48, 7168, 56),
    "70b": (80, 8192, 64),
}
"""Layers, width and heads of the MPT models."""
VOCABULARY = 50368
NODE = 8
NETWORK = {"H100": "3200 Gbit/s", "H200": "3200 Gbit/s", "B200": "3200 Gbit/s"}
"""Of a node; 1,600 Gbit/s (eight adapters of 200) for all others."""
FP8 = " fp8"
"""Ends the name of a type whose products are computed in fp8."""


@dataclass(frozen=True, slots=True)
class Run:
    """One row."""

    name: str
    model: LayerGraph
    cluster: Cluster
    step: ShardedStep


NOISE = {"nvidia", "amd", "tesla", "instinct", "geforce", "gpu", "sxm", "sxm2", "sxm3", "sxm4"}
NOISE |= {"sxm5", "oam", "hbm2", "hbm2e", "hbm3", "hbm3e", ""}
"""Words of a GPU's name that tell no two types of the catalogue apart."""


def device_name(text: str) -> str:
    """The catalogue's name of a GPU: `a100_80gb` and `NVIDIA A100-SXM4-80GB` are `A100-80`, and
    `h100_80gb` is `H100`. Raises SystemExit for one that is not there."""
    words = re.split(r"[_\-\s/]+", re.sub(r"(\d+)\s*gi?b(?![a-z])", r"\1", text.strip().lower()))
    said = [word for word in words if word not in NOISE]
    known = {re.sub("[^a-z0-9]", "", name.lower()): name for name in catalog()}
    bare = [word for word in said if not word.isdigit()]
    for candidate in ("".join(said), "".join(bare), *("".join(said[:n]) for n in (2, 1))):
        if candidate in known:
            return known[candidate]
    raise SystemExit(f"unknown GPU {text!r}; known: {', '.join(sorted(catalog()))}")


def device_type(text: str, precision: str) -> DeviceType:
    """A catalogue type; with fp8 products a type of its own, at twice the peak.

    Attention stays in 16 bits, so its share of the doubled peak is halved.
    """
    kind = catalog()[device_name(text)].type
    if "fp8" not in precision or "bf16" not in kind.peak:
        return kind
    return replace(
        kind,
        name=kind.name + FP8,
        peak={**kind.peak, "bf16": 2 * kind.peak["bf16"]},
        attention_efficiency=kind.attention_efficiency / 2,
    )


def machines(kind: DeviceType, gpus: int) -> Cluster:
    """Nodes of eight."""
    base = kind.name.removesuffix(FP8)
    network = Link(bandwidth=parse_bandwidth(NETWORK.get(base, "1600 Gbit/s")), latency=15e-6)
    nodes = tuple(
        Node(
            name=f"n{index}",
            site="here",
            devices=(kind.name,) * min(NODE, gpus - NODE * index),
            inside=catalog()[base].inside,
            network=network,
        )
        for index in range(-(-gpus // NODE))
    )
    return Cluster(
        name=f"{kind.name} x {gpus}",
        types={kind.name: kind},
        nodes=nodes,
        sites=(Site(name="here"),),
    )


def mpt(name: str, sequence: int, precision: Precision = "bf16") -> LayerGraph:
    """An MPT model with FlashAttention, at a sequence length."""
    layers, width, heads = SHAPES[name]
    shape = LanguageModel(
        name=f"mpt-{name}",
        family="gpt2",
        vocabulary=VOCABULARY,
        positions=sequence,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head=width // heads,
        hidden=4 * width,
        tied=True,
    )
    return counted_graph(shape, sequence, precision)


def read(paths: Sequence[Path]) -> tuple[list[Run], Array]:
    """Runs and their measured seconds: tokens of a batch over tokens per second."""
    runs, measured = [], []
    for path in paths:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                kind = device_type(row["GPU"], row["Precision"])
                step = ShardedStep(
                    rows=int(row["MicroBatchSize"]),
                    micro_batches=int(row["GradAccum"]),
                    sharding="full" if row["Sharding Strategy"] == "FULL_SHARD" else "gradients",
                    recompute=row["Activation Checkpointing"] == "True",
                )
                runs.append(
                    Run(
                        name=row["Model"],
                        model=mpt(
                            row["Model"].strip().lower().removeprefix("mpt-"),
                            int(row["SeqLen (T)"]),
                            "bf16" if "bf16" in kind.peak else "fp16",
                        ),
                        cluster=machines(kind, int(row["# GPUs"])),
                        step=step,
                    )
                )
                tokens = float(row["GlobalBatchSize (T)"])
                measured.append(tokens / float(row["Throughput (T/s)"]))
    return runs, np.array(measured)


def predict(runs: Sequence[Run], calibration: Calibration, chosen: NDArray[np.int64]) -> Array:
    """Seconds of a step of the runs with these indices."""
    found = []
    for index in chosen:
        run = runs[int(index)]
        profile = Profile(
            model=run.model.name, sequence=run.model.sequence, calibration=calibration
        )
        found.append(sharded_step_seconds(run.model, run.cluster, run.step, profile))
    return np.array(found)


def throughput(runs: Sequence[Run], seconds: Array) -> Array:
    """Tokens per second of each device."""
    tokens = [run.step.rows * run.step.micro_batches * run.model.sequence for run in runs]
    return np.array(tokens) / seconds


def tau(runs: Sequence[Run], predicted: Array, measured: Array) -> float:
    """Kendall's tau of tokens per second, over the runs of one model on one GPU type."""
    groups = [(run.name, *run.cluster.types) for run in runs]
    return kendall_tau(throughput(runs, predicted), throughput(runs, measured), groups)


def family(run: Run) -> str:
    """The GPU type of a run, whatever its precision."""
    return next(iter(run.cluster.types)).removesuffix(FP8)


def without_own_type(runs: Sequence[Run], measured: Array) -> Array | None:
    """Each run predicted from constants that were fitted to runs on other GPU types alone, and from
    its own type's datasheet; None where all ran on one type."""
    names = np.array([family(run) for run in runs])
    if len(set(names)) < 2:
        return None
    predicted = np.zeros(len(runs))
    for name in dict.fromkeys(names):
        seen, own = np.flatnonzero(names != name), np.flatnonzero(names == name)
        types = {k: v for i in seen for k, v in runs[i].cluster.types.items()}
        found = fit_constants(
            partial(predict, runs), measured, fsdp_knobs(types), start=FSDP_PRIOR, runs=seen
        )
        predicted[own] = predict(runs, found, own)
    return predicted


def main() -> int:
    """Print the table, write the figures of the shipped constants."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=Path, required=True, action="append")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--refit", action="store_true", help="fit, and leave out model sizes")
    parser.add_argument("--save", action="store_true", help="fit to these runs, and ship that")
    chosen = parser.parse_args()
    runs, measured = read(chosen.runs)
    predicted = partial(predict, runs)
    everything = np.arange(len(runs))
    knobs = fsdp_knobs({name: kind for run in runs for name, kind in run.cluster.types.items()})
    if chosen.save:
        found = fit_constants(predicted, measured, knobs, start=FSDP_PRIOR)
        save("fsdp", replace(found, source=", ".join(path.name for path in chosen.runs)))
    print(HEADER)
    results: dict[str, dict[str, float]] = {}

    def show(name: str, seconds: Array) -> None:
        results[name] = {**summary(seconds, measured), "kendall_tau": tau(runs, seconds, measured)}
        print(line(name, results[name]) + f" tau {results[name]['kendall_tau']:.3f}")

    show("stated in advance, no fit", predicted(FSDP_PRIOR, everything))
    show("shipped", predicted(shipped("fsdp"), everything))
    if chosen.refit:
        found = fit_constants(predicted, measured, knobs, start=FSDP_PRIOR)
        show("fitted here", predicted(found, everything))
        sizes = [run.name for run in runs]
        apart = held_out_predictions(predicted, measured, knobs, sizes, start=FSDP_PRIOR)
        show("leaving one model size out", apart)
        others = without_own_type(runs, measured)
        if others is not None:
            show("leaving one GPU type out", others)
            for name in sorted({family(run) for run in runs}):
                own = np.array([family(run) == name for run in runs])
                print(line(f"{name} from the others", summary(others[own], measured[own])))
    write(chosen.json, {**results["shipped"], "all": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
