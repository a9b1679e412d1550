"""A backward in two parts on the first stage: no stage waits for the first part, and yet it is
worth doing early."""

from __future__ import annotations

from meshwright.cost.pricing import price_program
from meshwright.program.compile import compile_plan
from meshwright.program.operations import Op
from meshwright.simulate.simulator import simulate_plan
from worlds import even_model, even_plan, one_node

MODEL, CLUSTER = even_model(4, parameters=1000), one_node(4)


def test_each_part_takes_as_long_as_on_other_stages() -> None:
    plan = even_plan(MODEL, CLUSTER, stages=4, micro_batches=8, schedule="1f1b-2bp")
    program = compile_plan(plan, MODEL)
    prices = price_program(program, plan, MODEL, CLUSTER, None)
    seconds = [
        {i.op: p.seconds for i, p in zip(program.ranks[rank], prices.ranks[rank], strict=True)}
        for rank in (0, 1)
    ]
    for op in (Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT):
        assert seconds[0][op] == seconds[1][op] > 0


def test_two_parts_are_faster_with_many_micro_batches_too() -> None:
    """All the work of the first stage at the end would make them slower than one."""
    step = {
        schedule: simulate_plan(
            even_plan(MODEL, CLUSTER, stages=4, micro_batches=16, schedule=schedule), MODEL, CLUSTER
        ).step_seconds
        for schedule in ("1f1b", "1f1b-2bp")
    }
    assert step["1f1b-2bp"] < step["1f1b"]
