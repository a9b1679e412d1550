"""Prices of instructions: layers, all-reduces inside them, and when gradients are complete."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshwright.cluster.spec import Link
from meshwright.cluster.topology import Resource
from meshwright.cost.constants import Calibration, SystemConstants
from meshwright.cost.priced_plan import PricedPlan
from meshwright.cost.pricing import price_program
from meshwright.cost.profile import LinkTimes, Profile
from meshwright.errors import ClusterError
from meshwright.model.spec import Tied
from meshwright.program.compile import compile_plan
from meshwright.program.operations import Op
from meshwright.techniques.data_parallel.operations import REDUCE_GRAD
from plain_constants import PLAINLY, plain
from worlds import chain, divided, even_model, even_plan, one_node


def test_forward_and_backward_are_the_sum_of_their_layers() -> None:
    model, cluster = even_model(6), one_node(2)
    plan = even_plan(model, cluster, stages=2)
    program = compile_plan(plan, model)
    prices = price_program(program, plan, model, cluster, PLAINLY)
    seconds = {i.op: p.seconds for i, p in zip(program.ranks[0], prices.ranks[0], strict=True)}
    assert seconds[Op.FORWARD] == pytest.approx(3e-3)
    assert seconds[Op.BACKWARD] == pytest.approx(6e-3)
    assert seconds[Op.SEND_F] == 0.0


def test_a_priced_plan_is_compiled_and_priced_once() -> None:
    model, cluster = even_model(6), one_node(2)
    plan = even_plan(model, cluster, stages=2)
    found = PricedPlan(plan, model, cluster)
    assert found.program == compile_plan(plan, model)
    assert found.prices == price_program(found.program, plan, model, cluster)
    assert found.program is found.program
    assert found.prices is found.prices
    alone = PricedPlan(plan, model, cluster, clipped=False, ranks=frozenset({1}))
    assert alone.program.ranks == ((), compile_plan(plan, model, clipped=False).ranks[1])
    assert alone.prices.ranks[0] == ()


def test_a_stage_that_recomputes_repeats_its_forward_in_the_backward() -> None:
    """All layers but the model's last, whose backward follows at once."""
    model, cluster = even_model(6), one_node(2)
    plan = even_plan(model, cluster, stages=2)
    (pipeline,) = plan.pipelines
    again = tuple(replace(stage, recompute=True) for stage in pipeline.stages)
    plan = replace(plan, pipelines=(replace(pipeline, stages=again),))
    program = compile_plan(plan, model)
    prices = price_program(program, plan, model, cluster, PLAINLY)
    backwards = [
        next(p.seconds for i, p in zip(*rank, strict=True) if i.op is Op.BACKWARD)
        for rank in zip(program.ranks, prices.ranks, strict=True)
    ]
    assert backwards == pytest.approx([9e-3, 8e-3])


def test_tensor_parallel_all_reduces_are_inside_the_compute() -> None:
    """2 ranks, 1 MB at 1 GB/s a row: each of the 2 + 1 all-reduces takes 1 ms."""
    model, cluster = even_model(1, seconds=1e-3), one_node(2)
    layer = divided(
        model.layers[0],
        units=2,
        flops=1e9,
        forward_all_reduce_bytes=(1e6, 1e6),
        backward_all_reduce_bytes=(1e6,),
    )
    model = replace(model, layers=(layer,))
    plan = even_plan(model, cluster, tensor=2)
    program = compile_plan(plan, model)
    for rank in price_program(program, plan, model, cluster, PLAINLY).ranks:
        assert rank[0].seconds == pytest.approx(0.5e-3 + 2e-3)
        assert rank[1].seconds == pytest.approx(1e-3 + 1e-3)


def test_the_slower_device_sets_the_pace_of_its_tensor_group() -> None:
    model, cluster = even_model(1), one_node(2)
    slow = replace(cluster.types["g"], name="slow", peak={"fp32": 0.25e12})
    node = replace(cluster.nodes[0], devices=("g", "slow"))
    cluster = replace(cluster, types={**cluster.types, "slow": slow}, nodes=(node,))
    plan = even_plan(model, cluster, tensor=2)
    prices = price_program(compile_plan(plan, model), plan, model, cluster, PLAINLY)
    assert [rank[0].seconds for rank in prices.ranks] == pytest.approx([4e-3, 4e-3])


def test_each_bucket_is_complete_when_the_backward_reaches_its_first_layer() -> None:
    model, cluster = even_model(3, parameters=1000), one_node(2)
    model = replace(model, tied=(Tied(name="w", layers=(1, 2), parameters=10),))
    plan = even_plan(model, cluster, data=2)
    program = compile_plan(plan, model, bucket_bytes=1)
    ranks = price_program(program, plan, model, cluster, PLAINLY).ranks
    backward = next(k for k, i in enumerate(program.ranks[0]) if i.op is Op.BACKWARD)
    offsets = {
        program.ranks[0][index].tied or program.ranks[0][index].layers: offset
        for index, offset in ranks[0][backward].completes
    }
    assert offsets == {
        (2, 3): pytest.approx(2e-3),
        (1, 2): pytest.approx(4e-3),
        (0, 1): pytest.approx(6e-3),
        "w": pytest.approx(4e-3),
    }
    inside = [
        p.completed_by
        for p, i in zip(ranks[0], program.ranks[0], strict=True)
        if i.op is REDUCE_GRAD
    ]
    assert inside == [backward] * 4


def test_gradients_as_small_as_the_norm_are_not_taken_for_it() -> None:
    """Both are of 16 bytes, summed by the same two ranks; of gradients half crosses the links."""
    model, cluster = even_model(1, parameters=4), one_node(2)
    plan = even_plan(model, cluster, data=2)
    half = Calibration(system=SystemConstants(gradient_width=0.5))
    profile = Profile(model="even", sequence=1, calibration=half)
    program = compile_plan(plan, model)
    own = price_program(program, plan, model, cluster, profile).ranks[0]
    carried = {
        i.op: max(p.traffic.bytes_by_resource.values())
        for i, p in zip(program.ranks[0], own, strict=True)
        if i.op in (REDUCE_GRAD, Op.REDUCE_NORM)
    }
    assert {i.bytes for i in program.ranks[0] if i.ranks} == {16}
    assert carried == {REDUCE_GRAD: 8.0, Op.REDUCE_NORM: 16.0}


def test_measured_links_and_step_overhead_replace_the_cluster_file() -> None:
    model, cluster = even_model(2, cut_bytes=1e6), one_node(2, bandwidth=1e9)
    plan = even_plan(model, cluster, stages=2)
    program = compile_plan(plan, model)
    profile = plain(
        links=LinkTimes(inside=Link(bandwidth=1e8, latency=1e-4), all_reduce_latency=5e-4),
        step_overhead_seconds=0.25,
    )
    prices = price_program(program, plan, model, cluster, profile)
    traffic = {i.op: p.traffic for i, p in zip(program.ranks[0], prices.ranks[0], strict=True)}
    assert prices.bandwidth[Resource("n:0", "port", "out")] == 1e8
    assert traffic[Op.SEND_F].latency == 1e-4
    assert traffic[Op.REDUCE_NORM].latency == pytest.approx(2 * 5e-4)
    assert prices.overhead_seconds == 0.25


def test_a_device_without_the_precision_is_refused() -> None:
    model, cluster = replace(even_model(1), precision="bf16"), one_node(1)
    plan = even_plan(model, cluster)
    with pytest.raises(ClusterError, match="bf16"):
        price_program(compile_plan(plan, model), plan, model, cluster)


@pytest.mark.parametrize("data", [1, 2])
def test_several_updates_of_a_rank_take_as_long_as_one_of_all(data: int) -> None:
    """The shared weight of two stages is updated for itself, the rest of the rank at once."""
    graph, cluster = chain([1.0] * 4, tied=True), one_node(4)
    plan = even_plan(graph, cluster, data=data, stages=2, micro_batches=2)

    def updates(*, clipped: bool) -> list[float]:
        program = compile_plan(plan, graph, clipped=clipped)
        priced = price_program(program, plan, graph, cluster).ranks[0]
        steps = zip(program.ranks[0], priced, strict=True)
        return [cost.seconds for i, cost in steps if i.op is Op.OPTIMIZER_STEP]

    (all_at_once,) = updates(clipped=True)
    apart = updates(clipped=False)
    assert len(apart) == 2
    assert sum(apart) == pytest.approx(all_at_once, abs=0.0)
    assert min(apart) > 0
