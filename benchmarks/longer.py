"""What ten times the allowance would find.

    python benchmarks/longer.py [--only h100-a100] [--anchors FOLDER] [--times 10] [--which STEPS]
        [--jobs 2] [--most 0.01]

A search ends when its allowances are spent: counts of what may be estimated, climbed, simulated and
scheduled. Each case of rivals.py (and of a folder that anchors.py reads) is planned as it is and
with every allowance in ALLOWANCES so many times as large, in a process of its own; `--which`: only
with those whose names contain a text. Exits with 1 where the longer search gains more than
`--most`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from pathlib import Path

from meshwright.cluster.files import load_cluster
from meshwright.model.load import load_model
from meshwright.plan.ranks import describe_plan
from meshwright.plan.spec import Job
from meshwright.search import incumbent, planner
from meshwright.search.planner import find_plan
from rivals import CASES, CLUSTERS, Case, anchor_cases

ALLOWANCES: tuple[tuple[str, str, float], ...] = (
    ("local_search", "STEPS", 1.0),
    ("local_search", "TEMPLATE_STRATEGIES", 1.0),
    ("local_search", "PLAYED", 1.0),
    ("local_search", "WORK", 1.0),
    ("template_search", "ESTIMATED", 1.0),
    ("template_search", "OFFERED", 0.5),
    ("template_search", "COMBINED", 1.0),
    ("regular", "ALIKE", 1.0),
    ("planner", "SIMULATED_WORK", 1.0),
    ("planner", "MOST_HOPELESS", 1.0),
    ("options.boundary_kinds", "WORK", 1.0),
    ("options.other_schedules", "FINALISTS", 0.5),
    ("options.other_schedules", "FINALISTS_OF_MANY", 0.5),
    ("options.other_schedules", "PLAYED", 0.5),
    ("options.other_schedules", "LISTED", 0.5),
    ("options.other_schedules", "MOST_ACTIONS", 1.0),
    ("options.other_schedules", "GLANCED", 0.5),
    ("options.other_schedules", "LISTED_PLANS", 0.5),
    ("options.virtual_stages", "TIMED", 0.5),
    ("options.virtual_stages", "PLAYED", 0.5),
    ("options.virtual_stages", "MOST_ACTIONS", 1.0),
)
"""Modules of the search, names of allowances in them, and the power of the factor that each is
multiplied by: where two of them multiply each other, both get its root. `incumbent.WORK`, the
default of a record, is changed where the record is made."""

ROW = "{:<28} {:>10} {:>10} {:>8} {:>7} {:>7}  {}"


def lengthen(times: float, which: str = "") -> None:
    """Multiply the allowances of the search whose names contain a text, in this process."""
    for module, name, power in ALLOWANCES:
        if which in f"{module}.{name}":
            where = import_module(f"meshwright.search.{module}")
            setattr(where, name, multiplied(getattr(where, name), times**power))
    if which in "incumbent.WORK":
        work = round(incumbent.WORK * times)
        vars(planner)["Incumbent"] = partial(incumbent.Incumbent, work=work)


def multiplied(value: int | tuple[int, ...], by: float) -> int | tuple[int, ...]:
    """An allowance, or each of several."""
    if isinstance(value, tuple):
        return tuple(round(each * by) for each in value)
    return round(value * by)


def one(case: Case, times: float, which: str) -> dict[str, object]:
    """Plan a case here."""
    if times != 1:
        lengthen(times, which)
    model = load_model(case.model, case.sequence, case.precision)
    cluster = case.where or load_cluster(CLUSTERS / f"{case.cluster}.toml")
    job = Job(global_batch=case.batch, sequence=case.sequence, precision=case.precision)
    begun = time.process_time()
    plan = find_plan(model, cluster, job)
    assert plan.prediction is not None
    return {
        "step": plan.prediction.step_seconds,
        "cpu": time.process_time() - begun,
        "plan": describe_plan(plan),
    }


def apart(case: Case, times: float, options: argparse.Namespace) -> dict[str, object]:
    """The same in a process of its own."""
    command = [sys.executable, str(Path(__file__)), "--one", case.name, "--times", str(times)]
    command += ["--which", options.which]
    command += ["--anchors", str(options.anchors)] if options.anchors else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{case.name} failed:\n{done.stderr}")
    found: dict[str, object] = json.loads(done.stdout)
    return found


def both(case: Case, options: argparse.Namespace) -> tuple[dict[str, object], ...]:
    """A case as it is, and searched for longer."""
    return apart(case, 1.0, options), apart(case, options.times, options)


def main() -> int:
    """Print a line for each case as it is done; 1 if any gains more than is allowed."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--only", nargs="+", default=[], help="clusters or anchors")
    options.add_argument("--anchors", type=Path, help="folder of further cases")
    options.add_argument("--times", type=float, default=10.0)
    options.add_argument("--which", default="", help="allowances whose names contain this")
    options.add_argument("--jobs", type=int, default=1)
    options.add_argument("--most", type=float, default=0.01, help="largest gain allowed")
    options.add_argument("--one", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    cases = [*CASES, *(anchor_cases(chosen.anchors) if chosen.anchors else ())]
    if chosen.one:
        case = next(case for case in cases if case.name == chosen.one)
        print(json.dumps(one(case, chosen.times, chosen.which)))
        return 0
    cases = [case for case in cases if not chosen.only or case.cluster in chosen.only]
    print(ROW.format("case", "step s", "longer s", "gain", "cpu s", "longer", "plans"))
    gained = 0
    run = partial(both, options=chosen)
    with ThreadPoolExecutor(chosen.jobs) as pool:
        for case, (short, long) in zip(cases, pool.map(run, cases), strict=True):
            gain = 1 - float(str(long["step"])) / float(str(short["step"]))
            gained += gain > chosen.most
            print(_row(case.name, short, long, gain), flush=True)
    print(f"{len(cases)} cases, {gained} gain more than {chosen.most:.1%}")
    return int(gained > 0)


def _row(name: str, short: dict[str, object], long: dict[str, object], gain: float) -> str:
    plans = str(short["plan"])
    if long["plan"] != short["plan"]:
        plans += f" -> {long['plan']}"
    steps = [f"{float(str(each['step'])):.5f}" for each in (short, long)]
    spent = [f"{float(str(each['cpu'])):.1f}" for each in (short, long)]
    return ROW.format(name, *steps, f"{gain:.3%}", *spent, plans)


if __name__ == "__main__":
    sys.exit(main())
