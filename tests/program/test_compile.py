"""A legal plan always compiles to a sound program that does all the work exactly once."""

from __future__ import annotations

from collections import Counter, defaultdict
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.errors import ProgramError
from meshwright.layout.shares import UNDIVIDED
from meshwright.model.spec import tensors_across
from meshwright.plan.ranks import stage_placements
from meshwright.plan.spec import Pipeline, Stage
from meshwright.plan.validate import validate_plan
from meshwright.program.check import check_program, deadlocks
from meshwright.program.compile import compile_plan
from meshwright.program.instructions import Program, format_program, parse_program
from meshwright.program.operations import Op
from meshwright.program.schedules import in_flight, schedule_orders
from meshwright.techniques.data_parallel.operations import REDUCE_GRAD
from meshwright.techniques.pipeline_parallel.boundaries import cut_bytes
from strategies import models_and_plans
from worlds import chain, even_plan, one_node, plan_by_hand


@given(models_and_plans())
def test_every_legal_plan_compiles_to_a_sound_program(case):
    model, plan = case
    validate_plan(plan, model)
    check_program(compile_plan(plan, model))


@given(models_and_plans())
def test_text_and_back_is_the_same_program(case):
    model, plan = case
    program = compile_plan(plan, model)
    assert parse_program(format_program(program)) == program


@given(models_and_plans())
def test_every_row_of_the_batch_passes_every_layer_once_each_way(case):
    model, plan = case
    program = compile_plan(plan, model)
    placements = {s.rank: s for stage in stage_placements(plan) for s in stage.mesh.members}
    done = Counter()
    for rank, instructions in enumerate(program.ranks):
        if placements[rank].index("tensor"):
            continue
        for i in instructions:
            if i.op in (Op.FORWARD, Op.BACKWARD):
                for layer in range(*i.layers):
                    done[i.op, layer] += i.rows[1] - i.rows[0]
    expected = {
        (op, layer): plan.job.global_batch
        for op in (Op.FORWARD, Op.BACKWARD)
        for layer in range(len(model.layers))
    }
    assert done == expected


@given(models_and_plans())
def test_every_receiver_gets_exactly_its_rows(case):
    model, plan = case
    program = compile_plan(plan, model)
    received = defaultdict(list)
    for rank, instructions in enumerate(program.ranks):
        for i in instructions:
            if i.op in (Op.RECV_F, Op.RECV_B):
                received[rank, i.op, i.micro_batch].append(i.rows)
    placements = {s.rank: s for stage in stage_placements(plan) for s in stage.mesh.members}
    for (rank, _, _), pieces in received.items():
        pieces.sort()
        assert [pieces[0][0], pieces[-1][1]] == list(placements[rank].rows)
        assert all(a[1] == b[0] for a, b in pairwise(pieces))


def met(program, rank, of) -> list:
    """The sums in which a rank gives gradients of a layer (its number) or a tied parameter."""
    return [
        i
        for i in program.ranks[rank]
        if i.op is REDUCE_GRAD
        and (i.tied == of if isinstance(of, str) else i.layers and i.layers[0] <= of < i.layers[1])
    ]


@given(models_and_plans())
def test_gradients_of_every_layer_meet_one_of_every_replica(case):
    """Every share of every layer is summed once, by the rank of each replica that holds it."""
    model, plan = case
    program = compile_plan(plan, model, bucket_bytes=5000)
    parts = [((n,), n, x.parameters - x.along("tensor").parameters,
              x.along("tensor").parameters)
             for n, x in enumerate(model.layers)]  # fmt: skip
    parts += [(t.layers, t.name, 0 if t.divided else t.parameters, t.parameters if t.divided else 0)
              for t in model.tied]  # fmt: skip
    for layers, name, undivided, divided in parts:
        replicas = {
            tuple(placement.rank for placement in replica)
            for stage in stage_placements(plan)
            for replica in stage.mesh.groups("tensor")
            if any(stage.layers[0] <= n < stage.layers[1] for n in layers)
        }
        everyone = sorted(rank for replica in replicas for rank in replica)
        for replica in replicas:
            for index, rank in enumerate(replica):
                sums = met(program, rank, name)
                if len(replicas) == 1:
                    assert not sums
                    continue
                whole = [i for i in sums if i.tile in (None, UNDIVIDED)]
                like = len({*map(len, replicas)}) == 1
                assert len(whole) == 1 if undivided or like else len(whole) <= 1
                for i in whole:
                    same = [each[index] for each in replicas] if i.tile is None else everyone
                    assert list(i.ranks) == sorted(same)
                shares = sorted(
                    (Fraction(i.tile.first, i.tile.of), Fraction(i.tile.last, i.tile.of), i)
                    for i in sums
                    if i.tile not in (None, UNDIVIDED)
                )
                assert not (like and shares)
                if like or not (divided or shares):
                    continue
                assert shares[0][0] == Fraction(index, len(replica))
                assert shares[-1][1] == Fraction(index + 1, len(replica))
                assert all(a[1] == b[0] for a, b in pairwise(shares))
                for low, high, i in shares:
                    holding = [
                        [r for t, r in enumerate(each) if t <= low * len(each) < t + 1]
                        for each in replicas
                    ]
                    assert sorted(r for (r,) in holding) == list(i.ranks)
                    assert i.bytes >= 4 * divided * (high - low)


@given(st.integers(1, 8), st.integers(1, 12), st.sampled_from(["1f1b", "gpipe"]))
def test_no_stage_holds_more_micro_batches_than_stated(stages, micro_batches, schedule):
    for stage in range(stages):
        held = most = 0
        layout = tuple((s,) for s in range(stages))
        for op, *_ in schedule_orders(schedule, layout, micro_batches)[stage]:
            held += 1 if op is Op.FORWARD else -1
            most = max(most, held)
        assert held == 0
        assert most == in_flight(schedule, stage, stages, micro_batches)


def test_skip_connections_ride_through_every_cut():
    model = chain([1.0, 1.0, 1.0, 1.0], skip=True)
    assert [t.name for t in tensors_across(model, 2)] == ["t1", "skip"]
    assert cut_bytes(model, 2) == (96.0, 96.0)


def two_stages() -> Program:
    """Rank 0 and 1, one stage each, two micro-batches."""
    stages = tuple(Stage(layers=(s, s + 1), devices=((f"a:{s}",),)) for s in range(2))
    plan = plan_by_hand(Pipeline(micro_batches=2, rows=1, stages=stages))
    return compile_plan(plan, chain([1.0, 1.0], tied=True))


def edited(rank: int, edit) -> Program:
    ranks = [format_program(Program(ranks=(r,))).splitlines()[1:] for r in two_stages().ranks]
    edit(ranks[rank])
    return parse_program(
        "\n".join(f"rank {n}\n" + "\n".join(lines) for n, lines in enumerate(ranks))
    )


def move(lines: list[str], word: str, to: int) -> None:
    index = next(i for i, line in enumerate(lines) if line.split()[0] == word)
    lines.insert(to, lines.pop(index))


def drop(lines: list[str], word: str) -> None:
    lines[:] = [line for line in lines if line.split()[0] != word]


@pytest.mark.parametrize(
    ("rank", "edit", "words"),
    [
        (0, lambda p: drop(p, "0SEND_F1"), ["rank 1", "RECV_F1", "SEND_F1 on rank 0"]),
        (0, lambda p: drop(p, "0RECV_B0"), ["SEND_B0", "RECV_B0 on rank 0"]),
        (0, lambda p: drop(p, "0B1"), ["0F1", "0B1 after it"]),
        (1, lambda p: move(p, "1B0", 0), ["its forward before it"]),
        (0, lambda p: p.append(p[0]), ["once only"]),
        (0, lambda p: move(p, "0RECV_B0", len(p) - 1), ["REDUCE_NORM, then OPTIMIZER_STEP"]),
        (0, lambda p: move(p, "0SEND_F1", len(p) - 3), ["which rank 0 has not sent"]),
        (0, lambda p: move(p, "0SEND_F1", 1), ["in the order [1, 0]"]),
        (1, lambda p: drop(p, "1OPTIMIZER_STEP"), ["exactly one OPTIMIZER_STEP"]),
        (1, lambda p: drop(p, "1REDUCE_GRAD"), ["collectives over ranks (0, 1)"]),
        (0, lambda p: p.append("  0SEND_F7 peer=9 rows=0:1 bytes=4"), ["another rank below 2"]),
        (0, lambda p: move(p, "0REDUCE_GRAD", len(p) - 3), ["posted before the backward"]),
    ],
)
def test_a_broken_program_is_refused_by_name(rank, edit, words):
    with pytest.raises(ProgramError) as caught:
        check_program(edited(rank, edit))
    for word in words:
        assert word in str(caught.value)


def rows_of_two_cuts(*words: str) -> Program:
    """Two ranks that hold two stages each, and messages from the first to the second."""
    sent = "\n".join(word.replace("RECV", "SEND") + " peer=1 bytes=4" for word in words[0].split())
    read = "\n".join(word + " peer=0 bytes=4" for word in words[1].split())
    return parse_program(f"rank 0\n{sent}\nrank 1\n{read}\n".replace("/", " rows="))


@pytest.mark.parametrize(
    ("sent", "received"),
    [
        ("0SEND_F0 2SEND_F0", "3RECV_F0 1RECV_F0"),
        ("0SEND_F0/0:1 0SEND_F0/1:2", "1RECV_F0/1:2 1RECV_F0/0:1"),
    ],
)
def test_messages_that_differ_in_their_cut_or_rows_alone_are_not_the_same(sent, received):
    with pytest.raises(ProgramError, match="the order of its RECV_Fs"):
        check_program(rows_of_two_cuts(sent, received))


def test_a_forward_waits_for_all_rows_that_it_reads() -> None:
    program = parse_program(
        "rank 0\n0F0\n0SEND_F0 peer=1 rows=0:1\n0B0\n0SEND_F0 peer=1 rows=1:2\n"
        "rank 1\n1RECV_F0 peer=0 rows=0:1\n1RECV_F0 peer=0 rows=1:2\n1F0\n"
    )
    assert [*deadlocks(program, "p")] == []
    late = parse_program(
        "rank 0\n0F0\n0SEND_F0 peer=1 rows=0:1\n0RECV_B0 peer=1\n0B0\n"
        "0SEND_F0 peer=1 rows=1:2\n"
        "rank 1\n1RECV_F0 peer=0 rows=0:1\n1RECV_F0 peer=0 rows=1:2\n1F0\n1B0\n"
        "1SEND_B0 peer=0\n"
    )
    first, second = deadlocks(late, "p")
    assert "0B0, which waits for 0RECV_B0" in first.found
    assert "1F0, which waits for 1RECV_F0 peer=0 rows=1:2" in second.found


@pytest.mark.parametrize(
    "line", ["hello", "0X3", "0F3 rows=1", "0SEND_F1 peer=x", "0F1 colour=red"]
)
def test_unreadable_text_names_the_line(line):
    with pytest.raises(ProgramError, match="line 2"):
        parse_program(f"rank 0\n  {line}\n")


def test_clipping_is_all_ranks_or_none() -> None:
    model = chain([1.0, 1.0])
    cluster = one_node(2)
    plan = even_plan(model, cluster, stages=2, micro_batches=2)
    clipped, free = (compile_plan(plan, model, clipped=each) for each in (True, False))
    check_program(free)
    for one, other in zip(clipped.ranks, free.ranks, strict=True):
        assert other == (*one[:-2], one[-1], one[-2])
    with pytest.raises(ProgramError) as caught:
        check_program(Program(ranks=(clipped.ranks[0], free.ranks[1])))
    assert "REDUCE_NORM on rank 0, OPTIMIZER_STEP on rank 1" in str(caught.value)


def test_without_clipping_every_bucket_is_updated_for_itself() -> None:
    model = chain([1.0] * 4, tied=True)
    cluster = one_node(4)
    replicas = even_plan(model, cluster, data=2, stages=2, micro_batches=2)
    program = compile_plan(replicas, model, bucket_bytes=1, clipped=False)
    check_program(program)
    steps = [
        {(i.layers, i.tied) for i in own if i.op is Op.OPTIMIZER_STEP} for own in program.ranks
    ]
    tied = (None, "shared")
    assert (
        steps
        == [{((0, 1), None), ((1, 2), None), tied}] * 2
        + [{((2, 3), None), ((3, 4), None), tied}] * 2
    )
    own = tuple(i for i in program.ranks[0] if (i.op, i.layers) != (Op.OPTIMIZER_STEP, (1, 2)))
    with pytest.raises(ProgramError) as caught:
        check_program(Program(ranks=(own, *program.ranks[1:])))
    assert "0REDUCE_GRAD layers=1:2" in str(caught.value)
    assert "an OPTIMIZER_STEP of the same layers" in str(caught.value)


def test_a_tied_gradient_is_summed_with_the_last_backward_that_adds_to_it() -> None:
    """The first devices hold the first and the last of four stages, which share a weight. The sum
    is posted ahead of the last backward, in which it begins."""
    model = chain([1.0] * 4, tied=True)
    outer, inner = (("n:0",), ("n:1",)), (("n:2",), ("n:3",))
    stages = tuple(
        Stage(layers=(s, s + 1), devices=devices)
        for s, devices in enumerate((outer, inner, inner, outer))
    )
    plan = plan_by_hand(Pipeline(micro_batches=4, rows=2, stages=stages), schedule="zb-v")
    own = compile_plan(plan, model).ranks[0]
    (posted,) = [n for n, i in enumerate(own) if i.op is REDUCE_GRAD and i.tied == "shared"]
    completing = Counter(i.stage for i in own[:posted] if i.op.completes_gradients)
    assert completing == {0: 3, 3: 4}
    assert [i.stage for i in own[posted:] if i.op.completes_gradients] == [0]


def test_what_one_rank_alone_holds_is_updated_before_what_is_shared() -> None:
    model, cluster = chain([1.0, 1.0], tied=True), one_node(2)
    plan = even_plan(model, cluster, stages=2, micro_batches=2)
    for own in compile_plan(plan, model, clipped=False).ranks:
        steps = [(i.layers, i.tied) for i in own if i.op is Op.OPTIMIZER_STEP]
        assert steps == [(None, None), (None, "shared")]


def test_stages_of_unlike_tensor_widths_reduce_with_their_own_kind():
    model = chain([1.0] * 4)
    stages = (
        Stage(layers=(0, 2), devices=(("n:0",), ("n:1",))),
        Stage(layers=(2, 4), devices=(("n:2", "n:3"),)),
    )
    plan = plan_by_hand(Pipeline(micro_batches=1, rows=2, stages=stages))
    program = compile_plan(plan, model)
    check_program(program)
    reducing = [any(i.op is REDUCE_GRAD for i in instructions) for instructions in program.ranks]
    assert reducing[0]
    assert reducing[1]
