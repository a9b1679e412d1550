"""How long the planner takes, how much memory, and how good its plans are, as clusters grow.

    python benchmarks/planner.py [--model gpt2-xl] [--devices 16 128 1024 10240] [--budget 60]
        [--svg docs/planner-growth.svg] [--json]

Every cluster has three device types at two sites; each case runs in a process of its own that may
take 2 GiB. `gap`: times the certificate's bound; `even`: the best plan of equal stages and equal
shares takes that many times as long.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from growth import growth_svg

from meshwright.cluster.catalog import catalog
from meshwright.cluster.spec import Cluster, Link, Node, Site
from meshwright.errors import FitError
from meshwright.model.load import load_model
from meshwright.plan.ranks import describe_plan
from meshwright.plan.spec import Job
from meshwright.search.certificate import sentence
from meshwright.search.planner import find_plan

TYPES = ("A100-80", "V100-32", "T4")
NODE = 8
BATCH = {16: 128, 128: 512, 1024: 2048, 10240: 8192}
MODELS = {"gpt2-xl": 1024, "llama-2-70b": 4096}
ALLOWED = {16: 1.0, 128: 3.0, 1024: 10.0, 10240: 60.0}
"""CPU seconds, by devices."""
MOST_BYTES = 2 << 30

COLUMNS = ("model", "devices", "used", "cpu s", "MiB", "step s", "gap", "even", "plan")
ROW = "{:<12} {:>7} {:>6} {:>6} {:>6} {:>9} {:>6} {:>6}  {}"


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
    found = plan.prediction
    assert found is not None
    assert found.lower_bound_seconds
    even = next((r.step_seconds for r in found.runners_up if r.name.startswith("even:")), None)
    return {
        **_spent(model, devices, began),
        "used": len(plan.devices),
        "step_seconds": found.step_seconds,
        "gap": found.step_seconds / found.lower_bound_seconds,
        "even": even / found.step_seconds if even else None,
        "certificate": sentence(found),
        "plan": describe_plan(plan),
    }


def _spent(model: str, devices: int, began: float) -> dict[str, object]:
    return {
        "model": model,
        "devices": devices,
        "seconds": round(time.perf_counter() - began, 2),
        "cpu_seconds": round(time.process_time(), 2),
        "mebibytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }


def in_a_process(model: str, devices: int, budget: float | None) -> dict[str, object]:
    """Plan one case in a fresh process on one core with a limited memory."""
    given = [] if budget is None else ["--budget", str(budget)]
    command = [sys.executable, __file__, "--here", "--model", model, "--devices", str(devices)]
    done = subprocess.run(
        [*command, *given],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES)),
        check=True,
    )
    found: dict[str, object] = json.loads(done.stdout)
    return found


def line_of(case: dict[str, object]) -> str:
    """A row of the table."""

    def number(key: str, form: str) -> str:
        return format(value, form) if (value := case.get(key)) is not None else "-"

    plan = str(case["plan"])
    return ROW.format(
        case["model"],
        case["devices"],
        case.get("used", "-"),
        number("cpu_seconds", ".1f"),
        number("mebibytes", "d"),
        number("step_seconds", ".4g"),
        number("gap", ".2f"),
        number("even", ".2f"),
        plan if len(plan) < 60 else plan[:57] + "...",
    )


def main() -> None:
    """Run every case in a child process and print one line for each."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--model", nargs="+", default=list(MODELS))
    options.add_argument("--devices", nargs="+", type=int, default=list(BATCH))
    options.add_argument("--budget", type=float, default=None)
    options.add_argument("--svg", type=Path, default=None, help="draw the growth there")
    options.add_argument("--json", action="store_true", help="print all that is known, by line")
    options.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.here:
        print(json.dumps(one(chosen.model[0], chosen.devices[0], chosen.budget)))
        return
    if not chosen.json:
        print(ROW.format(*COLUMNS))
    measured: dict[str, list[tuple[float, float]]] = {model: [] for model in chosen.model}
    for model in chosen.model:
        for devices in chosen.devices:
            case = in_a_process(model, devices, chosen.budget)
            print(json.dumps(case) if chosen.json else line_of(case), flush=True)
            measured[model].append((devices, float(str(case["cpu_seconds"]))))
    if chosen.svg:
        allowed = [(float(n), ALLOWED[n]) for n in chosen.devices if n in ALLOWED]
        chosen.svg.write_text(growth_svg(measured, allowed), encoding="utf-8")


if __name__ == "__main__":
    main()
