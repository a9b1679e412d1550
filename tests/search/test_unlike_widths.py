"""Holders of one parameter may differ in tensor width, where that is faster."""

from dataclasses import replace
from pathlib import Path

import pytest

from meshwright.cluster.catalog import catalog
from meshwright.cluster.spec import Cluster, Link
from meshwright.cost.gradient_copies import copied_gradient_bytes
from meshwright.cost.gradient_copies import tensor_widths as held_widths
from meshwright.cost.priced_plan import PricedPlan
from meshwright.layout.shares import UNDIVIDED
from meshwright.model.load import load_model
from meshwright.plan.ranks import stage_placements
from meshwright.plan.spec import Job, Pipeline, Stage
from meshwright.search.candidate import CandidatePipeline, tensor_widths, tensor_widths_agree
from meshwright.search.candidate_estimate import candidate_seconds
from meshwright.search.costs import Costs, costs_of
from meshwright.search.planner import find_plan
from meshwright.search.stage_devices import StageDevices
from meshwright.simulate.simulator import simulate_plan
from worlds import DEVICE, chain, cluster, divided, job, one_node, plan_by_hand

ROOT = Path(__file__).resolve().parents[2]


def tied_model():
    """Four layers of a thousand divided parameters; the first and the last share as many."""
    model = chain([1.0, 1.0, 1.0, 1.0], tied=True)
    return replace(
        model,
        layers=tuple(divided(each, parameters=1000) for each in model.layers),
        tied=tuple(replace(each, divided=("tensor",)) for each in model.tied),
    )


def costs() -> Costs:
    return costs_of(tied_model(), one_node(8), job(4))


def pipeline(*widths: int, first: int = 0) -> CandidatePipeline:
    """A stage of one replica of each tensor width."""
    stages, at = [], first
    for width in widths:
        stages.append(StageDevices((tuple(f"n:{i}" for i in range(at, at + width)),), (1,)))
        at += width
    bounds = (0, 1, 3, 4) if len(widths) == 3 else (0, 4)
    return CandidatePipeline(tuple(stages), bounds, 4)


@pytest.mark.parametrize(
    ("widths", "agree"),
    [((1, 1, 1), True), ((1, 1, 2), True), ((2, 3, 1), True), ((2, 1, 3), False)],
)
def test_widths_of_what_layers_share_divide_the_widest(widths, agree):
    assert tensor_widths_agree(costs(), [pipeline(*widths)]) is agree


def test_widths_of_pipelines_divide_the_widest():
    assert tensor_widths_agree(costs(), [pipeline(4), pipeline(2, first=4)])
    assert not tensor_widths_agree(costs(), [pipeline(3), pipeline(2, first=3)])


@pytest.mark.parametrize("widths", [(1, 2), (4, 2), (2, 2)])
def test_sums_of_unlike_widths_are_previewed_as_they_are_simulated(widths):
    """Two pipelines of one stage, whose sums take nearly all of the step."""
    model = replace(tied_model(), tied=())
    layers = tuple(divided(replace(x, parameters=10**8), parameters=10**8) for x in model.layers)
    model, where = replace(model, layers=layers), one_node(8)
    pair = [pipeline(widths[0]), pipeline(widths[1], first=widths[0])]
    pipelines = [
        Pipeline(micro_batches=4, rows=1, stages=(Stage(layers=(0, 4), devices=s.groups),))
        for each in pair
        for s in each.stages
    ]
    plan = plan_by_hand(*pipelines, job=job(8), schedule="1f1b")
    whole = simulate_plan(plan, model, where).step_seconds
    seen = candidate_seconds(costs_of(model, where, job(8)), pair, "1f1b")
    assert seen == pytest.approx(whole, rel=0.05)


def unlike_plan(model):
    """Two replicas of all layers, one of them divided between two devices."""
    stage = Stage(layers=(0, len(model.layers)), devices=(("n:0",), ("n:1", "n:2")))
    return plan_by_hand(Pipeline(micro_batches=1, rows=2, stages=(stage,)), job=job(2))


def test_copies_of_scattered_shares_are_charged_to_their_sums():
    """A narrow replica reads and writes each byte of a share before the sum, and again after it."""
    slow = replace(DEVICE, memory_bandwidth=1e6, memory_efficiency=0.5)
    where = replace(one_node(3), types={"g": slow})
    model = tied_model()
    priced = PricedPlan(unlike_plan(model), model, where, None)
    sums = [
        (i, price.traffic.latency)
        for i, price in zip(priced.program.ranks[0], priced.prices.ranks[0], strict=True)
        if i.op.of_gradients
    ]
    assert any(i.tile == UNDIVIDED for i, _ in sums) is False
    assert {latency for i, latency in sums} == {4 * i.bytes / 5e5 for i, _ in sums}


def test_copies_of_what_layers_share_are_weighed():
    model = tied_model()
    stages = stage_placements(unlike_plan(model))
    held = held_widths(model, stages)
    narrow, wide = (copied_gradient_bytes(model, job(2), held, stages[0], w) for w in (1, 2))
    assert (narrow, wide) == (4 * (4 * 1000 + model.tied[0].parameters), 0.0)


def nodes_of_three_and_two() -> Cluster:
    """Three A100 of 40 GB, and two of 80 GB on another node."""
    kinds = ("A100-40", "A100-80")
    return cluster(
        ("A100-40",) * 3,
        ("A100-80",) * 2,
        inside=catalog()["A100-40"].inside,
        network=Link(bandwidth=12.5e9, latency=10e-6),
        types=tuple(catalog()[kind].type for kind in kinds),
    )


def test_an_embedding_is_held_at_unlike_widths_where_that_is_faster():
    """By nine per cent with two rows and one stage on each group of devices;
    `benchmarks/unlike_widths.py` has other cases."""
    model = load_model(ROOT / "examples" / "configs" / "llama-3.2-1b.json", 1024, "fp16")
    todo = Job(global_batch=2, sequence=1024, precision="fp16", optimizer="adamw")
    plan = find_plan(model, nodes_of_three_and_two(), todo, forbidden=("virtual-stages",))
    first, *_, last = plan.pipelines[0].stages
    assert len(first.devices[0]) != len(last.devices[0])
    with pytest.MonkeyPatch.context() as patch:
        for room in ("hill_climb", "incumbent"):
            patch.setattr(f"meshwright.search.{room}.tensor_widths_agree", _one_width)
        one = "meshwright.search.template_estimate.divide_the_widest"
        patch.setattr(one, lambda widths: len(widths) < 2)
        alone = find_plan(model, nodes_of_three_and_two(), todo, forbidden=("virtual-stages",))
    assert plan.prediction.step_seconds < 0.95 * alone.prediction.step_seconds


def _one_width(costs: Costs, pipelines: list[CandidatePipeline]) -> bool:
    held = tensor_widths(pipelines)
    tied = [set().union(*(held[layer] for layer in each.layers)) for each in costs.model.tied]
    alike = all(len(widths) == 1 for widths in (*held.values(), *tied))
    return alike and tensor_widths_agree(costs, pipelines)
