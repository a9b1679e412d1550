"""Divided optimizer states, worked out by hand: what is sent, what is held, what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.cluster.spec import Cluster
from meshwright.cost.memory import device_memory
from meshwright.cost.pricing import Prices, price_program
from meshwright.errors import MeshwrightError, PlanError
from meshwright.model.spec import LayerGraph, Tied
from meshwright.plan.files import load_plan, save_plan
from meshwright.plan.ranks import describe_plan
from meshwright.plan.spec import Plan, StateDivision
from meshwright.plan.validate import validate_plan
from meshwright.program.check import check_program
from meshwright.program.compile import compile_plan
from meshwright.program.instructions import Program, format_program, parse_program
from meshwright.program.operations import Op
from meshwright.simulate.critical_path import step_breakdown
from meshwright.simulate.simulator import simulate_plan
from meshwright.simulate.symmetry import find_symmetry, simulate_by_symmetry
from meshwright.techniques.data_parallel.operations import REDUCE_GRAD
from meshwright.techniques.state_division.operations import GATHER_PARAMETERS, REDUCE_SCATTER
from plain_constants import PLAINLY
from soaks import portion
from strategies import models_and_plans
from worlds import chain, divided, even_model, even_plan, one_node

DIVIDED = StateDivision(optimizer="all")


def dividing(plan: Plan, *stages: int) -> Plan:
    """The plan with the states of some stages of each pipeline divided; without numbers, of all."""
    return replace(
        plan,
        pipelines=tuple(
            replace(
                pipeline,
                stages=tuple(
                    replace(stage, states=DIVIDED) if s in stages or not stages else stage
                    for s, stage in enumerate(pipeline.stages)
                ),
            )
            for pipeline in plan.pipelines
        ),
    )


def adam(plan: Plan) -> Plan:
    return replace(plan, job=replace(plan.job, optimizer="adamw"))


def priced(plan: Plan, model: LayerGraph, cluster: Cluster) -> tuple[Program, Prices]:
    program = compile_plan(plan, model, clipped=False)
    check_program(program)
    return program, price_program(program, plan, model, cluster)


def carried(rank: int, program: Program, prices: Prices) -> dict[Op, float]:
    """The most bytes that a resource carries for each collective of a rank."""
    return {
        i.op: max(p.traffic.bytes_by_resource.values())
        for i, p in zip(program.ranks[rank], prices.ranks[rank], strict=True)
        if i.op.of_gradients or i.op is GATHER_PARAMETERS
    }


def test_scatter_and_gather_each_send_all_but_a_ranks_own_quarter() -> None:
    """A million fp32 gradients on 4 ranks: 4 MB, of which each port carries 3 MB each time, in 3 ms
    at 1 GB/s. The all-reduce that they stand for takes 6 ms."""
    model, cluster = even_model(1, parameters=1_000_000), one_node(4)
    whole = even_plan(model, cluster, data=4)
    program, prices = priced(dividing(whole), model, cluster)
    for rank in range(4):
        assert carried(rank, program, prices) == {REDUCE_SCATTER: 3e6, GATHER_PARAMETERS: 3e6}
    assert carried(0, *priced(whole, model, cluster)) == {REDUCE_GRAD: 6e6}
    # F 1 ms, B 2 ms, scatter 3 ms, update and norm in no time, gather 3 ms.
    step = simulate_plan(dividing(whole), model, cluster, PLAINLY).step_seconds
    assert step == pytest.approx(9e-3, rel=1e-3)


def test_over_gloo_a_scatter_costs_an_all_reduce() -> None:
    model, cluster = even_model(1, parameters=1_000_000), one_node(4)
    types = {"g": replace(cluster.types["g"], processor="cpu")}
    plan = dividing(even_plan(model, cluster, data=4))
    found = carried(0, *priced(plan, model, replace(cluster, types=types)))
    assert found == {REDUCE_SCATTER: 6e6, GATHER_PARAMETERS: 3e6}


@pytest.mark.parametrize(("replicas", "left"), [(2, 4000.0), (3, 8000 / 3), (4, 2000.0)])
def test_a_rank_holds_its_share_of_the_states_of_adam(replicas: int, left: float) -> None:
    """1,000 parameters have 8,000 bytes of moments; a third of them is rounded to whole bytes."""
    model, cluster = even_model(1, parameters=1000), one_node(4)
    whole = adam(even_plan(model, cluster, data=replicas))
    before, after = (device_memory(p, model, cluster) for p in (whole, dividing(whole)))
    for one, other in zip(before, after, strict=True):
        assert (one.optimizer, other.optimizer) == (8000, round(left))
        assert replace(other, optimizer=one.optimizer) == one


def test_only_the_stage_that_divides_holds_less_and_a_tied_weight_only_if_all_its_users_do() -> (
    None
):
    """Two stages of two replicas. Each layer has 1,000 parameters of its own; one of 500 is tied to
    the first and last layer, so four ranks hold it."""
    model, cluster = chain([1.0, 1.0], tied=True), one_node(4)
    whole = adam(even_plan(model, cluster, data=2, stages=2))
    held = [m.optimizer for m in device_memory(dividing(whole, 0), model, cluster)]
    assert held == [4000 + 4000] * 2 + [8000 + 4000] * 2
    held = [m.optimizer for m in device_memory(dividing(whole), model, cluster)]
    assert held == [4000 + 1000] * 4


def test_tensor_ranks_divide_what_each_of_them_holds() -> None:
    """2 replicas x 2 tensor ranks: 840 of 1,000 parameters are divided by tensor parallelism, so a
    rank holds 160 + 420 of them, and updates half of these."""
    model, cluster = even_model(1, parameters=1000), one_node(4)
    layer = divided(model.layers[0], parameters=840, units=2)
    model = replace(model, layers=(layer,))
    plan = dividing(adam(even_plan(model, cluster, data=2, tensor=2)))
    assert {m.optimizer for m in device_memory(plan, model, cluster)} == {580 * 8 // 2}


def test_what_the_simulator_holds_shrinks_by_the_same_bytes() -> None:
    model, cluster = even_model(4, parameters=1000), one_node(4)
    whole = adam(even_plan(model, cluster, data=2, stages=2))
    found = []
    for plan in (whole, dividing(whole, 1)):
        static = priced(plan, model, cluster)[1].static_bytes
        memory = device_memory(plan, model, cluster)
        found.append([a - m.optimizer for a, m in zip(static, memory, strict=True)])
    assert found[0] == found[1]


def test_each_update_is_followed_by_the_gather_of_its_own_bucket() -> None:
    """Without clipping; with it all gathers follow the only update, which follows the norm."""
    model, cluster = even_model(3, parameters=1000), one_node(2)
    plan = dividing(even_plan(model, cluster, data=2))
    program = compile_plan(plan, model, bucket_bytes=1, clipped=False)
    ends = [(i.op, i.layers) for i in program.ranks[0] if i.op.ends_step]
    assert ends == [
        (op, layers)
        for layers in ((2, 3), (1, 2), (0, 1))
        for op in (Op.OPTIMIZER_STEP, GATHER_PARAMETERS)
    ] + [(Op.REDUCE_NORM, None)]
    program = compile_plan(plan, model, bucket_bytes=1)
    ends = [i.op for i in program.ranks[0] if i.op.ends_step]
    assert ends == [Op.REDUCE_NORM, Op.OPTIMIZER_STEP, *[GATHER_PARAMETERS] * 3]


def test_an_update_takes_as_long_as_the_share_that_it_updates() -> None:
    """A stage of two replicas halves it; with two buckets of which one is divided by none, it does
    not."""
    model, cluster = even_model(2, parameters=10_000_000), one_node(4)
    slow = {"g": replace(cluster.types["g"], memory_bandwidth=1e9)}
    cluster = replace(cluster, types=slow)
    whole = adam(even_plan(model, cluster, data=2, stages=2))
    seconds = [
        [
            sum(p.seconds for i, p in zip(*rank, strict=True) if i.op is Op.OPTIMIZER_STEP)
            for rank in zip(program.ranks, prices.ranks, strict=True)
        ]
        for program, prices in (priced(p, model, cluster) for p in (whole, dividing(whole, 0)))
    ]
    assert seconds[1][:2] == pytest.approx([each / 2 for each in seconds[0][:2]])
    assert seconds[1][2:] == seconds[0][2:]


@given(models_and_plans())
def test_where_widths_are_equal_any_plan_can_divide_and_its_program_is_sound(case) -> None:
    model, plan = case
    divided = dividing(plan)
    try:
        validate_plan(divided, model)
    except PlanError as refusal:
        found = {problem.wanted for problem in refusal.problems}
        assert found <= {
            "one tensor width for these layers",
            "one tensor width for a shared weight",
            "several replicas, or a weight that another stage shares",
        }
        return
    program = compile_plan(divided, model)
    check_program(program)
    assert parse_program(format_program(program)) == program
    assert not any(i.op is REDUCE_GRAD for rank in program.ranks for i in rank)


@settings(max_examples=portion(30))
@given(
    data=st.sampled_from([2, 4]),
    stages=st.sampled_from([1, 2]),
    only=st.sampled_from([(), (0,)]),
    tensor=st.sampled_from([1, 2]),
    parameters=st.sampled_from([1000, 1_000_000]),
    shared=st.booleans(),
)
def test_one_of_equal_replicas_stands_for_all(
    data, stages, only, tensor, parameters, shared
) -> None:
    model = even_model(stages * 2, cut_bytes=1e4, parameters=parameters)
    cluster = one_node(16, latency=1e-5, shared=shared)
    grid = even_plan(model, cluster, data=data, tensor=tensor, stages=stages, micro_batches=2)
    plan = dividing(grid, *only)
    assert len(find_symmetry(plan, cluster, model).ranks) == stages
    whole, folded = simulate_plan(plan, model, cluster), simulate_by_symmetry(plan, model, cluster)
    assert folded.step_seconds == pytest.approx(whole.step_seconds, rel=1e-9)
    assert step_breakdown(folded.timeline()) == pytest.approx(
        step_breakdown(whole), rel=1e-6, abs=1e-9
    )


def test_a_plan_says_which_stages_divide_and_reads_back(tmp_path) -> None:
    model, cluster = even_model(4, parameters=10), one_node(4)
    plan = dividing(even_plan(model, cluster, data=2, stages=2), 0)
    assert describe_plan(plan) == "dp2 tp1 pp2 [2z|2] 1x2 1f1b"
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan


@pytest.mark.parametrize("level", ["node", "", "-1", -1, 2, True, None])
def test_a_level_that_is_none_is_refused_by_name(level, tmp_path) -> None:
    model, cluster = even_model(2, parameters=10), one_node(2)
    path = tmp_path / "plan.json"
    save_plan(dividing(even_plan(model, cluster, data=2)), path)
    text = path.read_text()
    value = {True: "true", None: "null"}.get(level, f'"{level}"')
    path.write_text(text.replace('"optimizer": "all"', f'"optimizer": {value}'))
    assert path.read_text() != text
    with pytest.raises(MeshwrightError, match=r"stages\[0\]\.states\.optimizer"):
        load_plan(path)


def refusal(plan: Plan, model: LayerGraph | None) -> list[tuple[str, str]]:
    with pytest.raises(PlanError) as caught:
        validate_plan(plan, model)
    return [(problem.field, problem.wanted) for problem in caught.value.problems]


def test_what_cannot_be_divided_is_refused_by_name() -> None:
    model, cluster = even_model(4, parameters=10), one_node(8)
    field = "pipelines[0].stages[{}].states.optimizer"
    alone = dividing(even_plan(model, cluster, stages=2))
    wanted = "several replicas, or a weight that another stage shares"
    assert refusal(alone, model) == [(field.format(s), wanted) for s in range(2)]
    validate_plan(alone)
    tied = replace(model, tied=(Tied(name="w", layers=(0, 3), parameters=10),))
    validate_plan(alone, tied)
    inside = replace(model, tied=(Tied(name="w", layers=(2, 3), parameters=10),))
    assert refusal(alone, inside) == [(field.format(s), wanted) for s in range(2)]

    plan = even_plan(model, cluster, data=2, stages=2)
    (pipeline,) = plan.pipelines
    other = replace(
        pipeline, stages=(replace(pipeline.stages[0], layers=(0, 4), devices=(("n:4",),)),)
    )
    two = replace(plan, pipelines=(dividing(plan).pipelines[0], replace(other, rows=1)))
    two = replace(two, devices=(*plan.devices, "n:4"), job=replace(plan.job, global_batch=3))
    wanted = "the same in all stages that share layers"
    assert refusal(two, model) == [(field.format(s), wanted) for s in range(2)]

    unlike = replace(pipeline.stages[0], devices=(("n:0", "n:1"), ("n:4",)), states=DIVIDED)
    pipeline = replace(pipeline, stages=(unlike, pipeline.stages[1]))
    plan = replace(plan, pipelines=(pipeline,), devices=(*plan.devices, "n:4"))
    assert refusal(plan, None) == [(field.format(0), "one tensor width for these layers")]


def test_a_shared_weight_is_divided_only_among_stages_of_one_tensor_width() -> None:
    model = even_model(4, parameters=10)
    model = replace(model, tied=(Tied(name="w", layers=(0, 3), parameters=10),))
    plan = even_plan(model, one_node(2), stages=2)
    (pipeline,) = plan.pipelines
    wide = replace(pipeline.stages[1], devices=(("n:1", "n:2"),))
    pipeline = replace(pipeline, stages=(pipeline.stages[0], wide))
    plan = replace(plan, pipelines=(pipeline,), devices=tuple(f"n:{n}" for n in range(3)))
    field = "pipelines[0].stages[{}].states.optimizer"
    wanted = "one tensor width for a shared weight"
    assert refusal(dividing(plan), model) == [(field.format(s), wanted) for s in range(2)]
