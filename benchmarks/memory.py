"""Predicted peak memory of one rank against the runtime's own step on fake tensors.

    python benchmarks/memory.py [--json OUT]

Every configuration is a model, a plan and one of its ranks. "trace" predicts from the traced
module, "formulas" from the model's numbers alone, as the planner does for named models; "measured"
is the most that torch's MemTracker counts while that rank plays two optimizer steps of the plan's
program (see rehearsal.py). What a process holds beside tensors (CUDA context, allocator) is left
out of both sides.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import torch
from rehearsal import measured_peak
from torch import nn

from meshwright.cluster.spec import Cluster, DeviceType, Link, Node, Precision, Site
from meshwright.cost.in_flight import peak_activation_bytes, scheduled_stages
from meshwright.cost.memory import device_memory, framework_bytes
from meshwright.model.config import LanguageModel
from meshwright.model.spec import LayerGraph
from meshwright.model.trace import trace
from meshwright.model.transformer.counted_graph import counted_graph
from meshwright.model.zoo.build import from_language_model
from meshwright.plan.spec import Job, Pipeline, Plan, PlanInput, ScheduleName, Stage

PARTS = ("parameters", "gradients", "optimizer", "activations", "buffers")


def model(name: str, family: str, width: int, layers: int, vocabulary: int) -> LanguageModel:
    """A model of a family with usual proportions."""
    heads = width // 32 if width < 512 else width // 64
    gated = family != "gpt2"
    return LanguageModel(
        name=name,
        family=family,  # type: ignore[arg-type]
        vocabulary=vocabulary,
        positions=1024,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=heads // 2 if gated else heads,
        head=width // heads,
        hidden=(width * 8 // 3 // 64 * 64 if family == "llama" else width * 2) if gated
        else 4 * width,
        tied=not gated,
        experts=4 if family == "mixtral" else 0,
        chosen=2 if family == "mixtral" else 0,
    )  # fmt: skip


MODELS = {
    one.name: one
    for one in (
        model("gpt-7M", "gpt2", 256, 6, 8000),
        model("gpt-89M", "gpt2", 768, 8, 40000),
        model("llama-9M", "llama", 256, 6, 8000),
        model("llama-103M", "llama", 768, 8, 32000),
        model("mixtral-11M", "mixtral", 256, 4, 8000),
        model("mixtral-92M", "mixtral", 512, 8, 16000),
    )
}


@dataclass(frozen=True)
class Case:
    """One rank of one plan."""

    model: str
    precision: Precision
    optimizer: str
    sequence: int
    rows: int
    """Of each micro-batch, on each replica."""
    stage: int = 0
    stages: int = 1
    tensor: int = 1
    data: int = 1
    micro_batches: int = 2
    schedule: ScheduleName = "1f1b"
    recompute: bool = False
    chunks: int = 1
    """Stages that each of them really is: dealt out in turn, with zb-v down and back up."""


FAST = (
    Case("gpt-7M", "fp32", "adamw", 256, 4),
    Case("gpt-7M", "bf16", "adamw", 256, 2, 1, 3, 2, 1, 4),
    Case("llama-9M", "bf16", "sgd", 128, 1, 0, 2, 1, 2, 4),
    Case("llama-9M", "fp32", "adamw", 256, 4, 2, 3, 2, 1, 4),
    Case("mixtral-11M", "bf16", "adamw", 128, 4, 1, 2, 1, 1, 3, "gpipe"),
    Case("llama-9M", "bf16", "adamw", 256, 2, 1, 3, 1, 1, 4, recompute=True),
    Case("llama-9M", "bf16", "adamw", 256, 4, 0, 2, 1, 1, 4, "interleaved-1f1b", chunks=2),
    Case("gpt-7M", "bf16", "adamw", 256, 4, 0, 2, 1, 1, 4, "zb-v", chunks=2),
)
SLOW = (
    Case("gpt-7M", "bf16", "sgd", 64, 1, 0, 2, 4, 2, 4),
    Case("gpt-7M", "fp32", "sgd", 512, 8, 0, 4, 1, 1, 8),
    Case("gpt-89M", "fp32", "adamw", 256, 1),
    Case("gpt-89M", "bf16", "adamw", 1024, 4),
    Case("gpt-89M", "bf16", "adamw", 512, 2, 0, 4, 1, 1, 8),
    Case("gpt-89M", "bf16", "adamw", 512, 2, 3, 4, 1, 1, 8),
    Case("gpt-89M", "fp32", "adamw", 512, 4, 1, 2, 4, 1, 4),
    Case("gpt-89M", "bf16", "adamw", 512, 4, 1, 3, 2, 1, 6, "gpipe"),
    Case("llama-9M", "fp32", "sgd", 256, 2, 0, 1, 4, 1, 1),
    Case("llama-9M", "bf16", "adamw", 64, 1, 1, 3, 1, 1, 4),
    Case("llama-103M", "fp32", "adamw", 512, 2),
    Case("llama-103M", "bf16", "adamw", 1024, 8, 0, 2, 2, 2, 4),
    Case("llama-103M", "bf16", "adamw", 512, 1, 0, 4, 1, 1, 8),
    Case("llama-103M", "bf16", "sgd", 512, 2, 2, 4, 2, 1, 8, "gpipe"),
    Case("llama-103M", "fp32", "adamw", 256, 4, 1, 2, 2, 1, 4),
    Case("mixtral-11M", "fp32", "adamw", 256, 4, 0, 1, 2, 1, 2),
    Case("mixtral-11M", "bf16", "sgd", 64, 1, 1, 2, 2, 1, 4),
    Case("mixtral-92M", "fp32", "adamw", 512, 2, 0, 2, 1, 1, 4),
    Case("mixtral-92M", "bf16", "adamw", 512, 4, 1, 4, 1, 1, 8),
    Case("mixtral-92M", "bf16", "adamw", 1024, 2, 3, 4, 4, 1, 8),
    Case("mixtral-92M", "bf16", "sgd", 256, 8),
    Case("gpt-89M", "bf16", "adamw", 1024, 4, 0, 2, 1, 1, 4, recompute=True),
    Case("gpt-89M", "fp32", "adamw", 512, 4, 1, 2, 2, 1, 4, recompute=True),
    Case("llama-103M", "bf16", "adamw", 512, 8, 1, 4, 1, 1, 8, recompute=True),
    Case("mixtral-92M", "bf16", "sgd", 256, 8, 0, 3, 2, 1, 6, "gpipe", recompute=True),
    Case("gpt-7M", "bf16", "adamw", 256, 4, 1, 2, 1, 1, 4, "1f1b-2bp"),
    Case("gpt-7M", "fp32", "adamw", 256, 4, 1, 3, 1, 1, 4, "zb-h2"),
    Case("gpt-89M", "bf16", "adamw", 512, 2, 0, 2, 1, 1, 8, "interleaved-1f1b", chunks=2),
    Case("gpt-89M", "bf16", "adamw", 512, 2, 1, 2, 1, 1, 8, "interleaved-1f1b", chunks=4),
    Case("gpt-89M", "fp32", "adamw", 512, 4, 0, 4, 1, 1, 8, "zb-v", chunks=2),
    Case("gpt-89M", "bf16", "adamw", 512, 2, 1, 4, 1, 1, 8, "zb-v", chunks=2),
    Case("llama-103M", "bf16", "adamw", 512, 2, 2, 4, 1, 1, 8, "interleaved-1f1b", chunks=2),
    Case("mixtral-11M", "bf16", "sgd", 128, 4, 0, 2, 1, 1, 3, "zb-v", chunks=2),
)


@dataclass(frozen=True)
class Result:
    """Bytes of one case."""

    case: Case
    measured: int
    trace: float
    formulas: float
    parts: dict[str, float]
    """Of the prediction from the trace."""

    def error(self, predicted: float) -> float:
        """Relative; below 0 the prediction is too low."""
        return predicted / self.measured - 1


def plan_of(case: Case, layers: int) -> Plan:
    """Equal stages, each on data x tensor devices."""
    number = case.stages * case.chunks
    cuts = [round(layers * s / number) for s in range(number + 1)]
    devices = [f"n:{n}" for n in range(case.stages * case.data * case.tensor)]
    names = iter(devices)
    mesh = [
        tuple(tuple(next(names) for _ in range(case.tensor)) for _ in range(case.data))
        for _ in range(case.stages)
    ]
    turned = mesh[::-1] if case.schedule == "zb-v" else mesh
    places = [(mesh, turned)[c % 2][s] for c in range(case.chunks) for s in range(case.stages)]
    stages = tuple(
        Stage(layers=(cuts[s], cuts[s + 1]), devices=place, recompute=case.recompute)
        for s, place in enumerate(places)
    )
    rows = case.rows * case.data
    return Plan(
        name="p",
        model=PlanInput(name=case.model, fingerprint=""),
        cluster=PlanInput(name="n", fingerprint=""),
        job=Job(
            global_batch=rows * case.micro_batches,
            sequence=case.sequence,
            precision=case.precision,
            optimizer=case.optimizer,  # type: ignore[arg-type]
        ),
        schedule=case.schedule,
        devices=tuple(devices),
        pipelines=(Pipeline(micro_batches=case.micro_batches, rows=rows, stages=stages),),
    )


DEVICE = DeviceType(
    name="any",
    memory=1 << 40,
    memory_bandwidth=1e12,
    peak={"fp32": 1e12, "bf16": 1e12},
    matmul_efficiency=1.0,
    attention_efficiency=1.0,
    memory_efficiency=1.0,
)
"""Memory does not depend on its speed."""


def rank_of(case: Case) -> int:
    """The first of the first replica."""
    return case.stage * case.data * case.tensor


def predicted(case: Case, graph: LayerGraph, plan: Plan) -> dict[str, float]:
    """Bytes by kind, without what the framework takes."""
    link = Link(bandwidth=1e12, latency=0.0)
    kinds = (DEVICE.name,) * len(plan.devices)
    node = Node(name="n", site="s", devices=kinds, inside=link, network=link)
    types = {DEVICE.name: DEVICE}
    cluster = Cluster(name="n", types=types, nodes=(node,), sites=(Site(name="s"),))
    found = device_memory(plan, graph, cluster)[rank_of(case)]
    parts = {part: float(getattr(found, part)) for part in PARTS}
    return {**parts, "buffers": parts["buffers"] - framework_bytes(DEVICE)}


def made(name: str) -> nn.Module:
    """The module of a model, without storage."""
    with torch.device("meta"):
        return from_language_model(MODELS[name])


def tokens_of(sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets that have only a shape."""
    tokens = torch.empty(2, sequence, dtype=torch.long, device="meta")
    return tokens, tokens


@cache
def graphs_of(name: str, precision: Precision, sequence: int) -> tuple[LayerGraph, LayerGraph]:
    """What the module's trace and the model's numbers say, once for all cases that share them."""
    traced = trace(made(name), tokens_of(sequence), precision, sequence, name)
    return traced, counted_graph(MODELS[name], sequence, precision)


def compare(case: Case, *, real: bool = False) -> Result:
    """Predict and measure, on fake tensors or on real ones."""
    graph, formulas = graphs_of(case.model, case.precision, case.sequence)
    plan = plan_of(case, len(graph.layers))
    parts = predicted(case, graph, plan)
    make, inputs = partial(made, case.model), tokens_of(case.sequence)
    return Result(
        case=case,
        measured=measured_peak(make, inputs, plan, graph, rank_of(case), real=real),
        trace=sum(parts.values()),
        formulas=sum(predicted(case, formulas, plan).values()),
        parts=parts,
    )


def held_of(case: Case) -> int:
    """Micro-batches of all its stages that a rank holds at most, between forward and backward."""
    plan = plan_of(case, case.stages * case.chunks)
    holders = [*scheduled_stages(plan)][case.stage]
    return round(peak_activation_bytes(holders, (1.0,) * case.chunks, (1.0,) * case.chunks))


def row(result: Result) -> str:
    """A line of the table."""
    c, mib = result.case, 2**20
    where = f"{c.stage + 1}/{c.stages}" + "r" * c.recompute + f"v{c.chunks}" * (c.chunks > 1)
    held = held_of(c)
    parts = " ".join(f"{result.parts[part] / mib:>7.1f}" for part in PARTS)
    return (
        f"{c.model:12}{c.precision:5}{c.optimizer:6}{c.sequence:>5}{c.rows:>3} {where:>6}{held:>3}"
        f"{c.tensor:>3} {result.measured / mib:>8.1f} {result.trace / mib:>8.1f}"
        f"{100 * result.error(result.trace):>6.1f}%{100 * result.error(result.formulas):>6.1f}%"
        f"  {parts}"
    )


def main() -> None:
    """Print the table and what it comes to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(
        "model       prec opt    seq row  stage fl tp measured    trace  error formulas"
        "   weights   grads  states activat. buffers   (MiB; fl: micro-batches in flight, "
        "r: recomputed, v: stages on each device)"
    )
    results = []
    for case in (*FAST, *SLOW):
        results.append(compare(case))
        print(row(results[-1]), flush=True)
    for name in ("trace", "formulas"):
        errors = [r.error(getattr(r, name)) for r in results]
        median = statistics.median(map(abs, errors))
        print(
            f"{name}: {len(errors)} configurations, median error {100 * median:.2f} %, "
            f"highest {100 * max(errors):+.2f} %, lowest {100 * min(errors):+.2f} %"
        )
    if options.json:
        options.json.write_text(json.dumps([asdict(r) for r in results], indent=1))


if __name__ == "__main__":
    main()
