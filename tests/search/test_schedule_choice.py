"""The last choice of the search: orders of work, timed as the simulator does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.cluster.files import load_cluster
from meshwright.cluster.spec import Cluster
from meshwright.cost.memory import device_memory
from meshwright.cost.pricing import price_program
from meshwright.cost.profile import Profile
from meshwright.errors import PlanError
from meshwright.export.pipelining import schedule_csv, with_schedule
from meshwright.model.load import load_model
from meshwright.model.spec import LayerGraph
from meshwright.plan.spec import Job, Plan
from meshwright.plan.validate import validate_plan
from meshwright.program.check import check_program
from meshwright.program.codes import to_codes
from meshwright.program.compile import compile_plan
from meshwright.program.instructions import format_program, parse_program
from meshwright.program.operations import Op
from meshwright.program.orders import orders_of
from meshwright.program.schedules import schedule_orders
from meshwright.program.work import seconds
from meshwright.search.costs import costs_of
from meshwright.search.list_scheduler.listing import NAMES
from meshwright.search.options import other_schedules
from meshwright.search.options.other_schedules import in_listed_order
from meshwright.search.planner import find_plan
from meshwright.search.quick_clock import pipeline_works
from meshwright.simulate.simulator import simulate_plan
from meshwright.simulate.symmetry import simulate_by_symmetry
from plain_constants import PLAINLY
from soaks import portion
from worlds import chain, even_plan, one_node

EXAMPLES = Path(__file__).parents[2] / "examples"

CLUSTER = one_node(6, bandwidth=1e12, latency=3e-3)
"""Slow transfers that do not slow each other down."""


def uneven(count: int = 4) -> LayerGraph:
    return chain([3.0, 1.0, 2.0, 1.0, 3.0, 0.5, 1.0, 1.0][:count])


def pipeline(model: LayerGraph, stages: int, micro_batches: int, schedule: str = "1f1b") -> Plan:
    plan = even_plan(model, CLUSTER, stages=stages, micro_batches=micro_batches)
    job = replace(plan.job, sequence=model.sequence)
    return replace(plan, schedule=schedule, job=job)


def virtual(schedule: str, groups: int, micro_batches: int) -> Plan:
    """Two stages of one layer on each device."""
    model = uneven(2 * groups)
    plan = pipeline(model, 2 * groups, micro_batches)
    devices = [stage.devices for stage in plan.pipelines[0].stages[:groups]]
    turned = devices[::-1] if schedule == "zb-v" else devices
    stages = tuple(
        replace(stage, devices=place)
        for stage, place in zip(plan.pipelines[0].stages, [*devices, *turned], strict=True)
    )
    pipelines = (replace(plan.pipelines[0], stages=stages),)
    names = tuple(place[0][0] for place in devices)
    return replace(plan, schedule=schedule, devices=names, pipelines=pipelines)


def compute_end(
    plan: Plan, model: LayerGraph, where: Cluster = CLUSTER, profile: Profile | None = None
) -> float:
    timeline = simulate_plan(plan, model, where, profile)
    kinds = (Op.FORWARD, Op.BACKWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT)
    return max(i.end_seconds for i in timeline.intervals if i.op in kinds)


@settings(deadline=None, max_examples=portion(25))
@given(
    schedule=st.sampled_from([n for n in NAMES if n != "zb-v" and "interleaved" not in n]),
    stages=st.integers(2, 4),
    micro_batches=st.integers(1, 7),
)
def test_the_quick_clock_agrees_with_the_simulator(schedule, stages, micro_batches):
    model = uneven(stages)
    plan = pipeline(model, stages, micro_batches, schedule)
    validate_plan(plan, model)
    check_program(compile_plan(plan, model))
    work = pipeline_works(plan, costs_of(model, CLUSTER, plan.job, None))[0]
    quick = seconds(work, to_codes(schedule_orders(schedule, work.layout, micro_batches)))
    assert quick == pytest.approx(compute_end(plan, model), rel=1e-9)


SLOW_MEMORY = replace(
    CLUSTER, types={"g": replace(CLUSTER.types["g"], memory_bandwidth=3e10, memory_efficiency=1.0)}
)
"""Devices that read and write weights about as long as they compute."""


def heavy(stages: int) -> LayerGraph:
    """Layers of three million parameters each."""
    graph = uneven(stages)
    layers = tuple(
        replace(each, parameters=3_000_000, signature=f"heavy{each.signature}")
        for each in graph.layers
    )
    return replace(graph, layers=layers)


@pytest.mark.parametrize("schedule", ["gpipe-2bp-batched", "1f1b-2bp-batched"])
@pytest.mark.parametrize("micro_batches", [1, 2, 7])
def test_the_quick_clock_knows_that_joined_weight_parts_are_quicker(schedule, micro_batches):
    model = heavy(3)
    plan = pipeline(model, 3, micro_batches, schedule)
    work = pipeline_works(plan, costs_of(model, SLOW_MEMORY, plan.job, PLAINLY))[0]
    assert all(more < 0.8 * first for more, first in zip(work.further, work.weights, strict=True))
    quick = seconds(work, to_codes(schedule_orders(schedule, work.layout, micro_batches)))
    assert quick == pytest.approx(compute_end(plan, model, SLOW_MEMORY, PLAINLY), rel=1e-9)


def test_a_listed_plan_joins_weight_parts():
    model = heavy(4)
    plan = pipeline(model, 4, 8)
    costs = costs_of(model, SLOW_MEMORY, plan.job, None)
    works = pipeline_works(plan, costs)
    made = in_listed_order(costs, plan, works, 20_000)
    assert made is not None
    texts = made.plan.pipelines[0].actions
    assert texts is not None
    assert any(":" in text for text in texts)
    single = [replace(each, further=()) for each in works]
    other = in_listed_order(costs, plan, single, 20_000)
    assert other is not None
    assert compute_end(made.plan, model, SLOW_MEMORY) <= compute_end(other.plan, model, SLOW_MEMORY)


@pytest.mark.parametrize("schedule", ["zb-v", "interleaved-1f1b", "interleaved-1f1b-2bp-batched"])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_virtual_stages_compile_to_a_sound_program(schedule, groups):
    plan = virtual(schedule, groups, 6)
    model = uneven(2 * groups)
    validate_plan(plan, model)
    program = compile_plan(plan, model)
    check_program(program)
    assert parse_program(format_program(program)) == program
    whole = simulate_plan(plan, model, CLUSTER)
    assert simulate_by_symmetry(plan, model, CLUSTER).step_seconds == pytest.approx(
        whole.step_seconds
    )
    passes = [i for i in program.ranks[0] if i.op in (Op.SEND_F, Op.SEND_B)]
    assert bool(passes) == (groups > 1)


@pytest.mark.parametrize("schedule", ["1f1b", "zb-v"])
def test_virtual_stages_ask_for_a_schedule_that_plays_them(schedule):
    plan = replace(virtual("interleaved-1f1b", 2, 4), schedule=schedule)
    with pytest.raises(PlanError, match="again"):
        validate_plan(plan, uneven())


@settings(deadline=None, max_examples=portion(20))
@given(stages=st.integers(2, 4), micro_batches=st.integers(1, 6))
def test_a_listed_plan_runs_as_it_was_timed_and_is_never_behind(stages, micro_batches):
    model = uneven(stages)
    plan = pipeline(model, stages, micro_batches)
    costs = costs_of(model, CLUSTER, plan.job, None)
    made = in_listed_order(costs, plan, pipeline_works(plan, costs), 20_000)
    assert made is not None
    listed = made.plan
    validate_plan(listed, model)
    check_program(compile_plan(listed, model))
    took = compute_end(listed, model)
    for name in NAMES:
        if name != "zb-v" and "interleaved" not in name:
            assert took <= compute_end(replace(plan, schedule=name), model) * (1 + 1e-9)


def test_memory_of_a_plan_is_the_high_water_mark_of_its_simulated_step():
    model = uneven()
    for schedule in ("gpipe", "1f1b", "1f1b-2bp-batched", "zb-h1", "zb-h2"):
        plan = pipeline(model, 4, 8, schedule)
        program = compile_plan(plan, model)
        static = price_program(program, plan, model, CLUSTER).static_bytes
        timeline = simulate_plan(plan, model, CLUSTER)
        for rank, memory in enumerate(device_memory(plan, model, CLUSTER)):
            most = max(p.bytes for p in timeline.memory if p.rank == rank) - static[rank]
            assert memory.activations == pytest.approx(most, abs=2)


@pytest.mark.heavy
def test_the_search_takes_the_order_that_suits_the_plan():
    model = uneven(8)
    job = replace(pipeline(model, 4, 8).job, global_batch=16)
    found = find_plan(model, CLUSTER, job)
    assert found == find_plan(model, CLUSTER, job)
    validate_plan(found, model, CLUSTER)
    check_program(compile_plan(found, model))
    assert found.prediction is not None
    rivals = [r.step_seconds for r in found.prediction.runners_up if r.step_seconds is not None]
    assert found.prediction.step_seconds <= min(rivals, default=float("inf")) * (1 + 2e-3)


@pytest.mark.slow
def test_an_order_that_leaves_messages_more_time_wins_where_they_meet(monkeypatch):
    graph = load_model("gpt2-medium", 1024, "fp16")
    where = load_cluster(EXAMPLES / "clusters" / "v100-16.toml")
    todo = Job(global_batch=64, sequence=1024, precision="fp16", optimizer="adamw")

    def step_seconds() -> float:
        plan = find_plan(graph, where, todo)
        assert plan.prediction is not None
        return plan.prediction.step_seconds

    with_margins = step_seconds()
    monkeypatch.setattr(other_schedules, "MARGINS", ())
    assert with_margins < 0.99 * step_seconds()


@pytest.mark.parametrize("schedule", ["gpipe", "eager-1f1b-2bp", "zb-h1"])
def test_csv_and_back_is_the_same_order(schedule):
    plan = pipeline(uneven(), 4, 5, schedule)
    text = schedule_csv(orders_of(plan, 0))
    back = with_schedule(plan, [text], ["schedule.csv"])
    assert orders_of(back, 0) == orders_of(plan, 0)
    virtually = virtual("zb-v", 2, 5)
    text = schedule_csv(orders_of(virtually, 0))
    assert orders_of(with_schedule(virtually, [text], ["v.csv"]), 0) == orders_of(virtually, 0)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("0F0,0B0\n", "line"),
        ("0F0,0B0\n1F0,1B0,1SEND_F0\n", "line 2, word 2"),
        ("0F0,0B0\n0F0,1B0\n", "stages of its devices: 1"),
        ("0F0\n1F0,1B0\n", "no B0"),
    ],
)
def test_a_csv_that_cannot_be_played_is_refused_by_line(text, wanted):
    with pytest.raises(PlanError) as caught:
        with_schedule(pipeline(uneven(2), 2, 1), [text], ["s.csv"])
    assert wanted in str(caught.value)
