"""PyTorch's own systems as rivals on emulated clusters: DDP, FSDP2, torch.distributed.pipelining.

Each comes with the plan of ours that is most like it: who holds which layers, how many rows make a
micro-batch. The simulator's step of that plan chooses micro-batches and the shapes of pipelines;
what is chosen is measured. DDP and FSDP take a rank's rows as one micro-batch: a layer's seconds
are a constant and so much for each row, and with several micro-batches only the last backward
overlaps with sums, or parameters are gathered again for each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise, product

from testbed_cases import Known, expected_seconds

from meshwright.plan.spec import Plan, Stage
from meshwright.search.baselines import BASELINES, even_bounds
from meshwright.search.candidate import CandidatePipeline, plan_of
from meshwright.search.costs import Costs

CHUNKS = (2, 3, 4)
"""Stages on each device, of interleaved pipelines."""
PIPELINES = 2
"""Of each schedule that are measured: those that promise most, of unlike widths."""


@dataclass(frozen=True, slots=True)
class Rival:
    """Who runs what."""

    name: str
    plan: Plan
    job: dict = field(default_factory=dict)
    """What its ranks are told; without a `system` our own runtime runs it."""


def torch_rivals(known: Known) -> list[Rival]:
    """Every system, each with its best micro-batch."""
    return [*replicated(known), *pipelined(known)]


def replicated(known: Known) -> Iterator[Rival]:
    """DDP, with its own buckets and with small ones, which overlap more; FSDP2 over all devices, or
    inside nodes with sums across them (hybrid), with parameters let go after the forward (ZeRO 3),
    or kept for the backward (ZeRO 2)."""
    costs = known.costs
    whole_share = [each for each in BASELINES["ddp"](costs) if each.micro_batches == 1]
    if not whole_share:
        return
    plan = plan_of(costs, whole_share, "1f1b")
    for name, megabytes in (("torch-ddp", 25), ("torch-ddp-1mb", 1)):
        yield Rival(name, plan, {"system": "ddp", "bucket_mb": megabytes})
    sizes = {len(node.devices) for node in known.cluster.nodes}
    for hybrid, reshard in product((False, True), (True, False)):
        if hybrid and (len(sizes) > 1 or len(known.cluster.nodes) == 1 or sizes == {1}):
            continue
        name = f"torch-{'hybrid' if hybrid else 'fsdp'}-{'zero3' if reshard else 'zero2'}"
        yield Rival(name, plan, {"system": "fsdp", "hybrid": hybrid, "reshard": reshard})


def pipelined(known: Known) -> Iterator[Rival]:
    """1F1B and interleaved 1F1B over any number of stages, replicas beside them, equally many
    blocks in each stage; where stages have several replicas, under DDP and under `replicate`."""
    costs = known.costs
    even = [each for each in BASELINES["even"](costs) if each.micro_batches >= len(each.stages) > 1]
    interleaved = [_interleaved(costs, each, chunks) for each in even for chunks in CHUNKS]
    for schedule, plans in (
        ("1f1b", [plan_of(costs, (each,), "1f1b") for each in even]),
        ("interleaved", [plan for plan in interleaved if plan is not None]),
    ):
        for n, plan in enumerate(_best(known, plans)):
            several = len(plan.pipelines[0].stages[0].devices) > 1
            for replicas in ("ddp", "replicate") if several else ("",):
                name = f"torch-{schedule}-{n}" + (f"-{replicas}" if several else "")
                yield Rival(name, plan, {"system": "pipelining", "replicas": replicas})


def _interleaved(costs: Costs, even: CandidatePipeline, chunks: int) -> Plan | None:
    """The grid with `chunks` stages on each device; None where there are too few blocks, or the
    micro-batches do not make rounds of one size, as PyTorch wants."""
    groups, count = len(even.stages), even.micro_batches
    bounds = even_bounds(costs, groups * chunks)
    if bounds is None or count % (count // groups):
        return None
    plan = plan_of(costs, (even,), "1f1b")
    (pipeline,) = plan.pipelines
    stages = tuple(
        Stage(layers=layers, devices=pipeline.stages[n % groups].devices)
        for n, layers in enumerate(pairwise(bounds))
    )
    dealt = replace(pipeline, stages=stages)
    return replace(plan, schedule="interleaved-1f1b", pipelines=(dealt,))


def _best(known: Known, plans: list[Plan]) -> list[Plan]:
    """The fastest of each width by the simulator; of these the first few."""
    fastest: dict[int, Plan] = {}
    for plan in sorted(plans, key=lambda plan: expected_seconds(known, plan)):
        fastest.setdefault(len(plan.pipelines[0].stages[0].devices), plan)
    return list(fastest.values())[:PIPELINES]
