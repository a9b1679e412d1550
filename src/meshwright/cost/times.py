"""Predicts the compute seconds of a stage's replica, by layer and by operation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from meshwright.cluster.spec import Cluster
from meshwright.cluster.topology import Topology, topology
from meshwright.cost.compute import LayerSeconds, layer_seconds
from meshwright.cost.links import ring_step_seconds
from meshwright.cost.profile import Profile
from meshwright.cost.reached_links import reached_links
from meshwright.model.spec import LayerGraph
from meshwright.plan.spec import Stage
from meshwright.program.operations import Op
from meshwright.techniques import provided
from meshwright.techniques.backward_split.price import backward_shares

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ReplicaWork:
    """Describes the work of one replica on one micro-batch: its devices, and the layers that they
    compute."""

    model: LayerGraph
    layers: tuple[int, int]
    devices: Sequence[str]
    rows: int
    links: Topology
    step_latency: float
    """The fixed seconds of one step of a ring."""
    stage: Stage | None = None
    """The stage of the plan; None before there is one: nothing that it could choose is added."""


LayerSecondsChange = Callable[[ReplicaWork, Array, Array], tuple[Array, Array]]
"""What a technique makes of the forward and backward seconds of a replica's layers."""


@cache
def _changes() -> tuple[LayerSecondsChange, ...]:
    return provided("price", "layer_seconds")


def replica_seconds(work: ReplicaWork, computed: Sequence[LayerSeconds]) -> tuple[Array, Array]:
    """Returns the forward and backward seconds of each layer of a replica, with all that techniques
    add.

    `computed` holds the compute of every layer for each device type of the replica: the slowest
    decides, since all devices meet at the end of a layer.
    """
    inside = slice(*work.layers)
    forward = np.max([each.forward[inside] for each in computed], axis=0)
    backward = np.max([each.backward[inside] for each in computed], axis=0)
    for change in _changes():
        forward, backward = change(work, forward, backward)
    return forward, backward


class LayerTimeCache:
    """Caches layer times while plans of one model and cluster are priced, so that each distinct
    replica is computed once."""

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


def layer_time_cache(
    model: LayerGraph, cluster: Cluster, profile: Profile | None
) -> LayerTimeCache:
    """Returns the cache with which all plans of a model on a cluster can be priced."""
    links = topology(reached_links(cluster, profile))
    return LayerTimeCache(model, cluster, profile, links, ring_step_seconds(profile))


class ReplicaSeconds:
    """Computes the seconds that one tensor-parallel replica takes; its slowest rank decides."""

    def __init__(
        self,
        times: LayerTimeCache,
        layers: tuple[int, int],
        kinds: Sequence[str],
        devices: Sequence[str],
        rows: int,
        stage: Stage,
    ) -> None:
        self.times, self.layers, self.devices, self.rows = times, layers, devices, rows
        self.kinds = tuple(dict.fromkeys(kinds))
        self.stage = stage
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
            seconds = seconds + (self._both()[1] - alone)  # what techniques add
        return seconds

    def _both(self) -> tuple[Array, Array]:
        """Returns the seconds of a forward and of a whole backward."""
        if self._whole is None:
            tensor = len(self.devices)
            work = ReplicaWork(
                self.times.model,
                self.layers,
                self.devices,
                self.rows,
                self.times.links,
                self.times.step_latency,
                self.stage,
            )
            computed = [self.times.computed(kind, tensor, self.rows) for kind in self.kinds]
            self._whole = replica_seconds(work, computed)
        return self._whole
