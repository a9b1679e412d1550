"""How long the planner takes, how much memory, and how good its plans are, as clusters grow.

    python benchmarks/planner.py [--model gpt2-xl] [--kinds mixed four-types | all]
        [--devices 16 128 1024 10240] [--budget 60] [--svg docs/planner-growth.svg] [--json]

The `mixed` clusters have three device types at two sites; planner_clusters.py has other kinds. Each
case runs in a process of its own that may take 2 GiB. `cpu s`: of the search alone, beside what is
`allowed`; `gap`: times the certificate's bound; `even`: the best plan of equal stages and equal
shares takes that many times as long. Also prints the seconds at 10,240 devices over those at 1,024.
Exits with 1 where a case takes longer than is allowed, or that ratio is above its limit.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

from growth import growth_svg
from planner_clusters import KINDS, MANY_TYPES

from meshwright.errors import FitError
from meshwright.model.load import load_model
from meshwright.plan.ranks import describe_plan
from meshwright.plan.spec import Job
from meshwright.search.certificate import sentence
from meshwright.search.planner import find_plan

BATCH = {16: 128, 64: 512, 128: 512, 1024: 2048, 10240: 8192}
"""Rows of a step, by devices; of other numbers a row for each."""
MODELS = {"gpt2-xl": 1024, "llama-2-70b": 4096, "llama-2-7b": 2048}
TABLE = {
    "gpt2-xl": {16: 1.0, 128: 2.5, 1024: 3.5, 10240: 6.0},
    "llama-2-70b": {16: 2.0, 128: 3.5, 1024: 7.0, 10240: 11.0},
}
"""Allowed CPU seconds, by model and devices, for at most three types."""
FOUR_TYPES = 2.0
"""Times as long for four types."""
SPECIAL = {("four-types", 64): 5.0, ("regions", 128): 10.0}
"""Allowed CPU seconds of single cases, whatever the model."""
GROWS = 10.0
"""Seconds at 10,240 devices over those at 1,024, at most: ten times the devices."""
MOST_BYTES = 2 << 30

COLUMNS = (
    "model", "kind", "devices", "used", "cpu s", "allowed", "MiB", "step s", "gap", "even", "plan"
)  # fmt: skip
ROW = "{:<12} {:<14} {:>7} {:>6} {:>6} {:>7} {:>6} {:>9} {:>6} {:>6}  {}"


def allowed_seconds(model: str, kind: str, devices: int) -> float:
    """CPU seconds that a search may take: those of the next larger size in the table."""
    if (kind, devices) in SPECIAL:
        return SPECIAL[kind, devices]
    table = TABLE.get(model, TABLE["llama-2-70b"])
    size = min((size for size in table if size >= devices), default=max(table))
    return table[size] * (FOUR_TYPES if kind in MANY_TYPES else 1.0)


def one(model: str, kind: str, devices: int, budget: float | None) -> dict[str, object]:
    """Plan one case here."""
    graph = load_model(model, MODELS[model], "fp16")
    job = Job(
        global_batch=BATCH.get(devices, devices),
        sequence=graph.sequence,
        precision="fp16",
        optimizer="adamw",
    )
    where = KINDS[kind].build(devices)
    began = time.perf_counter(), time.process_time()
    try:
        plan = find_plan(graph, where, job, budget_seconds=budget)
    except FitError:
        return {**_spent(model, kind, devices, began), "plan": "nothing fits"}
    found = plan.prediction
    assert found is not None
    assert found.lower_bound_seconds
    even = next((r.step_seconds for r in found.runners_up if r.name.startswith("even:")), None)
    return {
        **_spent(model, kind, devices, began),
        "used": len(plan.devices),
        "step_seconds": found.step_seconds,
        "gap": found.step_seconds / found.lower_bound_seconds,
        "even": even / found.step_seconds if even else None,
        "certificate": sentence(found),
        "plan": describe_plan(plan),
    }


def _spent(model: str, kind: str, devices: int, began: tuple[float, float]) -> dict[str, object]:
    return {
        "model": model,
        "kind": kind,
        "devices": devices,
        "seconds": round(time.perf_counter() - began[0], 2),
        "cpu_seconds": round(time.process_time() - began[1], 2),
        "allowed_seconds": allowed_seconds(model, kind, devices),
        "mebibytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }


def in_a_process(model: str, kind: str, devices: int, budget: float | None) -> dict[str, object]:
    """Plan one case in a fresh process on one core with a limited memory."""
    given = [] if budget is None else ["--budget", str(budget)]
    command = [sys.executable, __file__, "--here", "--model", model]
    command += ["--kinds", kind, "--devices", str(devices)]
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
    late = "  < too long" if is_late(case) else ""
    return ROW.format(
        case["model"],
        case["kind"],
        case["devices"],
        case.get("used", "-"),
        number("cpu_seconds", ".1f"),
        number("allowed_seconds", ".1f"),
        number("mebibytes", "d"),
        number("step_seconds", ".4g"),
        number("gap", ".2f"),
        number("even", ".2f"),
        (plan if len(plan) < 60 else plan[:57] + "...") + late,
    )


def is_late(case: dict[str, object]) -> bool:
    """Whether a search took longer than is allowed."""
    return float(str(case["cpu_seconds"])) > float(str(case["allowed_seconds"]))


def growth_of(measured: dict[str, list[tuple[float, float]]]) -> dict[str, float]:
    """By model the seconds at 10,240 devices over those at 1,024, where both are known."""
    found = {}
    for model, points in measured.items():
        seconds = dict(points)
        if seconds.get(1024) and 10240 in seconds:
            found[model] = seconds[10240] / seconds[1024]
    return found


def main() -> int:
    """Run every case in a child process and print one line for each; 1 if any takes too long."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--model", nargs="+", default=list(TABLE))
    options.add_argument("--kinds", nargs="+", default=["mixed"], choices=[*KINDS, "all"])
    options.add_argument("--devices", nargs="+", type=int, help="instead of those of the kind")
    options.add_argument("--budget", type=float, default=None)
    options.add_argument("--svg", type=Path, default=None, help="draw the growth there")
    options.add_argument("--json", action="store_true", help="print all that is known, by line")
    options.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    kinds = list(KINDS) if "all" in chosen.kinds else chosen.kinds
    if chosen.here:
        case = one(chosen.model[0], kinds[0], chosen.devices[0], chosen.budget)
        print(json.dumps(case))
        return 0
    if not chosen.json:
        print(ROW.format(*COLUMNS))
    late = 0
    measured: dict[str, list[tuple[float, float]]] = {}
    for model, kind in product(chosen.model, kinds):
        points = measured.setdefault(model if kind == "mixed" else f"{model}, {kind}", [])
        for devices in chosen.devices or KINDS[kind].sizes:
            case = in_a_process(model, kind, devices, chosen.budget)
            print(json.dumps(case) if chosen.json else line_of(case), flush=True)
            points.append((devices, float(str(case["cpu_seconds"]))))
            late += is_late(case)
    if chosen.svg:
        _draw(chosen.svg, measured, chosen.model)
    ratios = growth_of(measured)
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.1f} times as long at 10,240 devices as at 1,024", file=sys.stderr)
    return int(late > 0 or any(ratio >= GROWS for ratio in ratios.values()))


def _draw(path: Path, measured: dict[str, list[tuple[float, float]]], models: list[str]) -> None:
    """Draw the growth beside what the most patient of these models is allowed."""
    sizes = sorted({devices for points in measured.values() for devices, _ in points})
    allowed = [(n, max(allowed_seconds(m, "mixed", int(n)) for m in models)) for n in sizes]
    path.write_text(growth_svg(measured, allowed), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
