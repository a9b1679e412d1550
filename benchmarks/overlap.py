"""End to end: overlap-friendly (eager) 1F1B against plain 1F1B, on GPT-3-like models and on
U-Transformers, whose stages exchange many skip connections.

    python benchmarks/overlap.py                 # simulated, on the paper's cluster
    python benchmarks/overlap.py --run [--turns 3] [--work DIR]   # scaled down, on a testbed (root)

The paper is "On Optimizing the Communication of Model Parallelism" (arXiv 2211.05322); its cluster
are AWS p3.8xlarge hosts of four V100 with 10 Gbit/s between them. Sizes, batches and the number of
micro-batches of the U-Transformers are those that its authors' repository states for their U-Nets;
where the paper's (data, tensor, pipeline) widths are not known, several are shown.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import median

from overlap_methods import Way, step_seconds
from testbed_cases import HERE, Known, Place, Setting, Suite, expected_seconds, say

from meshwright.cluster.files import cluster_from
from meshwright.cluster.spec import Cluster, Precision, devices_of
from meshwright.cost.memory import device_memory, total_bytes
from meshwright.model.config import NAMED, LanguageModel
from meshwright.model.load import load_model
from meshwright.model.spec import LayerGraph, num_parameters
from meshwright.model.transformer.counted_graph import counted_graph
from meshwright.plan.spec import BoundaryKind, Job, Pipeline, Plan, PlanInput, ScheduleName, Stage

SEQUENCE = 1024


def gpt3(name: str, width: int, layers: int) -> LanguageModel:
    """GPT-3-like, in the sizes of the authors' repository."""
    numbers = {"width": width, "layers": layers, "heads": 32, "kv_heads": 32, "head": width // 32}
    return replace(NAMED["gpt2"], name=name, vocabulary=51200, hidden=4 * width, **numbers)


@dataclass(frozen=True)
class Case:
    """A model as the paper trains it; stages recompute, as its authors' runs do."""

    model: str
    precision: Precision
    batch: int
    micro_batches: int
    per_node: int
    """Devices of each host in use."""
    data: int
    tensor: int
    stages: int
    paper: float
    """Throughput of the paper's system over that of the same without overlap."""

    @property
    def nodes(self) -> int:
        return self.data * self.tensor * self.stages // self.per_node


CASES = (
    Case("gpt3-1.3b", "fp16", 1024, 64, 4, 2, 2, 2, 1.1),
    Case("gpt3-1.3b", "fp16", 1024, 64, 4, 4, 1, 2, 1.1),
    Case("gpt3-2.6b", "fp16", 1024, 64, 4, 2, 2, 2, 1.1),
    Case("gpt3-2.6b", "fp16", 1024, 64, 4, 2, 1, 4, 1.1),
    Case("u-transformer-1b", "fp32", 2048, 32, 2, 2, 1, 2, 1.5),
    Case("u-transformer-1b", "fp32", 2048, 32, 2, 1, 2, 2, 1.5),
    Case("u-transformer-2b", "fp32", 2048, 32, 4, 4, 1, 2, 1.5),
    Case("u-transformer-2b", "fp32", 2048, 32, 4, 2, 2, 2, 1.5),
)
GPT3 = {model.name: model for model in (gpt3("gpt3-1.3b", 2048, 24), gpt3("gpt3-2.6b", 2560, 32))}

METHODS: dict[str, tuple[ScheduleName, BoundaryKind, Way]] = {
    "send/receive": ("1f1b", "direct", "blocking"),
    "all-gather": ("1f1b", "scatter_gather", "blocking"),
    "broadcast": ("1f1b", "broadcast", "blocking"),
    "posted": ("1f1b", "broadcast", "posted"),
    "eager": ("eager-1f1b", "broadcast", "posted"),
    "free": ("eager-1f1b", "direct", "free"),
}
"""The first three stop for communication, as the paper's baselines do; `all-gather` is its Alpa."""


def graph_of(case: Case) -> LayerGraph:
    """The case's model as the planner sees it."""
    if case.model in GPT3:
        return counted_graph(GPT3[case.model], SEQUENCE, case.precision)
    return load_model(case.model, SEQUENCE, case.precision)


def paper_cluster(case: Case) -> Cluster:
    """As many of the paper's hosts as the case takes."""
    node = {"name": "host", "count": case.nodes, "devices": [f"{case.per_node} x V100-16"]}
    network = {"bandwidth": "10 Gbit/s", "latency": "50 us"}
    data = {"format": 1, "name": "p3.8xlarge", "links": {"network": network}, "node": [node]}
    return cluster_from(data, source="p3.8xlarge")


def cut_evenly(graph: LayerGraph, stages: int) -> tuple[tuple[int, int], ...]:
    """Layers of stages with nearly equal FLOPs."""
    done = [*accumulate(layer.forward_flops + layer.attention_flops for layer in graph.layers)]
    inner = [
        min(range(1, len(done)), key=lambda cut, s=s: abs(done[cut - 1] - done[-1] * s / stages))
        for s in range(1, stages)
    ]
    return tuple(pairwise((0, *inner, len(done))))


def pipeline_of(
    graph: LayerGraph, job: Job, micro_batches: int, groups: Sequence[Sequence[tuple[str, ...]]],
    *, recompute: bool,
) -> Plan:  # fmt: skip
    """A plan of one pipeline, whose stages are groups of replicas."""
    stages = tuple(
        Stage(layers=layers, devices=tuple(group), recompute=recompute)
        for layers, group in zip(cut_evenly(graph, len(groups)), groups, strict=True)
    )
    rows = job.global_batch // micro_batches
    return Plan(
        name=graph.name,
        model=PlanInput(name=graph.name, fingerprint=""),
        cluster=PlanInput(name="", fingerprint=""),
        job=job,
        devices=tuple(device for group in groups for replica in group for device in replica),
        pipelines=(Pipeline(micro_batches=micro_batches, rows=rows, stages=stages),),
    )


def plan_of(case: Case, graph: LayerGraph, cluster: Cluster) -> Plan:
    """The case's plan, in order 1F1B with direct boundaries."""
    names = [device.name for device in devices_of(cluster)]
    width = case.data * case.tensor
    groups = [
        [tuple(names[s * width + r * case.tensor :][: case.tensor]) for r in range(case.data)]
        for s in range(case.stages)
    ]
    job = Job(global_batch=case.batch, sequence=SEQUENCE, precision=case.precision, optimizer="sgd")
    return pipeline_of(graph, job, case.micro_batches, groups, recompute=True)


def crossing(plan: Plan, schedule: ScheduleName, boundary: BoundaryKind) -> Plan:
    """The plan in another order, with other boundaries."""
    (pipeline,) = plan.pipelines
    first, *others = pipeline.stages
    stages = (first, *(replace(stage, boundary=boundary) for stage in others))
    return replace(plan, schedule=schedule, pipelines=(replace(pipeline, stages=stages),))


def simulate() -> None:
    """Every case by every method, as a table."""
    columns = (*METHODS, "ours / Alpa", "paper", "eager / posted", "of free", "memory")
    say(f"{'model':17}{'parameters':>11}  {'dp tp pp':9}" + "".join(f"{c:>15}" for c in columns))
    for case in CASES:
        graph, cluster = graph_of(case), paper_cluster(case)
        base = plan_of(case, graph, cluster)
        took, fullest = {}, 0.0
        for method, (schedule, boundary, way) in METHODS.items():
            plan = crossing(base, schedule, boundary)
            took[method] = step_seconds(plan, graph, cluster, way)
            each = device_memory(plan, graph, cluster)
            fullest = max(fullest, *(total_bytes(m) / m.capacity for m in each))
        size = f"{num_parameters(graph) / 1e9:10.2f}B"
        cells = [f"{each:.2f}" for each in took.values()]
        cells.append(f"{took['all-gather'] / took['eager']:.2f}x")
        cells.append(f"{case.paper}x")
        cells.append(f"{took['posted'] / took['eager']:.2f}x")
        cells += [f"{took['free'] / took['eager']:.1%}", f"{fullest:.0%}"]
        widths = f"{case.data:2} {case.tensor:2} {case.stages:2}"
        say(f"{case.model:17}{size}  {widths:9}" + "".join(f"{cell:>15}" for cell in cells))


@dataclass(frozen=True)
class Trial:
    """A small model that really runs: stage by stage the devices of one node, as replicas."""

    setting: Setting
    micro_batches: int


TWO = Place("two", (("a", "1 x fast", 40, "main"), ("b", "1 x fast", 40, "main")))
UNLIKE = Place("unlike", (("a", "2 x mid", 40, "main"), ("b", "1 x fast", 40, "main")))
FOUR = Place("four", tuple((name, "1 x fast", 60, "main") for name in "abcd"))
TRIALS = (
    Trial(Setting(TWO, "virtual", "u-transformer", 32), 16),
    Trial(Setting(UNLIKE, "virtual", "u-transformer", 32), 16),
    Trial(Setting(FOUR, "virtual", "u-transformer", 32), 16),
    Trial(Setting(TWO, "virtual", "gpt", 32), 16),
)
TURNS: tuple[ScheduleName, ...] = ("1f1b", "eager-1f1b")


def small_plan(trial: Trial, known: Known) -> Plan:
    """One stage on each node."""
    nodes: dict[str, list[tuple[str, ...]]] = {}
    for device in devices_of(known.cluster):
        nodes.setdefault(device.node, []).append((device.name,))
    groups = list(nodes.values())
    return pipeline_of(known.graph, known.job, trial.micro_batches, groups, recompute=False)


def run(suite: Suite, turns: int) -> None:
    """Every trial, the orders in turn: measured steps beside predicted ones."""
    say(f"{'trial':32}" + "".join(f"{s:>12}{'predicted':>10}" for s in TURNS)
        + f"{'gain':>8}{'predicted':>10}")  # fmt: skip
    for trial in TRIALS:
        known = suite.known(trial.setting)
        plans = {s: crossing(small_plan(trial, known), s, "direct") for s in TURNS}
        lines = [
            (s, suite.measure(known, f"{s}, turn {turn}", plan))
            for turn in range(turns)
            for s, plan in plans.items()
        ]
        measured = {s: median([line["measured"] for t, line in lines if t == s]) for s in TURNS}
        expected = {s: expected_seconds(known, plan) for s, plan in plans.items()}
        gains = [each["1f1b"] / each["eager-1f1b"] for each in (measured, expected)]
        say(f"{trial.setting.key:32}"
            + "".join(f"{measured[s]:12.3f}{expected[s]:10.3f}" for s in TURNS)
            + f"{gains[0]:7.2f}x{gains[1]:9.2f}x")  # fmt: skip


def main() -> None:
    """Simulate, or run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", action="store_true", help="measure instead, on a testbed")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("runs/overlap"))
    parser.add_argument("--foreign", type=float, default=0.1, help="of the machine; 1: never mind")
    parser.add_argument("--attempts", type=int, default=2)
    options = parser.parse_args()
    if not options.run:
        simulate()
        return
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    suite = Suite(options.work, foreign_share=options.foreign, attempts=options.attempts)
    try:
        run(suite, options.turns)
    finally:
        suite.close()


if __name__ == "__main__":
    main()
