"""Predicts the seconds of compute of every layer and of the optimizer, without communication."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright.cluster.spec import (
    DeviceType,
    Precision,
    ReachedShares,
    reached_shares_in,
)
from meshwright.cost.constants import DEFAULT_DEVICE, DeviceConstants, device_constants
from meshwright.cost.profile import LayerTime, Profile
from meshwright.errors import ClusterError, Problem
from meshwright.model.spec import Layer, LayerGraph
from meshwright.records import record
from meshwright.units import format_flops

Array = NDArray[np.float64]
ForwardBackward = Array
"""Two numbers, [forward, backward]; seconds unless said otherwise."""

ACTIVATION_PASSES = np.array([1.0, 2.0])
"""The activation bytes that a forward and a backward move, over those of the forward: a backward
reads the activations and as many gradients."""

WEIGHT_BYTES: dict[Precision, tuple[float, float]] = {
    "fp64": (8.0, 40.0),
    "fp32": (4.0, 20.0),
    "tf32": (4.0, 20.0),
    "fp16": (8.0, 22.0),
    "bf16": (8.0, 22.0),
}
"""Bytes moved per trained parameter by one forward and by one backward.

fp32: the forward reads the weight (4); the backward reads it again, writes its gradient and adds
that to the sum (two reads, one write: 20 in all). 16-bit: the forward reads the fp32 weight and
writes and reads its cast (4 + 2 + 2); the backward reads the cast (2), writes a 16-bit gradient
(2), widens it (2 + 4) and adds it (4 + 4 + 4). fp64 moves twice the bytes of fp32.
"""

FROZEN_BYTES: dict[Precision, tuple[float, float]] = {
    "fp64": (8.0, 8.0),
    "fp32": (4.0, 4.0),
    "tf32": (4.0, 4.0),
    "fp16": (2.0, 2.0),
    "bf16": (2.0, 2.0),
}
"""Bytes moved per frozen parameter by one forward and by one backward: each reads the weight, or
with 16-bit arithmetic its cast, which is kept from step to step."""

OPTIMIZER_BYTES = {"adamw": 44.0, "sgd": 28.0}
"""Bytes moved per fp32 parameter in an optimizer step.

Clipping reads the gradient for its norm (4) and scales it (8); the update of AdamW reads the
weight, the gradient and two moments and writes three of them (28), that of SGD reads two numbers
and writes one (12); clearing writes the gradient (4).
"""


@record
class LayerSeconds:
    """Holds the seconds per micro-batch of every layer on one tensor rank."""

    forward: Array
    """Forward seconds by layer."""
    backward: Array
    """Backward seconds by layer."""
    measured: int
    """The number of layers whose times were measured on this device type, not predicted."""


def peak_flops(device: DeviceType, precision: Precision) -> float:
    """Returns the dense peak of a device in FLOP/s.

    Raises ClusterError if the device does not offer the precision.
    """
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


def matmul_shares(
    device: DeviceType, precision: Precision, constants: DeviceConstants = DEFAULT_DEVICE
) -> ForwardBackward:
    """Returns the shares of the peak that matrix products of forward and backward reach: the
    constant, if it was fitted, in both of them, else the device type's own."""
    fitted = constants.matmul_efficiency
    if fitted is not None:
        return np.array([fitted, fitted])
    own = reached_shares_in(device, precision)
    return np.array([own.forward, own.backward])


def split_share(split: float, whole: float, tensor: int) -> float:
    """Returns the share of `whole` that each of `tensor` ranks holds if they divide `split` of it.

    1 - split / whole * (1 - 1 / tensor)
    """
    if tensor == 1 or whole == 0:
        return 1.0
    return 1.0 - split / whole * (1.0 - 1.0 / tensor)


def device_seconds(
    layer: Layer,
    device: DeviceType,
    precision: Precision,
    tensor: int,
    rows: float,
    constants: DeviceConstants = DEFAULT_DEVICE,
) -> ForwardBackward:
    """Returns the forward and backward seconds that the device itself works on a layer, on one
    tensor rank.

        t = matmul / (peak e_mm) + attention / (peak e_att) + bytes / (bandwidth e_mem)

    Matrix products and elementwise operations are separate kernels that run one after the other, so
    their times add up. Attention is taken to have the same share of the FLOPs in the backward as in
    the forward. Raises ClusterError (see `peak_flops`).
    """
    peak = peak_flops(device, precision)
    e_matmul = matmul_shares(device, precision, constants)
    e_attention = constants.attention_efficiency or device.attention_efficiency
    e_memory = constants.memory_efficiency or device.memory_efficiency
    total = layer.forward_flops + layer.attention_flops
    attention = layer.attention_flops / total if total else 0.0
    flops = np.array([total, layer.backward_flops])
    flops *= rows * split_share(layer.along("tensor").flops, total, tensor)
    seconds_per_flop = (1 - attention) / e_matmul + attention / e_attention
    moved = _moved_bytes(layer, precision, tensor, rows, constants)
    result: ForwardBackward = flops * seconds_per_flop / peak + moved / (
        device.memory_bandwidth * e_memory
    )
    return result * _passes(layer)


def _moved_bytes(
    layer: Layer, precision: Precision, tensor: int, rows: float, constants: DeviceConstants
) -> ForwardBackward:
    """Returns the bytes of activations and weights that forward and backward read and write."""
    divided = layer.along("tensor")
    parameters = layer.parameters * split_share(divided.parameters, layer.parameters, tensor)
    parameters *= constants.weight_traffic
    activations = layer.traffic_bytes * split_share(
        divided.traffic_bytes, layer.traffic_bytes, tensor
    )
    moved: ForwardBackward = rows * activations * constants.activation_traffic * ACTIVATION_PASSES
    moved += parameters * np.array(WEIGHT_BYTES[precision])
    frozen = layer.frozen_parameters * split_share(
        divided.frozen_parameters, layer.frozen_parameters, tensor
    )
    moved += frozen * constants.weight_traffic * np.array(FROZEN_BYTES[precision])
    return moved


def _passes(layer: Layer) -> ForwardBackward:
    """Returns [1, 1], or [1, 0] for a layer without a backward."""
    return np.array([1.0, float(layer.has_backward)])


def roofline(
    layer: Layer,
    device: DeviceType,
    precision: Precision,
    tensor: int,
    rows: float,
    constants: DeviceConstants = DEFAULT_DEVICE,
) -> ForwardBackward:
    """Predicts the forward and backward seconds of a layer from the datasheet, on one tensor rank.

        t = max(overhead + `device_seconds`, launch)

    The form follows the roofline model (Williams, Waterman, Patterson, CACM 52(4), 2009), with the
    host that launches the kernels as one more roof. A layer that computes nothing takes no time.
    Raises ClusterError (see `peak_flops`).
    """
    work = device_seconds(layer, device, precision, tensor, rows, constants)
    if not layer.traffic_bytes and not layer.forward_flops + layer.attention_flops:
        return work
    work += constants.layer_overhead * ACTIVATION_PASSES
    result: ForwardBackward = np.maximum(work, launch_seconds(constants)) * _passes(layer)
    return result


def launch_seconds(constants: DeviceConstants) -> ForwardBackward:
    """Returns the least seconds of a layer's forward and backward: the time to launch their
    kernels."""
    return np.array([constants.launch_forward, constants.launch_backward])


def host_seconds(
    measured: ForwardBackward, work: ForwardBackward, launch: ForwardBackward
) -> ForwardBackward:
    """Returns the part of a measured time for which the device waited for the host: what exceeds
    the device's own work, but at most the time of one launch."""
    result: ForwardBackward = np.clip(measured - work, 0.0, launch)
    return result


def at_rows(
    points: dict[int, ForwardBackward],
    rows: int,
    host: Callable[[int, ForwardBackward], ForwardBackward],
) -> ForwardBackward:
    """Interpolates measured seconds at a number of rows.

    The interpolation is linear between measured sizes; beyond them it continues the line through
    the two nearest ones. With a single measured size, the host's part stays constant and the rest
    is proportional to the rows.
    """
    sizes = sorted(points)
    if rows in points:
        return points[rows]
    if len(sizes) == 1:
        known = points[sizes[0]]
        fixed = host(sizes[0], known)
        single: ForwardBackward = fixed + (known - fixed) * rows / sizes[0]
        return single
    right = min(max(int(np.searchsorted(sizes, rows)), 1), len(sizes) - 1)
    low, high = sizes[right - 1], sizes[right]
    slope = (points[high] - points[low]) / (high - low)
    result: ForwardBackward = np.maximum(points[low] + slope * (rows - low), 0.0)
    return result


def _measured(
    widths: dict[int, dict[int, ForwardBackward]],
    tensor: int,
    rows: int,
    model: Callable[[int, float], ForwardBackward],
    host: Callable[[int, int, ForwardBackward], ForwardBackward],
) -> ForwardBackward:
    """Returns measured seconds at a tensor width.

    A width that was not measured is scaled by the roofline from the next narrower measured width,
    or from the narrowest one if there is none.
    """
    if tensor in widths:
        return at_rows(widths[tensor], rows, partial(host, tensor))
    narrower = [width for width in widths if width < tensor]
    width = max(narrower) if narrower else min(widths)
    known = at_rows(widths[width], rows, partial(host, width))
    wide, narrow = model(tensor, rows), model(width, rows)
    result: ForwardBackward = np.divide(known * wide, narrow, out=known.copy(), where=narrow > 0)
    return result


def _measurements(
    profile: Profile | None, device: str, precision: Precision
) -> dict[str, dict[int, dict[int, ForwardBackward]]]:
    """Returns the profile's seconds, indexed by layer signature, tensor width and rows."""
    found: dict[str, dict[int, dict[int, ForwardBackward]]] = {}
    for entry in profile.layers if profile else ():
        if entry.device == device and entry.precision == precision:
            widths = found.setdefault(entry.signature, {})
            widths.setdefault(entry.tensor, {})[entry.rows] = _seconds(entry)
    return found


def _seconds(entry: LayerTime) -> ForwardBackward:
    return np.array([entry.forward_seconds, entry.backward_seconds])


def _calibration(
    times: dict[str, dict[int, dict[int, ForwardBackward]]],
    kinds: dict[str, Layer],
    model: Callable[[Layer, int, float], ForwardBackward],
) -> ForwardBackward:
    """Returns the median of measured / roofline seconds over all layers measured on one device
    type."""
    ratios = [
        seconds / model(kinds[signature], width, rows)
        for signature, widths in times.items()
        if signature in kinds and kinds[signature].forward_flops and kinds[signature].has_backward
        for width, points in widths.items()
        for rows, seconds in points.items()
    ]
    return np.median(ratios, axis=0) if ratios else np.ones(2)


def layer_seconds(
    model: LayerGraph, device: DeviceType, tensor: int, rows: int, profile: Profile | None = None
) -> LayerSeconds:
    """Returns the seconds of every layer for a micro-batch of `rows` rows on each of `tensor`
    ranks.

    Where the profile has the layer on this device type, its measured time counts. Otherwise the
    roofline does, multiplied by the median of measured / roofline seconds of the layers that were
    measured on this device type. Raises ClusterError if the device does not offer the model's
    precision."""
    precision = model.precision
    constants = device_constants(profile.calibration if profile else None, device)

    heads = head_signatures(model)
    output = for_head(constants, device)

    def price(layer: Layer, width: int, size: float) -> ForwardBackward:
        own, kind = output if layer.signature in heads else (constants, device)
        return roofline(layer, kind, precision, width, size, own)

    def host(layer: Layer, width: int, size: int, measured: ForwardBackward) -> ForwardBackward:
        if device.processor == "cpu":
            return np.zeros(2)
        work = device_seconds(layer, device, precision, width, size, constants)
        return host_seconds(measured, work, launch_seconds(constants))

    kinds = {layer.signature: layer for layer in reversed(model.layers)}
    times = _measurements(profile, device.name, precision)
    calibration = _calibration(times, kinds, price) if times else np.ones(2)
    seconds: dict[str, Any] = {}
    for signature, layer in kinds.items():
        if signature in times:
            seconds[signature] = _measured(
                times[signature], tensor, rows, partial(price, layer), partial(host, layer)
            )
        else:
            seconds[signature] = calibration * price(layer, tensor, rows)
    every = np.array([seconds[layer.signature] for layer in model.layers]).reshape(-1, 2)
    measured = sum(layer.signature in times for layer in model.layers)
    return LayerSeconds(forward=every[:, 0], backward=every[:, 1], measured=measured)


def head_signatures(model: LayerGraph) -> frozenset[str]:
    """Returns the signatures of the layers after the last attention: output projection and loss.

    The set is empty for a model without attention.
    """
    attends = [index for index, layer in enumerate(model.layers) if layer.attention_flops]
    return (
        frozenset(x.signature for x in model.layers[attends[-1] + 1 :]) if attends else frozenset()
    )


def for_head(constants: DeviceConstants, device: DeviceType) -> tuple[DeviceConstants, DeviceType]:
    """Returns the constants and the device type with the matmul efficiency of the output
    projection: the fitted one, or the device type's own shares, times `head_efficiency`."""
    scale = constants.head_efficiency
    if constants.matmul_efficiency is not None:
        fitted = constants.matmul_efficiency * scale
        return replace(constants, matmul_efficiency=fitted), device
    shares = device.matmul_shares and {
        precision: ReachedShares(forward=each.forward * scale, backward=each.backward * scale)
        for precision, each in device.matmul_shares.items()
    }
    own = device.matmul_efficiency * scale
    return constants, replace(device, matmul_efficiency=own, matmul_shares=shares)


def optimizer_seconds(
    device: DeviceType,
    optimizer: str,
    parameters: float,
    profile: Profile | None = None,
    precision: Precision = "fp32",
) -> float:
    """Returns the seconds of one optimizer step, clipping included, on a rank that holds
    `parameters` trained parameters.

    A measured time counts if the profile has one; otherwise the step is bound by memory: t = bytes
    moved / (bandwidth * efficiency).
    """
    if parameters <= 0:
        return 0.0
    for entry in profile.optimizers if profile else ():
        if entry.device == device.name and entry.optimizer == optimizer:
            return entry.overhead_seconds + entry.seconds_per_parameter * parameters
    constants = device_constants(profile.calibration if profile else None, device)
    efficiency = constants.memory_efficiency or device.memory_efficiency
    wide = 2 if precision == "fp64" else 1
    moved = OPTIMIZER_BYTES[optimizer] * constants.optimizer_traffic * wide * parameters
    return moved / (device.memory_bandwidth * efficiency)
