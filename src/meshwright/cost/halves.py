"""How the seconds of a backward divide when it is done in two parts, I and W."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from meshwright.cluster.spec import DeviceType
from meshwright.cost.compute import device_seconds
from meshwright.cost.constants import device_constants
from meshwright.cost.profile import LayerTime, Profile
from meshwright.model.spec import Layer, LayerGraph

Array = NDArray[np.float64]

SPLIT_COST = 1.11
"""I and W together over a whole backward, where both have something to do: autograd walks the graph
twice (transformer block, PyTorch 2.13 on a CPU: 0.777 + 0.481 against 1.129)."""


def backward_shares(
    model: LayerGraph, device: DeviceType, tensor: int, rows: int, profile: Profile | None = None
) -> Array:
    """[layer, part]: seconds of a layer's I and of its W over those of its whole backward.

    Measured where the profile has both parts of this kind of layer on this device type (at the
    nearest size); else by FLOPs: the weight gradients of products cost as much as the products
    did, attention scores have none, and what multiplies nothing (an embedding) is all I.
    """
    tied = {layer for each in model.tied for layer in each.layers}
    known: dict[tuple[str, bool], tuple[float, float]] = {}
    for index, layer in enumerate(model.layers):
        key = (layer.signature, index in tied)
        if key not in known:
            times = _measured(profile, device, layer, model.precision)
            if times:
                known[key] = _nearest(times, tensor, rows)
            else:
                weight = _by_flops(layer, key[1], model, device, tensor, rows, profile)
                twice = SPLIT_COST if 0.0 < weight < 1.0 else 1.0
                known[key] = (twice * (1.0 - weight), twice * weight)
    each = [known[layer.signature, index in tied] for index, layer in enumerate(model.layers)]
    return np.array(each).reshape(-1, 2)


def _measured(
    profile: Profile | None, device: DeviceType, layer: Layer, precision: str
) -> list[LayerTime]:
    return [
        entry
        for entry in (profile.layers if profile else ())
        if (entry.device, entry.signature, entry.precision)
        == (device.name, layer.signature, precision)
        and entry.input_seconds is not None
        and entry.weight_seconds is not None
    ]


def _nearest(times: Sequence[LayerTime], tensor: int, rows: int) -> tuple[float, float]:
    near = min(times, key=lambda t: (abs(t.tensor - tensor), abs(t.rows - rows), t.rows))
    assert near.input_seconds is not None
    assert near.weight_seconds is not None
    return near.input_seconds / near.backward_seconds, near.weight_seconds / near.backward_seconds


def _by_flops(
    layer: Layer,
    tied: bool,
    model: LayerGraph,
    device: DeviceType,
    tensor: int,
    rows: int,
    profile: Profile | None,
) -> float:
    """Share of the backward that makes weight gradients: as many FLOPs as the products of the
    forward, as large a part of the traffic, and the gradients written."""
    if not (layer.parameters or tied) or not layer.backward_flops:
        return 0.0
    products = min(layer.forward_flops, layer.backward_flops)
    share = products / layer.backward_flops
    weights = replace(
        layer,
        attention_flops=0.0,
        backward_flops=products,
        traffic_bytes=layer.traffic_bytes * share,
    )
    constants = device_constants(profile.calibration if profile else None, device)
    part, whole = (
        device_seconds(each, device, model.precision, tensor, rows, constants)[1]
        for each in (weights, layer)
    )
    return min(1.0, float(part / whole)) if whole else 0.0
