"""Layers that repeat their forward: what tensor ranks divide of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshwright.cost.compute import device_seconds
from meshwright.model.config import NAMED
from meshwright.model.spec import Layer, LayerGraph
from meshwright.model.transformer.counted_graph import counted_graph
from meshwright.techniques.activation_checkpointing.model import (
    REPEATED_TRAFFIC,
    with_recomputation,
)
from plain_constants import PLAIN_DEVICE
from worlds import device, divided, in_a_row, layer

ROWS = 4


def wholly_divided() -> LayerGraph:
    """Three layers that move as long as they compute; of eight ranks each does an eighth."""
    amounts = {"traffic_bytes": 1e8, "parameters": 10**6, "saved_bytes": 5e7}
    one = layer("block", 1e9, attention_flops=1e8, cast_parameters=10**6, **amounts)
    one = divided(one, units=8, flops=1.1e9, **amounts)
    return in_a_row((one,) * 3, cut_bytes=1e6)


def seconds(of: Layer, tensor: int) -> list[float]:
    slow = replace(device("d"), memory_bandwidth=1e12)
    found = device_seconds(of, slow, "fp32", tensor, ROWS, PLAIN_DEVICE)
    return [float(each) for each in found]


def test_of_a_recomputed_layer_ranks_divide_all_that_they_divide_of_it() -> None:
    """It keeps its input alone, of which ranks divide nothing: that says nothing of its work."""
    again = with_recomputation(wholly_divided()).layers[1]
    assert again.along("tensor").saved_bytes == 0.0
    assert seconds(again, 8) == pytest.approx([each / 8 for each in seconds(again, 1)])


def test_repeating_the_forward_takes_as_long_as_the_forward_at_any_width() -> None:
    """A backward moves twice the activations of a forward: with the repeated one, three times."""
    plain = wholly_divided().layers[1]
    again = with_recomputation(wholly_divided()).layers[1]
    light = [replace(each, parameters=0, cast_parameters=0) for each in (plain, again)]
    assert pytest.approx(4) == REPEATED_TRAFFIC * 3
    for tensor in (1, 2, 8):
        (forward, backward), (_, repeated) = (
            seconds(divided(each, parameters=0), tensor) for each in light
        )
        compute = [
            seconds(divided(replace(each, traffic_bytes=0.0), parameters=0), tensor)
            for each in light
        ]
        assert compute[1][1] == pytest.approx(compute[0][1] + compute[0][0])
        moved = forward - compute[0][0]
        assert backward - compute[0][1] == pytest.approx(2 * moved)
        assert repeated - compute[1][1] == pytest.approx(2 * moved * REPEATED_TRAFFIC)


@pytest.mark.parametrize("name", ["gpt2", "llama-2-7b"])
def test_the_blocks_of_real_models_are_divided_as_before(name: str) -> None:
    model = counted_graph(NAMED[name], 1024, "bf16")
    for plain, again in zip(model.layers, with_recomputation(model).layers, strict=True):
        shares = [
            each.along("tensor").traffic_bytes / each.traffic_bytes for each in (plain, again)
        ]
        assert shares[0] == pytest.approx(shares[1])
        assert 0 <= shares[0] <= 1
    block = with_recomputation(model).layers[len(model.layers) // 2]
    assert sum(seconds_in_bf16(block, 8)) < 0.3 * sum(seconds_in_bf16(block, 1))


def seconds_in_bf16(of: Layer, tensor: int) -> list[float]:
    slow = replace(device("d", 300.0, precision="bf16"), memory_bandwidth=2e12)
    return [float(each) for each in device_seconds(of, slow, "bf16", tensor, ROWS, PLAIN_DEVICE)]
