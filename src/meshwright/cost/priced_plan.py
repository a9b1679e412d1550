"""Joins a plan with all that its step depends on, and computes the program and the prices that
follow."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from meshwright.cluster.spec import Cluster
from meshwright.cost.memory import device_memory
from meshwright.cost.pricing import Prices, price_program
from meshwright.cost.profile import Profile
from meshwright.cost.times import LayerTimeCache
from meshwright.model.spec import LayerGraph
from meshwright.plan.spec import DeviceMemory, Plan
from meshwright.program.compile import compile_plan
from meshwright.program.instructions import Program


@dataclass(frozen=True)
class PricedPlan:
    """Holds a valid plan with its model, its cluster and the measured times.

    Program, prices and memory are computed when they are first asked for, and kept.
    """

    plan: Plan
    model: LayerGraph
    cluster: Cluster
    profile: Profile | None = None
    """Measured times; None: prices come from datasheets."""
    clipped: bool = field(default=True, kw_only=True)
    """True: weights are updated once the norm of the whole gradient is known, as clipping needs it;
    False: bucket by bucket, as soon as gradients are summed."""
    ranks: frozenset[int] | None = field(default=None, kw_only=True)
    """The ranks that are given instructions; None: all."""
    times: LayerTimeCache | None = field(default=None, kw_only=True)
    """The layer times of model, cluster and profile; None: they are computed."""

    @cached_property
    def program(self) -> Program:
        """Returns the instructions of every rank."""
        return compile_plan(self.plan, self.model, only=self.ranks, clipped=self.clipped)

    @cached_property
    def prices(self) -> Prices:
        """Returns the price of every instruction. Raises ClusterError if a device does not offer
        the model's precision."""
        return price_program(
            self.program, self.plan, self.model, self.cluster, self.profile, times=self.times
        )

    @cached_property
    def memory(self) -> tuple[DeviceMemory, ...]:
        """Returns the peak bytes of every device, by part."""
        return device_memory(self.plan, self.model, self.cluster)
