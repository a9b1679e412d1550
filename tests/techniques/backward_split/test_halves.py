"""How a backward in two parts is priced: measured parts, and weight gradients that are joined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.cost.priced_plan import PricedPlan
from meshwright.cost.pricing import price_program
from meshwright.cost.profile import LayerTime, Profile
from meshwright.emulation.virtual_times import part_key, virtual_times
from meshwright.plan.spec import Plan
from meshwright.program.compile import compile_plan
from meshwright.program.operations import Op
from meshwright.techniques.backward_split.price import backward_shares
from plain_constants import plain
from worlds import DEVICE, divided, even_model, even_plan, in_a_row, layer, one_node

MODEL, CLUSTER = even_model(4), one_node(4)


def measured(points: Sequence[tuple[int, float, float, float]]) -> Profile:
    """Rows, seconds of the whole backward, of its first part, of its second."""
    return plain(
        layers=tuple(
            LayerTime(
                device="g",
                signature="s",
                precision="fp32",
                tensor=1,
                rows=rows,
                forward_seconds=1.0,
                backward_seconds=whole,
                input_seconds=inputs,
                weight_seconds=weights,
            )
            for rows, whole, inputs, weights in points
        ),
    )


FIXED = measured([(1, 10.0, 6.0, 5.0), (4, 28.0, 18.0, 11.0)])
"""I = 2 + 4 rows, W = 3 + 2 rows, B = 4 + 6 rows."""


@given(st.integers(1, 64), st.integers(1, 4))
def test_measured_parts_lie_on_the_line_through_the_measurements(rows: int, tensor: int) -> None:
    shares = backward_shares(MODEL, DEVICE, tensor, rows, FIXED)
    assert shares[0] * (4 + 6 * rows) == pytest.approx([2 + 4 * rows, 3 + 2 * rows])


def test_one_measured_size_gives_its_shares_at_every_size() -> None:
    for rows in (1, 3, 100):
        shares = backward_shares(MODEL, DEVICE, 1, rows, measured([(3, 8.0, 5.0, 4.0)]))
        assert shares[0] == pytest.approx([5 / 8, 4 / 8])


def test_where_the_line_is_below_zero_the_nearest_size_counts() -> None:
    steep = measured([(4, 1.0, 0.5, 0.25), (8, 9.0, 6.0, 3.0)])
    assert backward_shares(MODEL, DEVICE, 1, 1, steep)[0] == pytest.approx([0.5, 0.25])


def test_the_nearest_measured_width_counts() -> None:
    one, four = measured([(1, 8.0, 5.0, 4.0)]), measured([(1, 8.0, 6.0, 2.0)])
    layers = (*one.layers, replace(four.layers[0], tensor=4))
    both = replace(one, layers=layers)
    shares = [backward_shares(MODEL, DEVICE, width, 1, both)[0, 0] for width in (1, 2, 3, 8)]
    assert shares == pytest.approx([5 / 8, 5 / 8, 6 / 8, 6 / 8])


def priced(plan: Plan, rank: int) -> dict[tuple[Op, int], float]:
    """Seconds of one rank's kinds of work, by how many micro-batches they serve."""
    program = compile_plan(plan, MODEL)
    prices = price_program(program, plan, MODEL, CLUSTER, FIXED)
    return {
        (i.op, 1 if i.micro_batches is None else i.micro_batches[1] - i.micro_batches[0]): p.seconds
        for i, p in zip(program.ranks[rank], prices.ranks[rank], strict=True)
    }


def test_joined_weight_gradients_are_one_product_over_all_rows() -> None:
    plan = even_plan(MODEL, CLUSTER, stages=4, micro_batches=4, schedule="gpipe-2bp-batched")
    seconds = priced(plan, 1)
    assert seconds[Op.BACKWARD_INPUT, 1] == pytest.approx(6.0)
    assert seconds[Op.BACKWARD_WEIGHT, 4] == pytest.approx(3 + 2 * 4)


def test_a_first_stage_does_its_parts_like_the_others() -> None:
    seconds = priced(even_plan(MODEL, CLUSTER, stages=4, micro_batches=8, schedule="1f1b-2bp"), 0)
    assert seconds[Op.BACKWARD_INPUT, 1] == pytest.approx(6.0)
    assert seconds[Op.BACKWARD_WEIGHT, 1] == pytest.approx(5.0)
    assert seconds[Op.BACKWARD, 1] == pytest.approx(10.0)


@pytest.mark.parametrize("schedule", ["gpipe-2bp-batched", "1f1b-2bp", "zb-h1"])
def test_virtual_devices_live_by_the_same_parts(schedule: str) -> None:
    plan = even_plan(MODEL, CLUSTER, stages=4, micro_batches=4, schedule=schedule)
    table = virtual_times(PricedPlan(plan, MODEL, CLUSTER, FIXED))
    for rank, times in enumerate(table.ranks):
        expected = {
            part_key(rank, op, count): seconds
            for (op, count), seconds in priced(plan, rank).items()
            if op in (Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT)
        }
        assert times.parts == expected


def test_a_backward_that_has_one_half_only_is_not_walked_twice() -> None:
    """The first layer needs no gradient of its input: its backward is as one product."""
    first = layer("first", 1e9, backward_flops=1e9, parameters=10)
    model = in_a_row([first, layer("last", 1e9, parameters=10)], cut_bytes=1.0)
    shares = backward_shares(model, DEVICE, 1, 1)
    assert shares[0].tolist() == [0.0, 1.0]
    assert shares[1].tolist() == pytest.approx([1.11 / 2, 1.11 / 2])


@pytest.mark.parametrize("tensor", [1, 2, 8])
def test_ranks_divide_the_gradients_of_weights_like_the_layer(tensor: int) -> None:
    """Products of 8 GFLOP at the peak, attention of 2 at half of it: a backward counts as 16 + 8,
    of which the gradients of weights are the products once more."""
    attends = layer("a", 8e9, attention_flops=2e9, backward_flops=20e9, parameters=10)
    attends = divided(attends, units=8, flops=10e9, parameters=10)
    model = in_a_row([attends, attends], cut_bytes=1.0)
    shares = backward_shares(model, DEVICE, tensor, 1)
    assert shares[1].tolist() == pytest.approx([1.11 * 2 / 3, 1.11 / 3])
