"""Our plans beside the best plans known for the clusters of other planners.

    python benchmarks/anchors.py FOLDER [--only zorse] [--jobs 2] [--budget 40] [--keep FOLDER]

`FOLDER/jobs.toml` has one table for each case: `cluster` and `model` (files of the folder, or the
name of a model), `global_batch`, `sequence`, `precision` and, if they are known, `best_plan` and
the seconds `best_known` when the case was written. Every plan in `FOLDER/plans` for the same model,
cluster and batch is priced anew by today's costs; the fastest that fits is what our plan has to
beat. `--keep` stores our plans. Exits with 1 where ours is slower.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from meshwright.cluster.files import load_cluster
from meshwright.cluster.spec import Cluster, devices_of
from meshwright.cost.memory import memory_by_class, total_bytes
from meshwright.errors import FitError
from meshwright.model.load import load_model
from meshwright.model.spec import LayerGraph
from meshwright.plan.files import load_plan, save_plan
from meshwright.plan.ranks import describe_plan
from meshwright.plan.spec import Job, Plan
from meshwright.plan.validate import validate_plan
from meshwright.search.planner import find_plan
from meshwright.simulate.symmetry import simulate_by_symmetry

SLOWER = 1 + 1e-9
"""Our step over that of the best plan known, at most."""

ROW = "{:<16} {:>8} {:>9} {:>7} {:>9} {:>6} {:>6}  {}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """One case. Seconds are of simulated steps, unless named otherwise."""

    found: float | None
    """Our plan's; None: nothing fits."""
    known: float | None
    """Those of the fastest plan in the folder; None: it has none."""
    known_name: str
    gap: float
    """Our seconds over the certificate's bound."""
    cpu_seconds: float
    """Time of the search."""
    plan: str

    @property
    def ratio(self) -> float:
        """Our seconds over those of the best plan known; not a number without one."""
        return self.found / self.known if self.found and self.known else float("nan")


def outcome(folder: Path, name: str, budget: float | None, keep: Path | None) -> Outcome:
    """Plan one case here, and price what is known for it."""
    case = jobs_in(folder)[name]
    cluster = load_cluster(folder / case["cluster"])
    source = folder / case["model"]
    model = load_model(
        source if source.exists() else case["model"], case["sequence"], case["precision"]
    )
    job = Job(
        global_batch=case["global_batch"],
        sequence=case["sequence"],
        precision=case["precision"],
        optimizer="adamw",
    )
    known = sorted(_known(folder, model, cluster, job))
    begun = time.process_time()
    try:
        plan = find_plan(model, cluster, job, budget_seconds=budget)
    except FitError:
        plan = None
    spent = time.process_time() - begun
    if plan and keep:
        keep.mkdir(parents=True, exist_ok=True)
        save_plan(plan, keep / f"{name}.json")
    found = plan.prediction if plan else None
    return Outcome(
        found=found.step_seconds if found else None,
        known=known[0][0] if known else None,
        known_name=known[0][1] if known else "",
        gap=found.step_seconds / (found.lower_bound_seconds or float("nan")) if found else 0.0,
        cpu_seconds=spent,
        plan=describe_plan(plan) if plan else "nothing fits",
    )


def jobs_in(folder: Path) -> dict[str, dict[str, Any]]:
    """The tables of a folder's cases, by their names."""
    return tomllib.loads((folder / "jobs.toml").read_text())


def _known(
    folder: Path, model: LayerGraph, cluster: Cluster, job: Job
) -> Iterator[tuple[float, str]]:
    """Seconds and names of the folder's plans for a case, as far as they fit."""
    for path in sorted((folder / "plans").glob("*.json")):
        plan = load_plan(path)
        if _is_for(plan, model, cluster, job):
            validate_plan(plan, model, cluster)
            if all(total_bytes(m) <= m.capacity for m, _ in memory_by_class(plan, model, cluster)):
                yield simulate_by_symmetry(plan, model, cluster).step_seconds, path.stem
            else:
                print(f"{path.name} does not fit by today's memory", file=sys.stderr)


def _is_for(plan: Plan, model: LayerGraph, cluster: Cluster, job: Job) -> bool:
    devices = {device.name for device in devices_of(cluster)}
    same = plan.job.global_batch, plan.job.sequence, plan.model.name
    return same == (job.global_batch, job.sequence, model.name) and set(plan.devices) <= devices


def apart(options: argparse.Namespace, name: str) -> Outcome:
    """The same in a process of its own."""
    command = [sys.executable, str(Path(__file__)), str(options.folder), "--one", name]
    command += ["--budget", str(options.budget)] if options.budget else []
    command += ["--keep", str(options.keep)] if options.keep else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr}")
    sys.stderr.write(done.stderr)
    return Outcome(**json.loads(done.stdout))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--budget", type=float, help="seconds for every search")
    parser.add_argument("--keep", type=Path, help="a folder for the plans that are found")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        found = outcome(options.folder, options.one, options.budget, options.keep)
        print(json.dumps(asdict(found)))
        return
    then = jobs_in(options.folder)
    names = [name for name in then if options.only in name]
    print(ROW.format("case", "step s", "known s", "ratio", "then s", "gap", "cpu s", "plan"))
    behind = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for name, each in zip(names, pool.map(lambda n: apart(options, n), names), strict=True):
            print(_row(name, each, then[name].get("best_known", float("nan"))), flush=True)
            behind += each.ratio > SLOWER
    print(f"{len(names)} cases, {behind} slower than the best plan known")
    sys.exit(behind > 0)


def _row(name: str, each: Outcome, then: float) -> str:
    mark = f"  < {each.known_name}" if each.ratio > SLOWER else ""
    return ROW.format(
        name,
        f"{each.found:.3f}" if each.found else "-",
        f"{each.known:.3f}" if each.known else "-",
        f"{each.ratio:.4f}" if each.known else "-",
        f"{then:.2f}",
        f"{each.gap:.2f}",
        f"{each.cpu_seconds:.1f}",
        each.plan + mark,
    )


if __name__ == "__main__":
    main()
