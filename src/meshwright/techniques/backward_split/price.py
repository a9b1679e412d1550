"""Divides the seconds of a backward into its two parts: input gradients (I) and weight gradients
(W)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from meshwright.cluster.spec import DeviceType
from meshwright.cost.compute import at_rows, device_seconds
from meshwright.cost.constants import device_constants
from meshwright.cost.profile import LayerTime, Profile
from meshwright.model.spec import Layer, LayerGraph, with_division

Array = NDArray[np.float64]

SPLIT_COST = 1.11
"""The seconds of I and W together over those of a whole backward, for layers in which both have
work to do: autograd walks the graph twice (transformer block, PyTorch 2.13 on a CPU: (0.777 +
0.481) / 1.129)."""


def backward_shares(
    model: LayerGraph, device: DeviceType, tensor: int, rows: int, profile: Profile | None = None
) -> Array:
    """Returns [layer, part]: the seconds of a layer's I and W over those of its whole backward.

    Measured shares count where the profile has both parts of such a layer on this device type,
    interpolated between numbers of rows at the nearest tensor width. Otherwise FLOPs decide: the
    weight gradients of a matrix product cost as much as the product itself, attention scores have
    none, and a layer without products (an embedding) does all its work in I.
    """
    tied = {layer for each in model.tied if each.parameters for layer in each.layers}
    known: dict[tuple[str, bool], tuple[float, float]] = {}
    for index, layer in enumerate(model.layers):
        key = (layer.signature, index in tied)
        if key not in known:
            times = _measured(profile, device, layer, model.precision)
            if times:
                known[key] = _interpolated(times, tensor, rows)
            else:
                weight = _by_flops(layer, key[1], model, device, tensor, rows, profile)
                twice = SPLIT_COST if 0.0 < weight < 1.0 else 1.0
                known[key] = (twice * (1.0 - weight), twice * weight)
    each = [known[layer.signature, index in tied] for index, layer in enumerate(model.layers)]
    return np.array(each).reshape(-1, 2)


def _measured(
    profile: Profile | None, device: DeviceType, layer: Layer, precision: str
) -> list[LayerTime]:
    """Returns the profile's times of a layer on a device type that have both parts of the
    backward."""
    return [
        entry
        for entry in (profile.layers if profile else ())
        if (entry.device, entry.signature, entry.precision)
        == (device.name, layer.signature, precision)
        and entry.input_seconds is not None
        and entry.weight_seconds is not None
    ]


def _interpolated(times: Sequence[LayerTime], tensor: int, rows: int) -> tuple[float, float]:
    """Returns the shares of I and W at a number of rows, from the measured tensor width nearest to
    `tensor`."""
    width = min((t.tensor for t in times), key=lambda each: (abs(each - tensor), each))
    points = {t.rows: _seconds(t) for t in times if t.tensor == width}
    inputs, weights, whole = at_rows(points, rows, lambda _, measured: 0.0 * measured)
    if not whole:  # for this few rows the line through the measurements falls below zero
        inputs, weights, whole = points[min(points, key=lambda each: abs(each - rows))]
    return float(inputs / whole), float(weights / whole)


def _seconds(entry: LayerTime) -> Array:
    """Returns [I, W, whole backward] of one measurement."""
    return np.array([entry.input_seconds, entry.weight_seconds, entry.backward_seconds])


def _by_flops(
    layer: Layer,
    tied: bool,
    model: LayerGraph,
    device: DeviceType,
    tensor: int,
    rows: int,
    profile: Profile | None,
) -> float:
    """Returns the share of a backward that computes weight gradients.

    They take as many FLOPs as the products of the forward, the same share of the moved activations,
    and the writing of the gradients. If some weights are frozen, the products are what the backward
    does beyond input gradients (as much as a forward) and attention (2.5 times its forward,
    or twice if it is unfused).
    """
    if not (layer.parameters or tied) or not layer.backward_flops:
        return 0.0
    products = min(layer.forward_flops, layer.backward_flops)
    if layer.frozen_parameters:
        others = layer.forward_flops + 2.5 * layer.attention_flops - layer.unfused_flops / 2
        products = min(products, max(layer.backward_flops - others, 0.0))
    share = products / layer.backward_flops
    divided = layer.along("tensor")
    forward = layer.forward_flops + layer.attention_flops
    own = layer.forward_flops / forward if forward else 0.0
    weights = with_division(
        replace(
            layer,
            attention_flops=0.0,
            backward_flops=products,
            traffic_bytes=layer.traffic_bytes * share,
        ),
        replace(divided, flops=divided.flops * own, traffic_bytes=divided.traffic_bytes * share),
    )
    constants = device_constants(profile.calibration if profile else None, device)
    part, whole = (
        device_seconds(each, device, model.precision, tensor, rows, constants)[1]
        for each in (weights, layer)
    )
    return min(1.0, float(part / whole)) if whole else 0.0
