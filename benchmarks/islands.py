"""What a plan loses if the search does not know which devices of a node are joined better.

    python benchmarks/islands.py [--cluster examples/clusters/bridged-pairs.toml]

Every model is planned twice: for the cluster as its file describes it, and for the same without
islands, where all devices of a node reach each other over the link `inside`. Both plans are then
simulated on the cluster with its islands. `tp inside` counts, of the tensor groups of the first
plan, those that are in one island.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from meshwright.cluster.files import load_cluster
from meshwright.cluster.spec import Cluster, devices_of
from meshwright.model.load import load_model
from meshwright.model.spec import LayerGraph
from meshwright.plan.spec import Job, Plan
from meshwright.search.planner import find_plan
from meshwright.simulate.symmetry import simulate_by_symmetry

CLUSTERS = Path(__file__).resolve().parents[1] / "examples" / "clusters"
CASES = (("llama-2-7b", 64), ("llama-2-7b", 128), ("gpt2-xl", 64), ("gpt2-large", 64))
"""Models and rows of a batch; all rows have 1,024 tokens."""
ROW = "{:<12} {:>5} {:>9} {:>9} {:>7}  {:>9}  {}"


def main() -> None:
    """Print one line for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cluster", type=Path, default=CLUSTERS / "bridged-pairs.toml")
    cluster = load_cluster(parser.parse_args().cluster)
    nodes = tuple(replace(node, islands=None) for node in cluster.nodes)
    print(ROW.format("model", "rows", "seen s", "unseen s", "lost", "tp inside", "plans"))
    for model, rows in CASES:
        graph = load_model(model, 1024, "fp16")
        job = Job(global_batch=rows, sequence=1024, precision="fp16", optimizer="adamw")
        seen, unseen = (
            find_plan(graph, where, job) for where in (cluster, replace(cluster, nodes=nodes))
        )
        one, other = (_seconds(plan, graph, cluster) for plan in (seen, unseen))
        within, groups = _groups_inside(seen, cluster)
        print(
            ROW.format(
                model,
                rows,
                f"{one:.4g}",
                f"{other:.4g}",
                f"{other / one - 1:.1%}",
                f"{within}/{groups}",
                f"{seen.name}, unseen {unseen.name}",
            ),
            flush=True,
        )


def _seconds(plan: Plan, graph: LayerGraph, cluster: Cluster) -> float:
    return simulate_by_symmetry(plan, graph, cluster).step_seconds


def _groups_inside(plan: Plan, cluster: Cluster) -> tuple[int, int]:
    """Returns how many tensor groups of two devices or more are in one island, and all of them."""
    island = {device.name: device.island for device in devices_of(cluster)}
    groups = {
        group
        for pipeline in plan.pipelines
        for stage in pipeline.stages
        for group in stage.devices
        if len(group) > 1
    }
    inside = sum(len({island[name] for name in group}) == 1 for group in groups)
    return inside, len(groups)


if __name__ == "__main__":
    main()
