"""Seconds that the layers and the optimizer compute, communication apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright.cluster.spec import DeviceType, Precision
from meshwright.cost.constants import DEFAULT_DEVICE, DeviceConstants, device_constants
from meshwright.cost.profile import LayerTime, Profile
from meshwright.errors import ClusterError, Problem
from meshwright.model.spec import Layer, LayerGraph
from meshwright.records import record
from meshwright.units import format_flops

Array = NDArray[np.float64]
Pair = Array
"""[forward, backward], in seconds unless said otherwise."""

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

FROZEN_BYTES: dict[Precision, tuple[float, float]] = {
    "fp64": (8.0, 8.0),
    "fp32": (4.0, 4.0),
    "fp16": (2.0, 2.0),
    "bf16": (2.0, 2.0),
}
"""The same of a frozen weight, which forward and backward read: with 16-bit arithmetic its cast,
which is kept from step to step."""

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


def split_share(split: float, whole: float, tensor: int) -> float:
    """Share of `whole` left on each of `tensor` ranks when `split` of it is divided."""
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
) -> Pair:
    """Seconds of forward and backward that grow with the rows, on one tensor rank, and those of
    the weights.

        t = matmul / (peak e_mm) + attention / (peak e_att) + bytes / (bandwidth e_mem)

    Products and elementwise operations are kernels of their own, one after the other, so their
    times add up. The attention's share of the backward is taken to be its share of the forward;
    of the activations, tensor ranks divide the share that they divide of what is kept.
    Raises ClusterError (see `peak_flops`).
    """
    peak = peak_flops(device, precision)
    e_matmul = constants.matmul_efficiency or device.matmul_efficiency
    e_attention = constants.attention_efficiency or device.attention_efficiency
    e_memory = constants.memory_efficiency or device.memory_efficiency
    total = layer.forward_flops + layer.attention_flops
    attention = layer.attention_flops / total if total else 0.0
    flops = np.array([total, layer.backward_flops])
    flops *= rows * split_share(layer.split_flops, total, tensor)
    seconds_per_flop = (1 - attention) / e_matmul + attention / e_attention
    parameters = layer.parameters * split_share(layer.split_parameters, layer.parameters, tensor)
    parameters *= constants.weight_traffic
    activations = layer.traffic_bytes * split_share(
        layer.split_saved_bytes, layer.saved_bytes, tensor
    )
    moved = rows * activations * ACTIVATION_PASSES + parameters * np.array(WEIGHT_BYTES[precision])
    frozen = layer.frozen_parameters * split_share(
        layer.split_frozen, layer.frozen_parameters, tensor
    )
    moved += frozen * constants.weight_traffic * np.array(FROZEN_BYTES[precision])
    result: Pair = flops * seconds_per_flop / peak + moved / (device.memory_bandwidth * e_memory)
    return result * _passes(layer)


def _passes(layer: Layer) -> Pair:
    """Forward, and backward if there is one."""
    return np.array([1.0, float(layer.has_backward)])


def roofline(
    layer: Layer,
    device: DeviceType,
    precision: Precision,
    tensor: int,
    rows: float,
    constants: DeviceConstants = DEFAULT_DEVICE,
) -> Pair:
    """Seconds of forward and backward by the datasheet, on one tensor rank.

        t = max(overhead + `device_seconds`, launch)

    after the roofline (Williams, Waterman, Patterson, CACM 52(4), 2009), with the host that issues
    the kernels as one more roof. A layer that computes nothing costs nothing.
    Raises ClusterError (see `peak_flops`).
    """
    work = device_seconds(layer, device, precision, tensor, rows, constants)
    if not layer.traffic_bytes and not layer.forward_flops + layer.attention_flops:
        return work
    work += constants.layer_overhead * ACTIVATION_PASSES
    result: Pair = np.maximum(work, launch_seconds(constants)) * _passes(layer)
    return result


def launch_seconds(constants: DeviceConstants) -> Pair:
    """Least seconds of a layer's forward and backward."""
    return np.array([constants.launch_forward, constants.launch_backward])


def host_seconds(measured: Pair, work: Pair, launch: Pair) -> Pair:
    """Of a measured time, what the host took beyond the device's work: at most a launch."""
    result: Pair = np.clip(measured - work, 0.0, launch)
    return result


def at_rows(points: dict[int, Pair], rows: int, host: Callable[[int, Pair], Pair]) -> Pair:
    """Seconds at a number of rows: linear between measured sizes and, beyond them, along the two
    nearest.

    Around a single size, what the host took stays and the rest grows with the rows.
    """
    sizes = sorted(points)
    if rows in points:
        return points[rows]
    if len(sizes) == 1:
        known = points[sizes[0]]
        fixed = host(sizes[0], known)
        single: Pair = fixed + (known - fixed) * rows / sizes[0]
        return single
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
    host: Callable[[int, int, Pair], Pair],
) -> Pair:
    """Measured seconds; a width that was not measured is scaled from the nearest narrower one (else
    the narrowest) by the roofline."""
    if tensor in widths:
        return at_rows(widths[tensor], rows, partial(host, tensor))
    narrower = [width for width in widths if width < tensor]
    width = max(narrower) if narrower else min(widths)
    known = at_rows(widths[width], rows, partial(host, width))
    wide, narrow = model(tensor, rows), model(width, rows)
    result: Pair = np.divide(known * wide, narrow, out=known.copy(), where=narrow > 0)
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
        if signature in kinds and kinds[signature].forward_flops and kinds[signature].has_backward
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
    constants = device_constants(profile.calibration if profile else None, device)

    heads = head_signatures(model)
    output = head_constants(constants, device)

    def price(layer: Layer, width: int, size: float) -> Pair:
        own = output if layer.signature in heads else constants
        return roofline(layer, device, precision, width, size, own)

    def host(layer: Layer, width: int, size: int, measured: Pair) -> Pair:
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
    """Signatures of the layers behind the last attention: output projection and loss. Empty where
    there is no attention."""
    attends = [index for index, layer in enumerate(model.layers) if layer.attention_flops]
    return (
        frozenset(x.signature for x in model.layers[attends[-1] + 1 :]) if attends else frozenset()
    )


def head_constants(constants: DeviceConstants, device: DeviceType) -> DeviceConstants:
    """The constants with the output projection's own efficiency."""
    efficiency = constants.matmul_efficiency or device.matmul_efficiency
    return replace(constants, matmul_efficiency=efficiency * constants.head_efficiency)


def optimizer_seconds(
    device: DeviceType,
    optimizer: str,
    parameters: float,
    profile: Profile | None = None,
    precision: Precision = "fp32",
) -> float:
    """Seconds of one optimizer step, clipping included, on a rank that holds `parameters`.

    Measured, else bound by memory: t = bytes moved / (bandwidth x efficiency). None where nothing
    is trained.
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
