"""Sharded data parallelism: what is gathered, what is hidden, what recomputation adds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import worlds
from meshwright.cluster.topology import topology
from meshwright.cost.compute import layer_seconds
from meshwright.cost.constants import Calibration
from meshwright.cost.profile import Profile
from meshwright.cost.sharded import (
    ShardedStep,
    overlapped,
    seconds_with_recomputation,
    shard_seconds,
    sharded_step_seconds,
)
from meshwright.model.spec import Tied
from meshwright.model.unfused import MOVED, SAVED, with_unfused_attention
from meshwright.techniques.activation_checkpointing.model import with_recomputation as recomputed
from plain_constants import PLAIN_DEVICE, PLAIN_SYSTEM, PLAINLY, plain
from worlds import DEVICE, divided, even_model, one_node

STEP = ShardedStep(rows=1, micro_batches=2, optimizer="sgd")


def exposed(share: float, width: float = 1.0) -> Profile:
    system = replace(PLAIN_SYSTEM, shard_exposure=share, gradient_width=width)
    return plain(calibration=Calibration(others=PLAIN_DEVICE, system=system))


def test_gathers_and_scatters_move_every_byte_but_ones_own() -> None:
    """4 MB in fp32 over two devices: each gets half of it, at 1 GB/s."""
    model = even_model(3, parameters=10**6)
    gather, scatter = shard_seconds(model, topology(one_node(2)), ["n:0", "n:1"], 0.0, 0.5)
    assert gather == pytest.approx([2e-3] * 3)
    assert scatter == pytest.approx([1e-3] * 3)
    tied = replace(model, tied=(Tied(name="w", layers=(0, 2), parameters=10**6),))
    assert shard_seconds(tied, topology(one_node(2)), ["n:0", "n:1"], 0.0, 0.5)[0] == pytest.approx(
        [4e-3, 2e-3, 2e-3]
    )


def test_a_step_hides_what_it_can() -> None:
    """Layers of 1 + 2 ms; 2 ms to gather, 2 ms to gather again and 2 ms to scatter: links bind."""
    model, cluster = even_model(3, parameters=10**6), one_node(2)
    hidden = sharded_step_seconds(model, cluster, STEP, exposed(0.0))
    assert hidden == pytest.approx(2 * 3 * (2e-3 + 4e-3), rel=1e-3)
    nothing = sharded_step_seconds(model, cluster, STEP, exposed(1.0))
    assert nothing == pytest.approx(2 * 3 * (3e-3 + 6e-3), rel=1e-3)
    once = replace(STEP, sharding="gradients")
    assert sharded_step_seconds(model, cluster, once, exposed(1.0)) == pytest.approx(
        2 * 3 * (3e-3 + 4e-3), rel=1e-3
    )


def test_alone_a_device_only_computes() -> None:
    model = even_model(3, parameters=10**6)
    assert sharded_step_seconds(model, one_node(1), STEP, PLAINLY) == pytest.approx(
        2 * 9e-3, rel=1e-3
    )


def test_each_device_computes_whole_layers() -> None:
    """Layers that tensor ranks could divide take as long as others."""
    whole, divisible = (worlds.model([10.0] * 3, units=units) for units in (0, 4))
    seconds = [sharded_step_seconds(each, one_node(2), STEP) for each in (whole, divisible)]
    assert seconds[0] == pytest.approx(seconds[1])


@given(st.floats(0, 10), st.floats(0, 10), st.floats(0, 1))
def test_overlap_lies_between_the_longer_and_the_sum(a: float, b: float, share: float) -> None:
    found = float(overlapped(np.array(a), np.array(b), share))
    assert max(a, b) <= found <= a + b + 1e-12


def test_recomputation_repeats_the_forward_of_layers_with_attention() -> None:
    model = even_model(2)
    attends = replace(model.layers[0], attention_flops=1e6, signature="attends")
    model = replace(model, layers=(attends, model.layers[1]))
    plain = layer_seconds(model, DEVICE, 1, 1)
    found = seconds_with_recomputation(plain, model)
    assert found.backward[0] == pytest.approx(plain.backward[0] + plain.forward[0])
    assert found.backward[1] == plain.backward[1]


def test_recomputed_layers_keep_their_inputs_alone() -> None:
    """But the first, which has none but the batch, and the last, whose backward follows at once."""
    model = even_model(3, cut_bytes=10.0)
    graph = recomputed(model)
    first, middle, last = graph.layers
    assert middle.backward_flops == 3e9
    assert (middle.saved_bytes, middle.workspace_bytes) == (10.0, 990.0)
    assert (first.saved_bytes, first.backward_flops) == (1000.0, 3e9)
    assert last == model.layers[2]
    assert [tensor.kept for tensor in graph.tensors] == [True, False]


def test_unfused_attention_keeps_and_moves_its_scores() -> None:
    model = even_model(2)
    attends = divided(replace(model.layers[0], attention_flops=1e6), saved_bytes=500.0)
    model = replace(model, sequence=8, layers=(attends, model.layers[1]))
    found = with_unfused_attention(model, heads=3)
    scores = 3 * 8**2 * 4
    assert found.layers[0].traffic_bytes == MOVED * scores
    assert found.layers[0].saved_bytes == attends.saved_bytes + SAVED * scores
    assert found.layers[0].along("tensor").saved_bytes == 500.0 + SAVED * scores
    assert found.layers[1] == model.layers[1]


def test_scores_are_divided_like_the_heads_of_a_layer_that_keeps_its_input_alone() -> None:
    whole = divided(replace(even_model(2).layers[0], attention_flops=1e6), units=8, flops=1e6)
    model = replace(even_model(2), sequence=8, layers=(whole, whole))
    again = with_unfused_attention(recomputed(model), heads=8).layers[0]
    assert again.along("tensor").saved_bytes == SAVED * 8 * 8**2 * 4
    assert again.along("tensor").traffic_bytes == MOVED * 8 * 8**2 * 4
