"""Whether the search still finds plans as fast as before, and how long it takes.

    python benchmarks/search_gate.py [--only h100-a100] [--jobs 2] [--steps] [--planning]
        [--baseline CHECKOUT] [--repeat 3] [--write]

Two tables. The first has the simulated step of the plan found for every example cluster and three
models, over that of a plan in `baselines/plans`, priced anew by today's costs; cases without one
are shown alone. The second has the CPU seconds of planning on clusters of 16 to 10,240 devices,
beside what is allowed; with `--baseline`, also over those of another checkout, measured in turns
with it. `--write` stores plans for cases without one.
Exits with 1 where a step is above its limit, or the geometric mean is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import exp, log
from pathlib import Path
from statistics import median

from planner import BATCH, TABLE
from planner import MODELS as SEQUENCES
from planner_clusters import mixed_cluster

from meshwright.cluster.files import load_cluster
from meshwright.cluster.spec import Cluster
from meshwright.errors import FitError
from meshwright.model.load import load_model
from meshwright.plan.files import load_plan, save_plan
from meshwright.plan.ranks import describe_plan
from meshwright.plan.spec import Job, PlanInput
from meshwright.plan.validate import validate_plan
from meshwright.search.options import OPTION_NAMES
from meshwright.search.planner import find_plan
from meshwright.simulate.symmetry import simulate_by_symmetry

HERE = Path(__file__).parent
SPENT = HERE / "baselines" / "search_gate.json"
"""CPU seconds of the search that found the stored plans."""
PLANS = HERE / "baselines" / "plans"
WRITE = "SEARCH_GATE_WRITE"
"""Set where plans are to be stored."""
CLUSTERS = HERE.parent / "examples" / "clusters"
MODELS = ("gpt2-medium", "gpt2-xl", "llama-2-7b")
ROWS, SEQUENCE = 64, 1024
MOST_SLOWER, MOST_MEAN = 1.005, 0.99
"""Step of one case, and geometric mean over all, relative to the baseline."""

OF_BASELINE = {"boundary-kinds", "schedules", "virtual-stages"}
"""The options that the search had when the baseline was measured; others are not tried."""


def cases(only: str) -> Iterator[str]:
    """Names of the cases of the first table that contain a text."""
    for path in sorted(CLUSTERS.glob("*.toml")):
        for model in MODELS:
            if only in f"{path.stem}.{model}":
                yield f"{path.stem}.{model}"


def found_here(
    model: str, cluster: Cluster, batch: int, sequence: int, stored: Path | None = None
) -> dict[str, object]:
    """Seconds of the step of the plan found, and of one that was stored, those of the CPU, and the
    plan in a line. A case without a stored plan that is to have one gets this one."""
    graph = load_model(model, sequence, "fp16")
    job = Job(global_batch=batch, sequence=sequence, precision="fp16", optimizer="adamw")
    begun = time.process_time()
    try:
        plan = find_plan(graph, cluster, job, forbidden=set(OPTION_NAMES) - OF_BASELINE)
    except FitError:
        return {"step": None, "cpu": time.process_time() - begun, "plan": "nothing fits"}
    spent = time.process_time() - begun
    assert plan.prediction is not None
    found = {"step": plan.prediction.step_seconds, "cpu": spent, "plan": describe_plan(plan)}
    if stored is not None and stored.exists():
        # A cluster may be described otherwise than when the plan was found; the plan still fits it.
        known = replace(load_plan(stored), cluster=PlanInput(name="", fingerprint=""))
        validate_plan(known, graph, cluster)
        found["stored"] = simulate_by_symmetry(known, graph, cluster).step_seconds
    elif stored is not None and WRITE in os.environ:
        save_plan(replace(plan, prediction=None), stored)
    return found


def one(name: str) -> dict[str, object]:
    """A case of either table, in this process."""
    where, model = name.split(".", 1)
    if where.isdigit():
        devices = int(where)
        return found_here(model, mixed_cluster(devices), BATCH[devices], SEQUENCES[model])
    cluster = load_cluster(CLUSTERS / f"{where}.toml")
    return found_here(model, cluster, ROWS, SEQUENCE, PLANS / f"{name}.json")


def apart(name: str, checkout: Path) -> dict[str, object]:
    """The same in a process of its own, with the sources of a checkout."""
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__)), "--one", name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} in {checkout} failed:\n{done.stderr}")
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


def compare_steps(names: Sequence[str], jobs: int) -> bool:
    """Print the first table; whether it keeps its limits."""
    then = json.loads(SPENT.read_text())
    ratios, spent = [], [0.0, 0.0]
    print(f"{'case':<32} {'step s':>9} {'ratio':>7} {'cpu s':>6} {'was':>6}  plan")
    with ThreadPoolExecutor(jobs) as pool:
        for name, found in zip(
            names, pool.map(lambda n: apart(n, HERE.parent), names), strict=True
        ):
            step, old = found["step"], found.get("stored")
            ratio = step / old if step and old else float("nan")
            was = then.get(name, float("nan"))
            if old:
                ratios.append(ratio)
                spent[0], spent[1] = spent[0] + float(found["cpu"]), spent[1] + was  # type: ignore[arg-type]
            mark = " <" if ratio > MOST_SLOWER else ""
            print(
                f"{name:<32} {step or float('nan'):9.5f} {ratio:7.4f} {found['cpu']:6.1f} "
                f"{was:6.1f}  {found['plan']}{mark}",
                flush=True,
            )
    if not ratios:
        print("no case with a stored plan")
        return True
    mean = exp(sum(map(log, ratios)) / len(ratios))
    beyond = sum(ratio > MOST_SLOWER for ratio in ratios)
    print(
        f"{len(ratios)} cases: geometric mean {mean:.4f} (at most {MOST_MEAN}), "
        f"largest {max(ratios):.4f}, {beyond} above {MOST_SLOWER}; "
        f"{spent[0]:.0f} CPU s, {spent[1]:.0f} then"
    )
    return not beyond and mean <= MOST_MEAN


def time_planning(only: str, other: Path | None, repeat: int) -> None:
    """Print the second table."""
    print(
        f"{'devices.model':<20} {'cpu s':>6} {'allowed':>8} {'to other':>9} {'step to other':>14}"
    )
    for model, allowed in TABLE.items():
        for devices, limit in allowed.items():
            name = f"{devices}.{model}"
            if only not in name:
                continue
            ours, theirs = [], []
            for _ in range(repeat):
                ours.append(apart(name, HERE.parent))
                if other:
                    theirs.append(apart(name, other))
            cpu = median(float(each["cpu"]) for each in ours)  # type: ignore[arg-type]
            ratio = step = float("nan")
            if theirs:
                ratio = cpu / median(float(each["cpu"]) for each in theirs)  # type: ignore[arg-type]
                if ours[0]["step"] and theirs[0]["step"]:  # where something fits
                    step = ours[0]["step"] / theirs[0]["step"]  # type: ignore[operator]
            mark = " <" if cpu > limit else ""
            print(f"{name:<20} {cpu:6.2f} {limit:8.1f} {ratio:9.2f} {step:14.4f}{mark}", flush=True)


def main() -> None:
    """Print both tables, or one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--steps", action="store_true", help="the first table alone")
    parser.add_argument("--planning", action="store_true", help="the second table alone")
    parser.add_argument("--baseline", type=Path, help="another checkout, for the second table")
    parser.add_argument("--repeat", type=int, default=3, help="measurements, for the second table")
    parser.add_argument("--write", action="store_true", help="store plans for cases without one")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one)))
        return
    if options.write:
        os.environ[WRITE] = "yes"
    kept = True
    names = list(cases(options.only))
    if names and not options.planning:
        kept = compare_steps(names, options.jobs)
    if not options.steps and not options.write:
        time_planning(options.only, options.baseline, options.repeat)
    sys.exit(not kept)


if __name__ == "__main__":
    main()
