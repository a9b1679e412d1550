"""How far the plans that are found may be from the best: their steps over the certificate's bound.

    python benchmarks/certificates.py [--only v100-16] [--growth] [--anew]

Every example cluster with three models, as in `search_gate.py`; with `--growth` also the clusters
of `planner.py`. Steps of the examples are those stored in `baselines/search_gate.json` unless they
are planned `--anew`; those of the growth table are always planned. `bound s` and `cpu s` are the
certificate's; the last line has the median and the worst of the gaps.

Of plans that are made, it also prints what became of the devices' time, a device of each type being
worth as much as it is fast: the shares of the step in which they are unused, busy, idle (before,
between and after their own work) and done with all backwards.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from statistics import median

from planner import BATCH
from planner import MODELS as SEQUENCES
from planner_clusters import mixed_cluster
from search_gate import CLUSTERS, ROWS, SEQUENCE, STORED, cases

from meshwright.cluster.files import load_cluster
from meshwright.cluster.spec import Cluster
from meshwright.errors import FitError
from meshwright.model.load import load_model
from meshwright.model.spec import LayerGraph
from meshwright.plan.spec import Job, Plan
from meshwright.program.operations import Op
from meshwright.search.certificate import certificate
from meshwright.search.costs import Costs, costs_of, speeds
from meshwright.search.planner import find_plan
from meshwright.search.space import usable_devices
from meshwright.simulate.simulator import simulate_plan

ROW = "{:<28} {:>9} {:>9} {:>6} {:>6} {:>7} {:>5} {:>5} {:>6}  {}"
HEADINGS = (
    *("case", "step s", "bound s", "gap", "cpu s"),
    *("unused", "busy", "idle", "after", "what the bound is made of"),
)
COMPUTED = (Op.FORWARD, Op.BACKWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT)


def named_cases(only: str, growth: bool) -> Iterator[tuple[str, LayerGraph, Cluster, int]]:
    """Name, model, cluster and rows of every case whose name contains a text."""
    for name in cases(only):
        where, model = name.split(".", 1)
        cluster = load_cluster(CLUSTERS / f"{where}.toml")
        yield name, load_model(model, SEQUENCE, "fp16"), cluster, ROWS
    for model, sequence in SEQUENCES.items() if growth else ():
        for devices, rows in BATCH.items():
            if only in f"{devices}.{model}":
                graph = load_model(model, sequence, "fp16")
                yield f"{devices}.{model}", graph, mixed_cluster(devices), rows


def planned(model: LayerGraph, cluster: Cluster, job: Job) -> Plan | None:
    """The plan that is found now; None: nothing fits."""
    try:
        return find_plan(model, cluster, job)
    except FitError:
        return None


def time_shares(plan: Plan, costs: Costs) -> list[str]:
    """Shares of the step in which devices are unused, busy, idle, and done with all backwards."""
    timeline = simulate_plan(plan, costs.model, costs.cluster)
    worth = speeds(costs, {device.type for device in usable_devices(costs)})
    every = sum(worth[device.type] for device in usable_devices(costs))
    rank_worth = [worth[costs.devices[name].type] for name in timeline.devices]
    computed = [each for each in timeline.intervals if each.op in COMPUTED]
    end = max(each.end_seconds for each in computed) / timeline.step_seconds
    used = sum(rank_worth) / every
    busy = sum(
        rank_worth[each.rank] * (each.end_seconds - each.start_seconds) for each in computed
    ) / (every * timeline.step_seconds)
    shares = (1 - used, busy, used * end - busy, used * (1 - end))
    return [f"{max(0.0, share):.0%}" for share in shares]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument("--growth", action="store_true", help="the growth table's clusters, too")
    parser.add_argument("--anew", action="store_true", help="plan the examples anew")
    options = parser.parse_args()
    stored = {} if options.anew else json.loads(STORED.read_text())
    print(ROW.format(*HEADINGS))
    gaps: list[float] = []
    for name, model, cluster, rows in named_cases(options.only, options.growth):
        job = Job(global_batch=rows, sequence=model.sequence, precision="fp16", optimizer="adamw")
        costs = costs_of(model, cluster, job)
        plan = None if name in stored else planned(model, cluster, job)
        step = plan.prediction.step_seconds if plan and plan.prediction else None
        step = stored[name]["step"] if name in stored else step
        begun = time.process_time()
        bound = certificate(costs)
        spent = time.process_time() - begun
        gap, shares = "-", ["-"] * 4
        if step is not None:
            gaps.append(step / bound.seconds)
            gap = f"{gaps[-1]:.2f}"
        if plan is not None:
            shares = time_shares(plan, costs)
        figures = (f"{step:.4f}" if step else "-", f"{bound.seconds:.4f}", gap, f"{spent:.2f}")
        print(ROW.format(name, *figures, *shares, bound.reason), flush=True)
    print(f"{len(gaps)} cases: median {median(gaps):.2f}, worst {max(gaps):.2f}")


if __name__ == "__main__":
    main()
