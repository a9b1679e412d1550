"""Seconds that the layers and the optimizer compute, communication apart."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright.cluster.spec import DeviceType, Precision
from meshwright.cost.profile import LayerTime, Profile
from meshwright.errors import ClusterError, Problem
from meshwright.model.spec import Layer, LayerGraph
from meshwright.records import record
from meshwright.units import format_flops

Array = NDArray[np.float64]
Pair = Array
"""[forward, backward], in seconds unless said otherwise."""

LAUNCH_SECONDS = np.array([50e-6, 100e-6])
"""Least time of a layer's forward and backward: a host that feeds an accelerator eagerly spends
about 5 us on an operation, a layer is about ten, and the backward has twice as many."""

ACTIVATION_PASSES = np.array([1.0, 2.0])
"""A backward reads what the forward touched, and as many gradients."""

WEIGHT_BYTES: dict[Precision, tuple[float, float]] = {
    "fp64": (8.0, 40.0),
    "fp32": (4.0, 20.0),
    "fp16": (8.0, 22.0),
    "bf16": (8.0, 22.0),
}
"""Bytes moved per parameter by one forward and one backward. fp32: the weight is read; it is read
again, its gradient written, and added to the sum (two reads, one write). With 16-bit arithmetic the
fp32 weight is read, its cast written and read; then the cast is read, a 16-bit gradient written,
widened (2 + 4) and added (4 + 4 + 4). fp64 is twice fp32."""

OPTIMIZER_BYTES = {"adamw": 44.0, "sgd": 28.0}
"""Bytes moved per fp32 parameter by clipping (norm 4, scaling 8), the update (AdamW reads weight,
gradient and two moments and writes three: 28; SGD reads two and writes one: 12) and clearing the
gradient (4)."""


@record
class LayerSeconds:
    """Seconds per micro-batch of every layer, on one tensor rank."""

    forward: Array
    backward: Array
    measured: int
    """Layers whose times come from measurements of this layer on this device type."""


def peak_flops(device: DeviceType, precision: Precision) -> float:
    """Dense peak in FLOP/s. Raises ClusterError where the device does not offer the precision."""
    if precision not in device.peak:
        offered = ", ".join(f"{name} {format_flops(v)}" for name, v in device.peak.items())
        raise ClusterError(
            Problem(
                f"device type {device.name}",
                f"peak.{precision}",
                "nothing",
                f"its peak in {precision}",
                f"it offers {offered or 'no precision'}: choose one of these, or add the figure",
            )
        )
    return device.peak[precision]


def split_share(layer: Layer, split: float, whole: float, tensor: int) -> float:
    """Share of `whole` left on each of `tensor` ranks when `split` of it is divided."""
    if tensor == 1 or layer.tensor_units == 0 or whole == 0:
        return 1.0
    return 1.0 - split / whole * (1.0 - 1.0 / tensor)


def roofline(
    layer: Layer, device: DeviceType, precision: Precision, tensor: int, rows: float
) -> Pair:
    """Seconds of forward and backward by the roofline, on one tensor rank.

        t = max(matmul / (peak e_mm) + attention / (peak e_att), bytes / (bandwidth e_mem), launch)

    The attention's share of the backward is taken to be its share of the forward. Roofline:
    Williams, Waterman, Patterson, CACM 52(4), 2009. Raises ClusterError (see `peak_flops`).
    """
    peak = peak_flops(device, precision)
    total = layer.forward_flops + layer.attention_flops
    attention = layer.attention_flops / total if total else 0.0
    flops = np.array([total, layer.backward_flops])
    flops *= rows * split_share(layer, layer.split_flops, total, tensor)
    seconds_per_flop = (1 - attention) / device.matmul_efficiency
    seconds_per_flop += attention / device.attention_efficiency
    parameters = layer.parameters * split_share(
        layer, layer.split_parameters, layer.parameters, tensor
    )
    activations = layer.traffic_bytes * split_share(layer, layer.split_flops, total, tensor)
    moved = rows * activations * ACTIVATION_PASSES + parameters * np.array(WEIGHT_BYTES[precision])
    memory = moved / (device.memory_bandwidth * device.memory_efficiency)
    compute = flops * seconds_per_flop / peak
    result: Pair = np.maximum(np.maximum(compute, memory), LAUNCH_SECONDS)
    return result


def _at_rows(points: dict[int, Pair], rows: int, model: Callable[[int], Pair]) -> Pair:
    """Linear between measured sizes and, beyond them, along the two nearest; one size alone is
    scaled by the roofline."""
    sizes = sorted(points)
    if rows in points:
        return points[rows]
    if len(sizes) == 1:
        return points[sizes[0]] * model(rows) / model(sizes[0])
    right = min(max(int(np.searchsorted(sizes, rows)), 1), len(sizes) - 1)
    low, high = sizes[right - 1], sizes[right]
    slope = (points[high] - points[low]) / (high - low)
    result: Pair = np.maximum(points[low] + slope * (rows - low), 0.0)
    return result


def _measured(
    widths: dict[int, dict[int, Pair]],
    tensor: int,
    rows: int,
    model: Callable[[int, float], Pair],
) -> Pair:
    """Measured seconds; a width that was not measured is scaled from the nearest narrower one (else
    the narrowest) by the roofline."""
    if tensor in widths:
        return _at_rows(widths[tensor], rows, lambda r: model(tensor, r))
    narrower = [width for width in widths if width < tensor]
    width = max(narrower) if narrower else min(widths)
    known = _at_rows(widths[width], rows, lambda r: model(width, r))
    result: Pair = known * model(tensor, rows) / model(width, rows)
    return result


def _measurements(
    profile: Profile | None, device: str, precision: Precision
) -> dict[str, dict[int, dict[int, Pair]]]:
    """signature -> tensor width -> rows -> seconds."""
    found: dict[str, dict[int, dict[int, Pair]]] = {}
    for entry in profile.layers if profile else ():
        if entry.device == device and entry.precision == precision:
            widths = found.setdefault(entry.signature, {})
            widths.setdefault(entry.tensor, {})[entry.rows] = _seconds(entry)
    return found


def _seconds(entry: LayerTime) -> Pair:
    return np.array([entry.forward_seconds, entry.backward_seconds])


def _calibration(
    times: dict[str, dict[int, dict[int, Pair]]],
    kinds: dict[str, Layer],
    model: Callable[[Layer, int, float], Pair],
) -> Pair:
    """Median of measured over roofline seconds, over everything measured on one device type."""
    ratios = [
        seconds / model(kinds[signature], width, rows)
        for signature, widths in times.items()
        if signature in kinds and kinds[signature].forward_flops
        for width, points in widths.items()
        for rows, seconds in points.items()
    ]
    return np.median(ratios, axis=0) if ratios else np.ones(2)


def layer_seconds(
    model: LayerGraph, device: DeviceType, tensor: int, rows: int, profile: Profile | None = None
) -> LayerSeconds:
    """Seconds of every layer for a micro-batch of `rows` rows on each of `tensor` ranks.

    Measured where the profile knows the layer on this device type, else the roofline, times the
    median of measured over roofline where the device type was measured on other layers.
    Raises ClusterError where the device does not offer the model's precision.
    """
    precision = model.precision

    def price(layer: Layer, width: int, size: float) -> Pair:
        return roofline(layer, device, precision, width, size)

    kinds = {layer.signature: layer for layer in reversed(model.layers)}
    times = _measurements(profile, device.name, precision)
    calibration = _calibration(times, kinds, price) if times else np.ones(2)
    seconds: dict[str, Any] = {}
    for signature, layer in kinds.items():
        if signature in times:
            seconds[signature] = _measured(times[signature], tensor, rows, partial(price, layer))
        else:
            seconds[signature] = calibration * price(layer, tensor, rows)
    every = np.array([seconds[layer.signature] for layer in model.layers]).reshape(-1, 2)
    measured = sum(layer.signature in times for layer in model.layers)
    return LayerSeconds(forward=every[:, 0], backward=every[:, 1], measured=measured)


def optimizer_seconds(
    device: DeviceType,
    optimizer: str,
    parameters: float,
    profile: Profile | None = None,
    precision: Precision = "fp32",
) -> float:
    """Seconds of one optimizer step, clipping included, on a rank that holds `parameters`.

    Measured, else bound by memory: t = bytes moved / (bandwidth x efficiency).
    """
    for entry in profile.optimizers if profile else ():
        if entry.device == device.name and entry.optimizer == optimizer:
            return entry.overhead_seconds + entry.seconds_per_parameter * parameters
    wide = 2 if precision == "fp64" else 1
    moved = OPTIMIZER_BYTES[optimizer] * wide * parameters
    return moved / (device.memory_bandwidth * device.memory_efficiency)
