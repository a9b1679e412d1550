"""Layer times follow the roofline, and measurements where there are any."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.cluster.spec import DeviceType, ReachedShares
from meshwright.cost.compute import (
    OPTIMIZER_BYTES,
    device_seconds,
    layer_seconds,
    optimizer_seconds,
    roofline,
)
from meshwright.cost.constants import Calibration, DeviceConstants
from meshwright.cost.profile import LayerTime, OptimizerTime, Profile
from meshwright.errors import ClusterError
from meshwright.model.spec import Division, Layer, LayerGraph
from plain_constants import PLAIN_DEVICE, plain
from worlds import divided, layer

GPU = DeviceType(
    name="gpu",
    memory=1 << 34,
    memory_bandwidth=1e12,
    peak={"bf16": 100e12, "fp32": 10e12},
    matmul_efficiency=0.5,
    attention_efficiency=0.25,
    memory_efficiency=0.8,
)
BLOCK = Layer(
    name="block",
    signature="block",
    forward_flops=8e12,
    attention_flops=2e12,
    backward_flops=20e12,
    traffic_bytes=1e8,
    parameters=10**7,
    saved_bytes=1e7,
    parallel=(Division(axis="tensor", units=8, parameters=10**7, flops=10e12),),
)
DRY = divided(replace(BLOCK, traffic_bytes=0.0, parameters=0), parameters=0)
"""Computes, and moves nothing."""


def graph(*layers: Layer) -> LayerGraph:
    return LayerGraph(name="m", sequence=128, precision="bf16", layers=layers, tensors=())


def timed(signature: str, rows: int, forward: float, **changes: Any) -> LayerTime:
    facts: dict[str, Any] = {
        "device": "gpu",
        "signature": signature,
        "precision": "bf16",
        "tensor": 1,
        "rows": rows,
        "forward_seconds": forward,
        "backward_seconds": 3 * forward,
    }
    return LayerTime(**{**facts, **changes})


def profile(*layers: LayerTime) -> Profile:
    return Profile(model="m", sequence=128, layers=layers)


def calibration(**constants: float) -> Calibration:
    return Calibration(devices={"gpu": DeviceConstants(**constants)})


def forward(layers: tuple[LayerTime, ...], rows: int, tensor: int = 1) -> float:
    known = plain(layers=layers)
    return float(layer_seconds(graph(BLOCK), GPU, tensor, rows, known).forward[0])


def quickly(known: Layer, tensor: int, rows: int) -> Any:
    """By the roofline, with next to no time for the host."""
    return roofline(known, GPU, "bf16", tensor, rows, PLAIN_DEVICE)


def test_matmul_and_attention_each_at_its_own_efficiency() -> None:
    """8 TFLOP at 50 TFLOP/s and 2 TFLOP at 25 TFLOP/s a row: 0.24 s; backward twice that."""
    forward, backward = quickly(DRY, 1, 3)
    assert forward == pytest.approx(3 * 0.24)
    assert backward == pytest.approx(3 * 0.48)


def test_shares_by_precision_stand_in_place_of_the_efficiency_in_forward_and_backward() -> None:
    """8 TFLOP at 80 and 40 TFLOP/s a row; attention keeps its own efficiency."""
    shares = {"bf16": ReachedShares(forward=0.8, backward=0.4)}
    forward, backward = device_seconds(DRY, replace(GPU, matmul_shares=shares), "bf16", 1, 1)
    assert forward == pytest.approx(0.1 + 0.08)
    assert backward == pytest.approx(2 * (0.2 + 0.08))
    fitted = DeviceConstants(matmul_efficiency=0.5)
    kind = replace(GPU, matmul_shares=shares)
    assert device_seconds(DRY, kind, "bf16", 1, 1, fitted) == pytest.approx([0.24, 0.48])


def test_tf32_moves_the_bytes_of_fp32_and_computes_at_a_peak_of_its_own() -> None:
    kind = replace(GPU, peak={"fp32": 10e12, "tf32": 50e12})
    products = replace(DRY, attention_flops=0.0, backward_flops=16e12)
    assert device_seconds(products, kind, "tf32", 1, 1) == pytest.approx([8 / 25, 16 / 25])
    moved = replace(products, forward_flops=1e-9, backward_flops=2e-9, parameters=10**9)
    exact, rounded = (device_seconds(moved, kind, p, 1, 1) for p in ("fp32", "tf32"))
    assert rounded == pytest.approx(exact)


def test_compiled_layers_move_fewer_activation_bytes_and_no_fewer_weights() -> None:
    still = replace(DRY, forward_flops=1e-9, attention_flops=0.0, backward_flops=2e-9)
    active = replace(still, traffic_bytes=8e9)
    half = DeviceConstants(activation_traffic=0.5)
    assert device_seconds(active, GPU, "bf16", 1, 1, half) == pytest.approx([0.005, 0.01])
    heavy = replace(still, parameters=10**9)
    assert device_seconds(heavy, GPU, "bf16", 1, 1, half) == pytest.approx(
        device_seconds(heavy, GPU, "bf16", 1, 1)
    )


def test_bytes_moved_add_to_the_computation_weights_included() -> None:
    """(2 rows x 1e8 + 8 x 1e7) bytes at 0.8e12 B/s, 2 x 1e10 FLOP at 50e12 FLOP/s."""
    light = replace(BLOCK, forward_flops=1e10, attention_flops=0.0, backward_flops=2e10)
    forward, backward = quickly(light, 1, 2)
    assert forward == pytest.approx((2e8 + 8e7) / 0.8e12 + 2e10 / 50e12)
    assert backward == pytest.approx((4e8 + 22e7) / 0.8e12 + 4e10 / 50e12)


def test_a_tiny_layer_costs_its_launches() -> None:
    tiny = layer(flops=1, traffic_bytes=4)
    assert roofline(tiny, GPU, "bf16", 1, 1).tolist() == [2e-4, 4e-4]
    slow = DeviceConstants(launch_forward=1e-3, launch_backward=3e-3)
    assert roofline(tiny, GPU, "bf16", 1, 1, slow).tolist() == [1e-3, 3e-3]


def test_a_layer_that_computes_nothing_costs_nothing() -> None:
    passing = replace(
        BLOCK, forward_flops=0.0, attention_flops=0.0, backward_flops=0.0, traffic_bytes=0.0
    )
    passing = divided(replace(passing, parameters=0), parameters=0)
    assert roofline(passing, GPU, "bf16", 1, 8).tolist() == [0.0, 0.0]


def test_tensor_ranks_divide_what_can_be_split() -> None:
    half = divided(DRY, flops=5e12)
    whole = quickly(DRY, 1, 1)
    assert quickly(DRY, 4, 1) == pytest.approx(whole / 4)
    assert quickly(half, 2, 1) == pytest.approx(whole * 0.75)
    assert quickly(divided(DRY, flops=0.0), 2, 1) == pytest.approx(whole)
    vocabulary = divided(DRY, units=0)
    assert quickly(vocabulary, 2, 1) == pytest.approx(whole / 2)


def test_tensor_ranks_divide_the_traffic_of_what_they_keep_divided() -> None:
    """Of a quarter of the bytes moved, each of two ranks moves half."""
    quiet = replace(BLOCK, forward_flops=1e-9, attention_flops=0.0, backward_flops=1e-9)
    quiet = divided(replace(quiet, parameters=0), flops=0.0, traffic_bytes=2.5e7)
    whole = quickly(quiet, 1, 4)
    assert quickly(quiet, 2, 4) == pytest.approx(whole * 0.875)


def test_a_precision_that_is_not_offered_is_named_with_those_that_are() -> None:
    with pytest.raises(
        ClusterError, match=r"gpu.*\n*.*bf16 100 TFLOP/s, fp32 10 TFLOP/s"
    ) as failure:
        roofline(BLOCK, GPU, "fp64", 1, 1)
    assert failure.value.problems[0].field == "peak.fp64"


@given(rows=st.integers(1, 64), tensor=st.sampled_from([1, 2, 4, 8]))
def test_more_rows_never_take_less_time_nor_more_ranks_more(rows: int, tensor: int) -> None:
    model = graph(BLOCK, replace(BLOCK, signature="other", forward_flops=1e9))
    here = layer_seconds(model, GPU, tensor, rows)
    assert np.all(layer_seconds(model, GPU, tensor, rows + 1).forward >= here.forward)
    assert np.all(layer_seconds(model, GPU, 2 * tensor, rows).backward <= here.backward)
    assert here.measured == 0


def test_measured_sizes_come_out_as_measured_and_those_between_on_the_line() -> None:
    times = (timed("block", 1, 1.0), timed("block", 4, 2.5), timed("block", 8, 6.5))
    assert [forward(times, rows) for rows in (1, 2, 4, 6, 8)] == [1.0, 1.5, 2.5, 4.5, 6.5]
    both = layer_seconds(graph(BLOCK, BLOCK), GPU, 1, 2, profile(*times))
    assert both.backward.tolist() == [4.5, 4.5]
    assert both.measured == 2


def test_beyond_the_measured_sizes_the_nearest_two_go_on_but_not_below_zero() -> None:
    times = (timed("block", 4, 2.0), timed("block", 8, 5.0), timed("block", 12, 9.0))
    assert forward(times, 16) == pytest.approx(13.0)
    assert forward(times, 2) == pytest.approx(0.5)
    assert forward(times, 1) == 0.0


def test_of_one_measured_size_the_host_keeps_its_share_and_the_rest_grows() -> None:
    """0.48 s of work at two rows; of the other 0.52 s, the host took at most a launch."""
    times = (timed("block", 2, 1.0),)
    assert forward(times, 6) == pytest.approx(3.0 - 2 * 50e-6)
    driven = replace(profile(*times), calibration=calibration(launch_forward=5e-3))
    patient = layer_seconds(graph(BLOCK), GPU, 1, 6, driven)
    assert patient.forward[0] == pytest.approx(3.0 - 2 * 5e-3)


def test_on_a_cpu_host_and_device_are_one() -> None:
    cpu = replace(GPU, processor="cpu")
    found = layer_seconds(graph(BLOCK), cpu, 1, 6, profile(timed("block", 2, 1.0)))
    assert found.forward[0] == pytest.approx(3.0)


def test_an_unmeasured_width_is_scaled_from_a_measured_one() -> None:
    times = (timed("block", 1, 1.0), timed("block", 2, 2.0))
    assert forward(times, 2, tensor=4) == pytest.approx(0.5, rel=1e-2)
    wide = (timed("block", 2, 0.9, tensor=2),)
    assert forward(wide, 2, tensor=1) == pytest.approx(1.8, rel=1e-2)


def test_unmeasured_layers_of_a_measured_device_are_calibrated() -> None:
    """The one measurement is twice its roofline, forward; three times three halves, backward."""
    model = graph(BLOCK, replace(BLOCK, signature="other", forward_flops=18e12))
    found = layer_seconds(model, GPU, 1, 1, profile(timed("block", 1, 0.48)))
    plain = layer_seconds(model, GPU, 1, 1)
    assert found.forward[1] == pytest.approx(2 * plain.forward[1], rel=2e-3)
    assert found.backward[1] == pytest.approx(3 * plain.backward[1], rel=2e-3)
    assert found.measured == 1


def test_measurements_of_other_devices_and_precisions_say_nothing() -> None:
    foreign = (timed("block", 1, 9.0, device="tpu"), timed("block", 1, 9.0, precision="fp32"))
    assert forward(foreign, 1) == pytest.approx(0.24, rel=2e-3)


def test_the_optimizer_moves_its_bytes_unless_it_was_measured() -> None:
    assert optimizer_seconds(GPU, "adamw", 10**9) == pytest.approx(44e9 / 0.8e12)
    doubled = optimizer_seconds(GPU, "sgd", 10**9, precision="fp64")
    assert doubled == pytest.approx(2 * OPTIMIZER_BYTES["sgd"] * 1e9 / 0.8e12)
    entry = OptimizerTime(
        device="gpu", optimizer="adamw", seconds_per_parameter=1e-9, overhead_seconds=0.5
    )
    measured = Profile(model="m", sequence=128, optimizers=(entry,))
    assert optimizer_seconds(GPU, "adamw", 10**9, measured) == pytest.approx(1.5)
    assert optimizer_seconds(GPU, "sgd", 10**9, measured) < 0.1
    assert optimizer_seconds(GPU, "adamw", 0, measured) == 0.0, "who trains nothing takes no step"
