"""How far the plans that are found may be from the best: their steps over the certificate's bound.

    python benchmarks/certificates.py [--only v100-16] [--growth] [--anew]

Every example cluster with three models, as in `search_gate.py`; with `--growth` also the clusters
of `planner.py`. Steps of the examples are those stored in `baselines/search_gate.json` unless they
are planned `--anew`; those of the growth table are always planned. `bound s` and `cpu s` are the
certificate's; the last line has the median and the worst of the gaps.
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
from meshwright.plan.spec import Job
from meshwright.search.certificate import certificate
from meshwright.search.costs import costs_of
from meshwright.search.planner import find_plan

ROW = "{:<28} {:>9} {:>9} {:>6} {:>6}  {}"


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


def step_seconds(model: LayerGraph, cluster: Cluster, job: Job) -> float | None:
    """Step of the plan that is found now; None: nothing fits."""
    try:
        found = find_plan(model, cluster, job).prediction
    except FitError:
        return None
    assert found is not None
    return found.step_seconds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument("--growth", action="store_true", help="the growth table's clusters, too")
    parser.add_argument("--anew", action="store_true", help="plan the examples anew")
    options = parser.parse_args()
    stored = {} if options.anew else json.loads(STORED.read_text())
    print(ROW.format("case", "step s", "bound s", "gap", "cpu s", "what the bound is made of"))
    gaps: list[float] = []
    for name, model, cluster, rows in named_cases(options.only, options.growth):
        job = Job(global_batch=rows, sequence=model.sequence, precision="fp16", optimizer="adamw")
        step = stored[name]["step"] if name in stored else step_seconds(model, cluster, job)
        begun = time.process_time()
        bound = certificate(costs_of(model, cluster, job))
        spent = time.process_time() - begun
        if step is None:
            print(ROW.format(name, "-", f"{bound.seconds:.4f}", "-", f"{spent:.2f}", bound.reason))
            continue
        gaps.append(step / bound.seconds)
        print(
            ROW.format(
                name,
                f"{step:.4f}",
                f"{bound.seconds:.4f}",
                f"{gaps[-1]:.2f}",
                f"{spent:.2f}",
                bound.reason,
            ),
            flush=True,
        )
    print(f"{len(gaps)} cases: median {median(gaps):.2f}, worst {max(gaps):.2f}")


if __name__ == "__main__":
    main()
