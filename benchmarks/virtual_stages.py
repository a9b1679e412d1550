"""What it gains, and costs the search, to divide layers into several stages on each device.

    python benchmarks/virtual_stages.py [--case 0 1 ...]

Every case is planned twice, with one stage on each device at most and with several. `gain` is of
the simulated step; CPU seconds are of the whole search.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass

from meshwright.cluster.catalog import catalog
from meshwright.cluster.spec import Cluster, Link, Node, Site
from meshwright.model.load import load_model
from meshwright.model.spec import LayerGraph
from meshwright.plan.ranks import describe_plan
from meshwright.plan.spec import Job
from meshwright.search.planner import find_plan

ROW = "{:>2} {:<12} {:<24} {:>5} {:>8} {:>8} {:>7} {:>5} {:>5}  {}"
COLUMNS = ("", "model", "devices", "rows", "step s", "divided", "gain", "cpu s", "then", "plan")


@dataclass(frozen=True)
class Case:
    """A model and a batch on nodes of several types."""

    model: str
    sequence: int
    nodes: Mapping[str, int]
    """Number of nodes by device type."""
    per_node: int
    bandwidth: float
    """Bytes per second of each node's network."""
    rows: int


CASES = (
    Case("gpt2-xl", 1024, {"A100-80": 1}, 8, 12.5e9, 16),
    Case("gpt2-xl", 1024, {"A100-80": 8}, 1, 1.25e9, 8),
    Case("gpt2-xl", 1024, {"A100-80": 8}, 1, 12.5e9, 32),
    Case("gpt2-xl", 1024, {"A100-80": 4, "V100-32": 4}, 1, 1.25e9, 16),
    Case("gpt2-xl", 1024, {"A100-80": 1, "V100-32": 1}, 8, 12.5e9, 128),
    Case("gpt2-xl", 1024, {"T4": 4}, 4, 1.25e9, 16),
    Case("gpt2-xl", 1024, {"T4": 2, "V100-32": 1}, 4, 1.25e9, 16),
    Case("llama-2-7b", 4096, {"A100-80": 4}, 2, 3.1e9, 16),
    Case("llama-2-7b", 4096, {"A100-80": 2, "V100-32": 2}, 4, 3.1e9, 32),
)


def cluster(case: Case) -> Cluster:
    """Nodes of each type at one site."""
    entries = catalog()
    kinds = [kind for kind, count in case.nodes.items() for _ in range(count)]
    network = Link(bandwidth=case.bandwidth, latency=5e-6)
    nodes = tuple(
        Node(
            name=f"n{number}",
            site="here",
            devices=(kind,) * case.per_node,
            inside=entries[kind].inside,
            network=network,
        )
        for number, kind in enumerate(kinds)
    )
    types = {kind: entries[kind].type for kind in case.nodes}
    return Cluster(name="nodes", types=types, nodes=nodes, sites=(Site(name="here"),))


def planned(
    graph: LayerGraph, where: Cluster, job: Job, forbidden: tuple[str, ...]
) -> tuple[str, float, float]:
    """The plan in one line, its step, and the CPU seconds of the search."""
    began = time.process_time()
    plan = find_plan(graph, where, job, forbidden=forbidden)
    assert plan.prediction is not None
    return describe_plan(plan), plan.prediction.step_seconds, time.process_time() - began


def main() -> None:
    """A line for each case."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--case", type=int, nargs="+", default=list(range(len(CASES))))
    print(ROW.format(*COLUMNS))
    for number in options.parse_args().case:
        case = CASES[number]
        graph = load_model(case.model, case.sequence, "fp16")
        job = Job(global_batch=case.rows, sequence=case.sequence, precision="fp16")
        (_, before, spent), (plan, after, then) = (
            planned(graph, cluster(case), job, forbidden) for forbidden in (("virtual-stages",), ())
        )
        devices = " + ".join(
            f"{count * case.per_node} {kind}" for kind, count in case.nodes.items()
        )
        print(
            ROW.format(
                number,
                case.model,
                devices,
                case.rows,
                f"{before:.4g}",
                f"{after:.4g}",
                f"{before / after - 1:.1%}",
                f"{spent:.1f}",
                f"{then:.1f}",
                plan if len(plan) < 70 else plan[:67] + "...",
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
