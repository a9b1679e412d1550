"""The simulator keeps the laws of the programs it plays."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from itertools import count, islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.cost.collective import Traffic
from meshwright.cost.pricing import Prices, price_program
from meshwright.cost.pricing_context import Price
from meshwright.errors import ProgramError
from meshwright.model.spec import LayerGraph
from meshwright.plan.spec import Pipeline, Plan, Stage
from meshwright.program.check import check_program
from meshwright.program.compile import compile_plan
from meshwright.program.instructions import Instruction, Program
from meshwright.program.operations import Op
from meshwright.program.timeline import Timeline, busy_seconds, interval_label
from meshwright.simulate.critical_path import step_breakdown
from meshwright.simulate.simulator import simulate, simulate_plan
from meshwright.techniques.data_parallel.operations import REDUCE_GRAD
from meshwright.techniques.pipeline_parallel.operations import GATHERS
from plain_constants import PLAINLY
from strategies import models_and_plans
from worlds import chain, divided, even_model, even_plan, one_node, plan_by_hand

SECOND = 1.0


def of_kind(timeline: Timeline, *ops: Op) -> list[tuple[float, float]]:
    return [(i.start_seconds, i.end_seconds) for i in timeline.intervals if i.op in ops]


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@given(stages=st.integers(1, 5), micro_batches=st.integers(1, 8))
def test_bubble_of_equal_stages_with_free_communication(
    schedule: str, stages: int, micro_batches: int
) -> None:
    """(p - 1) / (m + p - 1) of the step, for 1F1B and GPipe alike."""
    model, cluster = even_model(2 * stages), one_node(stages, bandwidth=1e18)
    plan = even_plan(model, cluster, stages=stages, micro_batches=micro_batches, schedule=schedule)
    timeline = simulate_plan(plan, model, cluster, PLAINLY)
    bubble = 1 - busy_seconds(timeline, 0) / timeline.step_seconds
    assert bubble == pytest.approx((stages - 1) / (micro_batches + stages - 1), abs=1e-9)


@given(models_and_plans())
def test_every_instruction_has_one_interval(case: tuple[LayerGraph, Plan]) -> None:
    model, plan = case
    program = compile_plan(plan, model)
    cluster = one_node(len(plan.devices))
    timeline = simulate(program, price_program(program, plan, model, cluster))
    played = Counter((i.rank, i.op, i.stage, i.micro_batch) for i in timeline.intervals)
    listed = Counter(
        (rank, i.op, i.stage, i.micro_batch)
        for rank, instructions in enumerate(program.ranks)
        for i in instructions
    )
    assert played == listed


@given(models_and_plans())
def test_a_rank_computes_one_thing_at_a_time_and_within_the_step(
    case: tuple[LayerGraph, Plan],
) -> None:
    model, plan = case
    timeline = simulate_plan(plan, model, one_node(len(plan.devices)))
    ends: dict[int, float] = defaultdict(float)
    for i in timeline.intervals:
        if i.stream == "compute":
            assert i.start_seconds >= ends[i.rank] - 1e-12
            ends[i.rank] = i.end_seconds
        assert i.end_seconds <= timeline.step_seconds
    for rank in range(len(plan.devices)):
        assert timeline.step_seconds >= busy_seconds(timeline, rank) - 1e-12


@given(models_and_plans())
def test_the_same_plan_gives_the_same_timeline(case: tuple[LayerGraph, Plan]) -> None:
    model, plan = case
    cluster = one_node(len(plan.devices), bandwidth=1e5, shared=True)
    assert simulate_plan(plan, model, cluster) == simulate_plan(plan, model, cluster)


@given(models_and_plans(), st.randoms(use_true_random=False))
def test_numbering_the_ranks_otherwise_changes_nothing(
    case: tuple[LayerGraph, Plan], random: object
) -> None:
    model, plan = case
    cluster = one_node(len(plan.devices), bandwidth=1e6, latency=1e-5)
    devices = list(plan.devices)
    random.shuffle(devices)  # type: ignore[attr-defined]
    other = replace(plan, devices=tuple(devices))
    before = simulate_plan(plan, model, cluster).step_seconds
    assert simulate_plan(other, model, cluster).step_seconds == pytest.approx(before, rel=1e-9)


@given(
    stages=st.integers(2, 4),
    micro_batches=st.integers(1, 6),
    bandwidth=st.sampled_from([1e4, 1e5, 1e6, 1e7]),
    slower=st.sampled_from([1.0, 1.1, 2.0, 10.0]),
)
def test_slower_links_never_make_a_pipeline_faster(
    stages: int, micro_batches: int, bandwidth: float, slower: float
) -> None:
    """A chain with a port per device and direction: no two transfers compete."""
    model = even_model(stages, cut_bytes=100.0)
    plan = even_plan(model, one_node(stages), stages=stages, micro_batches=micro_batches)
    fast = simulate_plan(plan, model, one_node(stages, bandwidth=bandwidth))
    slow = simulate_plan(plan, model, one_node(stages, bandwidth=bandwidth / slower))
    assert slow.step_seconds >= fast.step_seconds - 1e-12


def test_a_transfer_takes_latency_and_bytes_over_bandwidth() -> None:
    model = even_model(2, cut_bytes=1e6)
    cluster = one_node(2, bandwidth=1e9, latency=1e-4)
    timeline = simulate_plan(even_plan(model, cluster, stages=2), model, cluster, PLAINLY)
    for start, end in of_kind(timeline, Op.SEND_F, Op.RECV_F, Op.SEND_B, Op.RECV_B):
        assert end - start == pytest.approx(1.1e-3)


def test_two_transfers_on_one_bus_take_twice_as_long() -> None:
    model = even_model(2, cut_bytes=1e6)
    alone = one_node(4, bandwidth=1e9)
    shared = one_node(4, bandwidth=1e9, shared=True)
    plan = even_plan(model, alone, data=2, stages=2)
    for cluster, seconds in ((alone, 1e-3), (shared, 2e-3)):
        timeline = simulate_plan(plan, model, cluster, PLAINLY)
        for start, end in of_kind(timeline, Op.RECV_F):
            assert end - start == pytest.approx(seconds)


def test_a_reduction_starts_inside_the_backward_that_completes_it() -> None:
    """Two layers of 2 ms backward each, two buckets of 4 ms: the first begins half-way, is alone
    for 2 ms, and shares the links with the second until its end."""
    model = even_model(2, seconds=1e-3, parameters=10**6)
    cluster = one_node(2)
    plan = even_plan(model, cluster, data=2)
    program = compile_plan(plan, model, bucket_bytes=10**6)
    timeline = simulate(program, price_program(program, plan, model, cluster, PLAINLY))
    reductions = sorted(of_kind(timeline, REDUCE_GRAD))
    (began, ended), *_ = of_kind(timeline, Op.BACKWARD)
    assert reductions[0][0] == pytest.approx((began + ended) / 2)
    assert reductions[-1][0] == pytest.approx(ended)
    assert reductions[0][1] - reductions[0][0] == pytest.approx(6e-3)
    assert reductions[-1][1] - reductions[-1][0] == pytest.approx(6e-3)


def test_the_norm_waits_for_every_rank_and_the_optimizer_for_the_norm() -> None:
    model, cluster = chain([1.0, 3.0, 1.0], tied=True), one_node(3, bandwidth=1e6)
    plan = even_plan(model, cluster, stages=3, micro_batches=2)
    timeline = simulate_plan(plan, model, cluster)
    norms = of_kind(timeline, Op.REDUCE_NORM)
    work = of_kind(timeline, Op.BACKWARD, REDUCE_GRAD)
    assert len({start for start, _ in norms}) == 1
    assert norms[0][0] == pytest.approx(max(end for _, end in work))
    assert min(start for start, _ in of_kind(timeline, Op.OPTIMIZER_STEP)) >= norms[0][1]


def test_without_clipping_a_stage_that_is_done_does_not_wait_for_late_ones() -> None:
    model, cluster = chain([1.0, 3.0, 1.0], tied=True), one_node(3, bandwidth=1e6)
    plan = even_plan(model, cluster, stages=3, micro_batches=2)
    late = simulate_plan(plan, model, cluster)
    early = simulate_plan(plan, model, cluster, clipped=False)
    steps = [i for i in early.intervals if i.op is Op.OPTIMIZER_STEP]
    for step in steps:
        own = [i for i in early.intervals if i.rank == step.rank]
        shared = step.label.endswith(" shared")
        waited = (Op.BACKWARD, REDUCE_GRAD) if shared else (Op.BACKWARD,)
        before = [
            i.end_seconds for i in own if i.op in waited or i.label == f"{step.rank}OPTIMIZER_STEP"
        ]
        assert step.start_seconds == max(t for t in before if t < step.end_seconds)
    assert [step.label for step in steps if step.rank == 0] == [
        "0OPTIMIZER_STEP",
        "0OPTIMIZER_STEP shared",
    ]
    assert len({step.start_seconds for step in steps}) > 2
    assert early.step_seconds <= late.step_seconds
    assert sum(step_breakdown(early).values()) == pytest.approx(early.step_seconds)


def test_memory_rises_with_forwards_and_returns_to_where_it_began() -> None:
    model, cluster = even_model(4), one_node(4)
    for schedule, held in (("1f1b", [4, 3, 2, 1]), ("gpipe", [8, 8, 8, 8])):
        plan = even_plan(model, cluster, stages=4, micro_batches=8, schedule=schedule)
        program = compile_plan(plan, model)
        prices = price_program(program, plan, model, cluster)
        timeline = simulate(program, prices)
        for rank in range(4):
            sizes = [point.bytes for point in timeline.memory if point.rank == rank]
            assert sizes[0] == sizes[-1] == prices.static_bytes[rank]
            each = max(price.held_bytes for price in prices.ranks[rank])
            assert max(sizes) - sizes[0] == held[rank] * each


def _prices(*ranks: tuple[Price, ...]) -> Prices:
    return Prices(
        ranks=ranks,
        bandwidth={"wire": 1.0},
        devices=tuple(f"n:{rank}" for rank in range(len(ranks))),
        static_bytes=(0,) * len(ranks),
    )


def test_messages_between_two_ranks_arrive_in_the_order_of_their_sends() -> None:
    def message(op: Op, peer: int, micro_batch: int) -> Instruction:
        return Instruction(op=op, stage=0, micro_batch=micro_batch, peer=peer)

    program = Program(
        ranks=(
            (message(Op.SEND_F, 1, 0), message(Op.SEND_F, 1, 1)),
            (message(Op.RECV_F, 0, 0), message(Op.RECV_F, 0, 1)),
        )
    )
    wire = Price(traffic=Traffic(bytes_by_resource={"wire": 2.0}))
    timeline = simulate(program, _prices((wire, wire), (wire, wire)))
    sends = sorted(of_kind(timeline, Op.SEND_F))
    assert sends == [(0.0, 2 * SECOND), (2 * SECOND, 4 * SECOND)]


def test_a_receive_without_a_send_is_named() -> None:
    waiting = Instruction(op=Op.RECV_F, stage=1, micro_batch=0, peer=0)
    forward = Instruction(op=Op.FORWARD, stage=1, micro_batch=0)
    program = Program(ranks=((), (waiting, forward)))
    with pytest.raises(ProgramError, match="1RECV_F0 peer=0") as failure:
        simulate(program, _prices((), (Price(), Price())))
    assert any("1F0" in problem.found for problem in failure.value.problems)


def test_a_collective_that_a_member_never_joins_is_named() -> None:
    norm = Instruction(op=Op.REDUCE_NORM, stage=0, ranks=(0, 1))
    with pytest.raises(ProgramError, match="0REDUCE_NORM"):
        simulate(Program(ranks=((norm,), ())), _prices((Price(),), ()))


@st.composite
def virtual_plans(draw: st.DrawFn) -> tuple[LayerGraph, Plan]:
    """Two or three groups of devices that hold two stages each, with every kind of boundary."""
    schedule = draw(st.sampled_from(["interleaved-1f1b", "interleaved-1f1b-2bp", "zb-v"]))
    groups, rows = draw(st.integers(2, 3)), draw(st.integers(2, 4))
    names = (f"n:{number}" for number in count())
    meshes = []
    for _ in range(groups):
        data = draw(st.integers(1, 2))
        tensor = draw(st.integers(1, 3))
        mesh = tuple(tuple(islice(names, tensor)) for _ in range(data))
        meshes.append((mesh, (rows - data + 1, *(1,) * (data - 1))))
    order = [*range(groups), *(reversed(range(groups)) if schedule == "zb-v" else range(groups))]
    kinds = st.sampled_from(["direct", "scatter_gather", "broadcast", "broadcast"])
    stages = tuple(
        Stage(
            layers=(s, s + 1),
            devices=meshes[g][0],
            rows=meshes[g][1],
            boundary=draw(kinds) if s and g != order[s - 1] else None,
        )
        for s, g in enumerate(order)
    )
    micro_batches = draw(st.integers(1, 5))
    model = even_model(len(order), cut_bytes=draw(st.sampled_from([1.0, 1e4])))
    plan = plan_by_hand(
        Pipeline(micro_batches=micro_batches, rows=rows, stages=stages),
        schedule=schedule,
        devices=tuple(d for mesh, _ in meshes for replica in mesh for d in replica),
    )
    layers = tuple(divided(layer, units=6) for layer in model.layers)
    return replace(model, layers=layers), plan


@given(virtual_plans())
def test_messages_of_several_cuts_between_the_same_ranks_are_told_apart(
    case: tuple[LayerGraph, Plan],
) -> None:
    """Every stage computes a micro-batch after all that the cut before it has brought it."""
    model, plan = case
    program = compile_plan(plan, model)
    check_program(program)
    timeline = simulate_plan(plan, model, one_node(len(plan.devices), bandwidth=1e6))
    listed = Counter(interval_label(i) for own in program.ranks for i in own)
    assert Counter(i.label for i in timeline.intervals) == listed
    arrived: dict[tuple[int, Op, int, int | None], float] = defaultdict(float)
    for i in timeline.intervals:
        if i.stream == "receive":
            key = (i.rank, i.op, i.stage, i.micro_batch)
            arrived[key] = max(arrived[key], i.end_seconds)
    for i in timeline.intervals:
        reads = i.op.reads if i.op.kind == "compute" else None
        for op in (reads, GATHERS[reads]) if reads else ():
            assert i.start_seconds >= arrived[i.rank, op, i.stage, i.micro_batch]


def test_broadcasts_of_several_cuts_and_both_directions_take_their_own_time() -> None:
    """Down the line and back up on two groups: activations and gradients are broadcast along the
    same ranks. Nothing else is under way when the first activations and the first gradients are."""
    model = even_model(4, cut_bytes=1e6)
    devices = (("n:0",),), (("n:1", "n:2"),)
    stages = tuple(
        Stage(layers=(s, s + 1), devices=devices[g], boundary="broadcast" if s % 2 else None)
        for s, g in enumerate((0, 1, 1, 0))
    )
    plan = plan_by_hand(
        Pipeline(micro_batches=1, rows=1, stages=stages), sequence=1, schedule="zb-v"
    )
    wide = replace(model, layers=tuple(divided(layer, units=2) for layer in model.layers))
    timeline = simulate_plan(plan, wide, one_node(3, bandwidth=1e9), PLAINLY)
    chained = of_kind(timeline, Op.RECV_F)[:2] + of_kind(timeline, Op.RECV_B)[:2]
    assert [end - start for start, end in chained] == [pytest.approx(1e-3)] * 4
