"""How long the planner takes, how much memory, and how good its plans are, as clusters grow.

    python benchmarks/planner.py [--model gpt2-xl] [--devices 16 128 1024 10240] [--budget 60]

Every cluster has three device types at two sites; each case runs in a process of its own, so that
its memory is its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

from meshwright.cluster.catalog import catalog
from meshwright.cluster.spec import Cluster, Link, Node, Site
from meshwright.errors import FitError
from meshwright.model.hf import load_model
from meshwright.plan.ranks import describe
from meshwright.plan.spec import Job
from meshwright.search.certificate import sentence
from meshwright.search.planner import find_plan

TYPES = ("A100-80", "V100-32", "T4")
NODE = 8
BATCH = {16: 128, 128: 512, 1024: 2048, 10240: 8192}
MODELS = {"gpt2-xl": 1024, "llama-2-70b": 4096}


def mixed_cluster(devices: int) -> Cluster:
    """Half the nodes of the first type, a quarter of each other one; the slowest at a second site
    behind a thin uplink."""
    entries = catalog()
    count = devices // NODE
    shares = (count - 2 * (count // 4), count // 4, count // 4) if count > 2 else (1, count - 1, 0)
    nodes = []
    for kind, number in zip(TYPES, shares, strict=True):
        for _ in range(number):
            nodes.append(
                Node(
                    name=f"n{len(nodes)}",
                    site="away" if kind == TYPES[-1] else "home",
                    devices=(kind,) * NODE,
                    inside=entries[kind].inside,
                    network=Link(bandwidth=12.5e9, latency=5e-6),
                )
            )
    uplink = Link(bandwidth=12.5e9, latency=5e-4)
    return Cluster(
        name=f"mixed-{devices}",
        types={kind: entries[kind].type for kind in TYPES},
        nodes=tuple(nodes),
        sites=(Site(name="home", uplink=uplink), Site(name="away", uplink=uplink)),
    )


def one(model: str, devices: int, budget: float | None) -> dict[str, object]:
    """Plan one case here."""
    graph = load_model(model, MODELS[model], "fp16")
    job = Job(
        global_batch=BATCH.get(devices, devices),
        sequence=graph.sequence,
        precision="fp16",
        optimizer="adamw",
    )
    where = mixed_cluster(devices)
    began = time.perf_counter()
    try:
        plan = find_plan(graph, where, job, budget_seconds=budget)
    except FitError:
        return {**_spent(model, devices, began), "plan": "nothing fits"}
    assert plan.prediction is not None
    return {
        **_spent(model, devices, began),
        "step_seconds": plan.prediction.step_seconds,
        "used": len(plan.devices),
        "certificate": sentence(plan.prediction),
        "plan": describe(plan),
    }


def _spent(model: str, devices: int, began: float) -> dict[str, object]:
    return {
        "model": model,
        "devices": devices,
        "seconds": round(time.perf_counter() - began, 2),
        "cpu_seconds": round(time.process_time(), 2),
        "mebibytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }


def main() -> None:
    """Run every case in a child process and print one line for each."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--model", nargs="+", default=list(MODELS))
    options.add_argument("--devices", nargs="+", type=int, default=list(BATCH))
    options.add_argument("--budget", type=float, default=None)
    options.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    for model in chosen.model:
        for devices in chosen.devices:
            if chosen.here:
                print(json.dumps(one(model, devices, chosen.budget)), flush=True)
                continue
            budget = [] if chosen.budget is None else ["--budget", str(chosen.budget)]
            command = [sys.executable, __file__, "--here", "--model", model]
            subprocess.run([*command, "--devices", str(devices), *budget], check=True)


if __name__ == "__main__":
    main()
