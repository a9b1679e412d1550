"""Predicts the compute seconds of a stage's replica, by layer and by operation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from meshwright.cluster.spec import Cluster
from meshwright.cluster.topology import Topology
from meshwright.cost.collective import all_reduce, uncontended_seconds
from meshwright.cost.compute import LayerSeconds, layer_seconds
from meshwright.cost.profile import Profile
from meshwright.model.spec import LayerGraph
from meshwright.program.operations import Op
from meshwright.techniques.activation_checkpointing.model import recomputed
from meshwright.techniques.backward_split.price import backward_shares

Array = NDArray[np.float64]


def replica_seconds(
    model: LayerGraph,
    layers: tuple[int, int],
    computed: Sequence[LayerSeconds],
    links: Topology,
    devices: Sequence[str],
    rows: int,
    *,
    step_latency: float = 0.0,
) -> tuple[Array, Array]:
    """Returns the forward and backward seconds of each layer of a stage on one tensor-parallel
    replica.

    `computed` holds the compute of every layer for each device type of the replica. Every layer
    ends in all-reduces in which all ranks meet, so the slowest one decides; these overlap with
    nothing. `step_latency` is the fixed cost of one step of a ring, in seconds.
    """
    first, last = layers
    forward = np.max([c.forward[first:last] for c in computed], axis=0)
    backward = np.max([c.backward[first:last] for c in computed], axis=0)
    if len(devices) > 1:
        cost: dict[float, float] = {}

        def reduce_seconds(sizes: tuple[float, ...]) -> float:
            for size in sizes:
                if size not in cost:
                    traffic = all_reduce(links, devices, size * rows, step_latency=step_latency)
                    cost[size] = uncontended_seconds(links, traffic)
            return sum(cost[size] for size in sizes)

        held = model.layers[first:last]
        forward = forward + [reduce_seconds(layer.forward_all_reduce_bytes) for layer in held]
        backward = backward + [reduce_seconds(layer.backward_all_reduce_bytes) for layer in held]
    return forward, backward


def repeated_seconds(model: LayerGraph, layers: tuple[int, int], forward: Array) -> Array:
    """Returns the seconds that recomputation adds to the backward of each layer: those of its
    forward."""
    repeats = np.array(
        [
            recomputed(layer, len(model.layers)) and model.layers[layer].has_backward
            for layer in range(*layers)
        ]
    )
    result: Array = forward * repeats
    return result


class LayerTimeCache:
    """Caches layer times while a plan is priced, so that each distinct replica is computed once."""

    def __init__(
        self,
        model: LayerGraph,
        cluster: Cluster,
        profile: Profile | None,
        links: Topology,
        step_latency: float,
    ) -> None:
        self.model, self.cluster, self.profile = model, cluster, profile
        self.links, self.step_latency = links, step_latency
        self._computed: dict[tuple[str, int, int], LayerSeconds] = {}
        self._shares: dict[tuple[str, int, int], Array] = {}

    def computed(self, kind: str, tensor: int, rows: int) -> LayerSeconds:
        """Returns the compute seconds of every layer on one device type."""
        key = (kind, tensor, rows)
        if key not in self._computed:
            device = self.cluster.types[kind]
            self._computed[key] = layer_seconds(self.model, device, tensor, rows, self.profile)
        return self._computed[key]

    def shares(self, kind: str, tensor: int, rows: int) -> Array:
        """Returns the shares of the two parts of a backward on one device type, [layer, part]."""
        key = (kind, tensor, rows)
        if key not in self._shares:
            device = self.cluster.types[kind]
            self._shares[key] = backward_shares(self.model, device, tensor, rows, self.profile)
        return self._shares[key]


class ReplicaSeconds:
    """Gives the compute seconds of one tensor-parallel replica; its slowest rank decides."""

    def __init__(
        self,
        times: LayerTimeCache,
        layers: tuple[int, int],
        kinds: Sequence[str],
        devices: Sequence[str],
        rows: int,
        *,
        recompute: bool,
    ) -> None:
        self.times, self.layers, self.devices, self.rows = times, layers, devices, rows
        self.kinds = tuple(dict.fromkeys(kinds))
        self.recompute = recompute
        self._whole: tuple[Array, Array] | None = None
        self._known: dict[tuple[Op, int], Array] = {}

    def of(self, op: Op, micro_batches: int = 1) -> Array:
        """Returns the seconds of each layer in an F, B, I or W.

        A W may compute the weight gradients of several micro-batches at once; for its matrix
        products that multiplies the number of rows.
        """
        key = (op, micro_batches)
        if key not in self._known:
            self._known[key] = self._seconds(op, micro_batches)
        return self._known[key]

    def _seconds(self, op: Op, micro_batches: int) -> Array:
        if op is Op.FORWARD:
            return self._both()[0]
        if op is Op.BACKWARD:
            return self._both()[1]
        first, last = self.layers
        part = 0 if op is Op.BACKWARD_INPUT else 1
        found, rows = [], self.rows * micro_batches
        for kind in self.kinds:
            own = self.times.computed(kind, len(self.devices), rows).backward
            found.append(
                (own * self.times.shares(kind, len(self.devices), rows)[:, part])[first:last]
            )
        seconds: Array = np.max(found, axis=0)
        if op is Op.BACKWARD_INPUT:
            computed = [self.times.computed(k, len(self.devices), self.rows) for k in self.kinds]
            alone = np.max([c.backward[first:last] for c in computed], axis=0)
            seconds = seconds + (self._both()[1] - alone)  # all-reduces and recomputation
        return seconds

    def _both(self) -> tuple[Array, Array]:
        """Returns the seconds of a forward and of a whole backward."""
        if self._whole is None:
            tensor = len(self.devices)
            forward, backward = replica_seconds(
                self.times.model,
                self.layers,
                [self.times.computed(kind, tensor, self.rows) for kind in self.kinds],
                self.times.links,
                self.devices,
                self.rows,
                step_latency=self.times.step_latency,
            )
            if self.recompute:
                backward = backward + repeated_seconds(self.times.model, self.layers, forward)
            self._whole = forward, backward
        return self._whole
