"""Whether replicas of a layer with unlike tensor widths pay: plans with them allowed and without.

    python benchmarks/unlike_widths.py [--only a100-v100] [--batches 6 24]

Every case is planned twice: with the rule of the search, by which the tensor widths of all holders
of a layer must divide the widest of them, and with one width for all holders. `unlike` says whether
some layer, or a parameter that layers share, is held at unlike widths in the plan found.

The cases are clusters in which small devices need tensor parallelism that large ones do not: few
rows for each device (where pipelines idle), fast links inside nodes, and models with and without
tied embeddings.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Collection, Sequence
from itertools import product
from pathlib import Path
from unittest import mock

from meshwright.cluster.catalog import catalog
from meshwright.cluster.spec import Cluster, Link, Node, Site
from meshwright.errors import MeshwrightError
from meshwright.model.load import load_model
from meshwright.model.spec import LayerGraph
from meshwright.plan.spec import Job, Plan
from meshwright.search import candidate, hill_climb, incumbent, template_estimate
from meshwright.search.costs import Costs
from meshwright.search.planner import find_plan

CLUSTERS = {
    "h100-v100": ((1, "H100"), (2, "V100-16")),
    "2-a100-v100": ((2, "A100-80"), (4, "V100-16")),
    "4-a100-v100": ((4, "A100-80"), (8, "V100-16")),
    "h100s-v100s": ((2, "H100"), (4, "V100-16"), (4, "V100-16")),
    "a100-3-2": ((3, "A100-40"), (2, "A100-80")),
    "a100-2-v100": ((1, "A100-40"), (2, "V100-16")),
    "2-a100-4-v100": ((2, "A100-40"), (4, "V100-16")),
    "h100-2-a100": ((1, "H100"), (2, "A100-40")),
    "2-h100-4-a100": ((2, "H100"), (2, "A100-40"), (2, "A100-40")),
    "a100-6-4": ((6, "A100-40"), (4, "V100-16"), (4, "V100-16")),
}
"""Nodes of one type each, joined by 100 Gbit/s."""
CONFIGS = Path(__file__).resolve().parents[1] / "examples" / "configs"
MODELS = ("gpt2-large", "gpt2-xl", "llama-3.2-1b.json", "llama-2-7b")
NETWORK = Link(bandwidth=12.5e9, latency=10e-6)
ROW = "{:<13} {:<17} {:>4} {:>9} {:>9} {:>7} {:>6}  {}"


def one_width(costs: Costs, pipelines: Sequence[candidate.CandidatePipeline]) -> bool:
    """Returns True if all holders of a layer, and of what it shares, have one tensor width."""
    held = candidate.tensor_widths(pipelines)
    tied = (set[int]().union(*(held[x] for x in each.layers)) for each in costs.model.tied)
    return candidate.tensor_widths_agree(costs, pipelines) and all(
        len(own) == 1 for own in (*held.values(), *tied)
    )


def is_one_width(widths: Collection[int]) -> bool:
    """Returns True if there is one tensor width, or none."""
    return len(widths) < 2


def main() -> None:
    """Print one line for each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="clusters whose names contain this")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 3, 6, 12, 24])
    options = parser.parse_args()
    print(ROW.format("cluster", "model", "rows", "allowed", "one", "gain", "unlike", "plan"))
    chosen = [name for name in CLUSTERS if options.only in name]
    for name, model, rows in product(chosen, options.models, options.batches):
        source = CONFIGS / model if model.endswith(".json") else model
        graph, job = load_model(source, 1024, "fp16"), _job(rows)
        began = time.process_time()
        try:
            found = find_plan(graph, _cluster(name), job)
            with (
                mock.patch.object(hill_climb, "tensor_widths_agree", one_width),
                mock.patch.object(incumbent, "tensor_widths_agree", one_width),
                mock.patch.object(template_estimate, "divide_the_widest", is_one_width),
            ):
                alone = find_plan(graph, _cluster(name), job)
        except MeshwrightError as failure:
            print(f"{name:<13} {model:<17} {rows:>4}  {type(failure).__name__}", flush=True)
            continue
        one, other = (_seconds(plan) for plan in (found, alone))
        print(
            ROW.format(
                name,
                model,
                rows,
                f"{one:.4g}",
                f"{other:.4g}",
                f"{other / one - 1:.2%}",
                "yes" if _unlike(found, graph) else "no",
                f"{found.name}, one width {alone.name}, {time.process_time() - began:.0f} s",
            ),
            flush=True,
        )


def _job(rows: int) -> Job:
    return Job(global_batch=rows, sequence=1024, precision="fp16", optimizer="adamw")


def _cluster(name: str) -> Cluster:
    kinds = {kind for _, kind in CLUSTERS[name]}
    nodes = tuple(
        Node(
            name=f"n{number}",
            site="main",
            devices=(kind,) * count,
            inside=catalog()[kind].inside,
            network=NETWORK,
        )
        for number, (count, kind) in enumerate(CLUSTERS[name])
    )
    types = {kind: catalog()[kind].type for kind in sorted(kinds)}
    return Cluster(name=name, types=types, nodes=nodes, sites=(Site(name="main"),))


def _seconds(plan: Plan) -> float:
    assert plan.prediction is not None
    return plan.prediction.step_seconds


def _unlike(plan: Plan, graph: LayerGraph) -> bool:
    held = candidate.tensor_widths([candidate.candidate_of(each) for each in plan.pipelines])
    tied = (set[int]().union(*(held[x] for x in each.layers)) for each in graph.tied)
    return any(len(own) > 1 for own in (*held.values(), *tied))


if __name__ == "__main__":
    main()
