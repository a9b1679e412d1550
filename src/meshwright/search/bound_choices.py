"""Lists what may become of a row at every layer in any plan: where it is computed, among how many
devices and rows, and whether its activations are kept. Lower bounds are minima over these.

Letters: L layers, C choices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.cluster.link_rates import rate_of
from meshwright.cluster.spec import Link
from meshwright.cost.collective import least_step_seconds
from meshwright.cost.memory import memory_tables, usable_bytes
from meshwright.cost.weights import cast_bytes, stage_parameters, weight_bytes
from meshwright.search.costs import Array, Costs, layer_times
from meshwright.search.space import usable_devices
from meshwright.stopping import raise_if_stopped
from meshwright.techniques.activation_checkpointing.price import repeated_seconds
from meshwright.techniques.backward_split.price import backward_shares

SINGLE_ROWS = 8
"""Row counts up to this one are priced one by one; above, in ranges."""

MEASURED_SINGLE_ROWS = 128
"""The same where layer times were measured."""


LEAST_SAVED = 1e-6
"""Bytes per row that are put in place of 0, since memory is divided by them."""

ROUNDED = 5
"""Bytes by which the account of a device may fall short: each of its five parts is rounded."""


@dataclass(frozen=True, slots=True)
class Choices:
    """Says what may become of a row at each layer; what a layer cannot have takes infinite work."""

    chain: Array
    """Least seconds [L, C] for which the row itself is on its way through the layer: its forward,
    and the part of its backward that the layer before waits for."""
    work: Array
    """Least device-seconds [L, C] of the row: its share of all that its micro-batch computes."""
    kept: Array
    """Least bytes [L, C] of the row that all devices together hold while it is on its way through
    this layer and those after it."""
    early: Array
    """Least device-seconds [L, C] of the row without the gradients of weights, which may come
    later."""
    forward: Array
    """Least seconds [L, C] of the forward of its micro-batch."""
    back: Array
    """Least seconds [L, C] of that part of its backward that the layer before waits for."""
    kind: NDArray[np.int64]
    """Index [C] of the device type."""


@dataclass(frozen=True, slots=True)
class _Priced:
    """Holds the seconds [L, N] of layers on one tensor rank, for N numbers of rows."""

    rows: Array
    forward: Array
    backward: Array
    inputs: Array
    """Seconds of the first part of a backward in two."""
    weights: Array
    """Seconds of its second part."""
    again: Array
    """Seconds of a repeated forward."""


def choices_of(costs: Costs, kinds: Sequence[str]) -> Choices:
    """Returns all choices of a device type, a tensor width, rows per micro-batch, recomputation.

    Rows are counted on one replica. Between two numbers of rows that are priced one after the
    other, seconds and seconds per row are monotonic, so that all numbers between are bounded by
    the better end of each: at the lower end a micro-batch takes no longer, at the upper end a row
    takes no longer.
    """
    layers = len(costs.model.layers)
    found: list[tuple[Array, ...]] = [(np.zeros((layers, 0)),) * 6]
    numbers: list[int] = []
    for k, kind in enumerate(kinds):
        for tensor in tensor_widths(costs, kind):
            raise_if_stopped()
            for each in _choices(costs, kind, tensor):
                found.append(each)
                numbers += [k] * each[0].shape[1]
    chain, work, kept, early, forward, back = (
        np.concatenate(each, axis=1) for each in zip(*found, strict=True)
    )
    kind_C = np.array(numbers, dtype=np.int64)
    return Choices(chain, work, kept, early, forward, back, kind_C)


def tensor_widths(costs: Costs, kind: str) -> list[int]:
    """Returns the tensor widths that can pay for some layer: those that divide it, and those that
    were measured."""
    nodes = Counter(device.node for device in usable_devices(costs))
    most = max(nodes[node.name] for node in costs.cluster.nodes if kind in node.devices)
    units = {layer.along("tensor").units for layer in costs.model.layers} - {0}
    widest = min(most, max(units, default=1))
    widths = {t for t in range(1, widest + 1) if any(unit % t == 0 for unit in units)}
    widths |= {entry.tensor for entry in costs.profile.layers} if costs.profile else set()
    return sorted(width for width in {1, *widths} if width <= most)


def row_counts(costs: Costs) -> list[int]:
    """Returns the rows per micro-batch to price."""
    most = costs.job.global_batch
    single = SINGLE_ROWS if costs.profile is None else MEASURED_SINGLE_ROWS
    counts = {*range(1, min(most, single) + 1), most}
    counts |= {n << i for i in range(most.bit_length()) for n in (2, 3) if n << i <= most}
    counts |= {entry.rows for entry in costs.profile.layers} if costs.profile else set()
    return sorted(n for n in counts if n <= most)


def most_rows(costs: Costs, kind: str, tensor: int) -> Array:
    """Returns how many rows of each layer's saved tensors a device can hold; 0 where not one fits
    or the width does not divide the layer.

    Beside them it holds the weights of the layer, their gradients and casts, and of their optimizer
    states at least an equal share of what all devices together must have, since a plan may divide
    them. A stage that recomputes holds what a layer saves during the layer's backward.
    """
    tables, layers = memory_tables(costs.model, costs.job), costs.model.layers
    weights, unit = tables.plain.weights, tables.plain.weights.unit
    first = np.arange(len(layers))
    alone = (first, first + 1)
    states = unit.gradients + unit.optimizer / len(usable_devices(costs))
    held = weight_bytes(weights, alone, tensor) + cast_bytes(weights, alone, tensor)
    held = held + stage_parameters(weights, alone, tensor) * states
    split, whole = np.diff(tables.plain.saved_split), np.diff(tables.plain.saved_replicated)
    room = usable_bytes(costs.cluster.types[kind]) + ROUNDED - held
    saved = whole + split / tensor
    batch = float(costs.job.global_batch)
    rows = np.floor(room / np.maximum(saved, LEAST_SAVED))
    rows = np.where(room >= 0, np.minimum(rows, batch), 0.0)
    divides = np.array([layer.along("tensor").units % tensor == 0 for layer in layers])
    found: Array = np.where(divides, rows, 0.0)
    return found


def _choices(costs: Costs, kind: str, tensor: int) -> list[tuple[Array, ...]]:
    """Returns chain, work and kept bytes [L, C] on `tensor` devices of a type, with activations
    that are kept and with those that are computed again."""
    most = most_rows(costs, kind, tensor)[:, None]
    if most.max() < 1:
        return []
    priced = _priced(costs, kind, tensor, row_counts(costs))
    back, both = _micro_batch(costs, priced, most)
    kept = _kept_bytes(costs, tensor)
    found: list[tuple[Array, ...]] = []
    for repeats, held in zip((0.0 * priced.again, priced.again), kept, strict=True):
        waited = priced.forward + back + repeats
        whole = priced.forward + both + repeats
        chain = np.concatenate([whole[:1], waited[1:]])
        share = tensor / priced.rows
        gaps = np.flatnonzero(np.diff(priced.rows) > 1)
        there = np.concatenate([priced.rows <= most, priced.rows[gaps] < most], axis=1)
        chain, work, early, forward, last = (
            np.concatenate([each, np.minimum(each[:, gaps], each[:, gaps + 1])], axis=1)
            for each in (chain, share * whole, share * waited, priced.forward, back + repeats)
        )
        work_or_never = np.where(there, work, np.inf)
        kept_bytes = np.broadcast_to(held[:, None], there.shape)
        found.append((chain, work_or_never, kept_bytes, early, forward, last))
    return found


def _micro_batch(costs: Costs, priced: _Priced, most: Array) -> tuple[Array, Array]:
    """Returns the least seconds [L, N] of a micro-batch: what the layer before waits for, and all.

    A backward is whole or in two parts. The second part may take several micro-batches at once, as
    far as a device can hold what waits for it: as much as the forward saved (`deferred_bytes`), but
    half of it in the last layer in 16-bit precision, and nothing where no weights are trained.
    """
    limit = most.copy()
    if memory_tables(costs.model, costs.job).plain.weights.unit.casts:
        limit[-1] = 2 * (most[-1] + 1)
    limit[_untrained(costs)] = costs.job.global_batch
    # The last number that counts is the first that memory does not hold: it bounds those below it.
    below = np.concatenate([[0.0], priced.rows[:-1]]) < limit
    of_row = np.where(below, priced.weights / priced.rows, np.inf)
    least_of_row = np.minimum.accumulate(of_row[:, ::-1], axis=1)[:, ::-1]
    parts = priced.inputs + priced.rows * least_of_row
    return np.minimum(priced.backward, priced.inputs), np.minimum(priced.backward, parts)


def _untrained(costs: Costs) -> list[int]:
    """Returns the layers without weights that are trained."""
    trained = {n for tied in costs.model.tied if tied.parameters for n in tied.layers}
    layers = enumerate(costs.model.layers)
    return [n for n, layer in layers if not (layer.parameters or n in trained)]


def _priced(costs: Costs, kind: str, tensor: int, counts: Sequence[int]) -> _Priced:
    """Returns the seconds on one tensor rank of a type, with the least that ranks take to meet."""
    device, model = costs.cluster.types[kind], costs.model
    columns = []
    for rows in counts:
        times = layer_times(costs, kind, tensor, rows)
        shares = backward_shares(model, device, tensor, rows, costs.profile)
        ahead, back = _meeting_seconds(costs, kind, tensor, rows)
        again = repeated_seconds(model, (0, len(model.layers)), times.forward)
        columns.append(
            (
                times.forward + ahead,
                times.backward + back,
                times.backward * shares[:, 0] + back,
                times.backward * shares[:, 1],
                again,
            )
        )
    return _Priced(np.array(counts, dtype=np.float64), *np.array(columns).transpose(1, 2, 0))


def _meeting_seconds(costs: Costs, kind: str, tensor: int, rows: int) -> tuple[Array, Array]:
    """Returns the least seconds [L] of the all-reduces that end each layer's forward and backward,
    over the best link that a device of this type has."""
    layers = costs.model.layers
    if tensor == 1:
        return np.zeros(len(layers)), np.zeros(len(layers))
    links, steps = links_inside(costs, kind, tensor), 2 * (tensor - 1)

    def seconds(sizes: Sequence[float]) -> float:
        of_row = rows / tensor
        return sum(
            min(steps * (wait + of_row * size * slope) for wait, slope in links) for size in sizes
        )

    held = [layer.along("tensor") for layer in layers]
    return (
        np.array([seconds(each.forward_all_reduce_bytes) for each in held]),
        np.array([seconds(each.backward_all_reduce_bytes) for each in held]),
    )


def links_inside(costs: Costs, kind: str, tensor: int) -> list[tuple[float, float]]:
    """Returns latency and seconds per byte of a step of the rings that `tensor` devices may form
    inside a node: in an island, or on what joins all its devices. A bus carries every hop between
    islands; such hops are two at least, and as many as the islands."""
    found = set()
    for node in {
        (n.inside, n.islands): n
        for n in costs.cluster.nodes
        if kind in n.devices and len(n.devices) >= tensor
    }.values():
        widest = max(map(len, node.islands.groups)) if node.islands else 1
        if node.islands and widest >= tensor:
            found.add((node.islands.link, 1))
        hops = max(2, -(-tensor // widest)) if node.inside.shared else 1
        found.add((node.inside, hops))
    return [_ring_step(costs, link, hops) for link, hops in found]


def _ring_step(costs: Costs, link: Link, hops: int) -> tuple[float, float]:
    rate = rate_of(link.kind)
    slope = hops / link.bandwidth * (rate.sum_share if rate else 1.0)
    return max(least_step_seconds(link), costs.step_latency), slope


def _kept_bytes(costs: Costs, tensor: int) -> tuple[Array, Array]:
    """Returns the bytes [L] of a row that a layer keeps for its backward on all devices of a
    replica together: as it is, and where it computes its activations again."""
    tables = memory_tables(costs.model, costs.job)
    plain, again = (
        np.diff(tensor * each.saved_replicated + each.saved_split)
        for each in (tables.plain, tables.recomputed)
    )
    return plain, again
