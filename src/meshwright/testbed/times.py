"""The table that virtual devices live by: how long each layer takes on each rank."""

from __future__ import annotations

from meshwright.cluster.spec import Cluster, devices_of
from meshwright.cost.compute import layer_seconds, optimizer_seconds
from meshwright.cost.memory import memory_table, stage_parameters
from meshwright.cost.profile import Profile
from meshwright.errors import LaunchError, Problem
from meshwright.model.spec import LayerGraph
from meshwright.plan.ranks import stage_seats
from meshwright.plan.spec import Plan
from meshwright.records import Seconds, record

TIMES = "virtual.json"
"""In the run folder."""


@record
class RankTimes:
    """Seconds of one rank's instructions, for its rows of a micro-batch."""

    forward: tuple[Seconds, ...]
    """By layer of the model."""
    backward: tuple[Seconds, ...]
    optimizer: Seconds


@record
class VirtualTimes:
    """Of all ranks of a plan."""

    ranks: tuple[RankTimes, ...]


def virtual_times(
    plan: Plan, model: LayerGraph, cluster: Cluster, profile: Profile | None
) -> VirtualTimes:
    """The seconds that the cost model expects: measured layers where the profile has them, else
    the roofline of the device types.

    Raises LaunchError for tensor parallelism: the sums inside a layer need its arithmetic.
    """
    types = {device.name: cluster.types[device.type] for device in devices_of(cluster)}
    table = memory_table(model, plan.job)
    ranks: dict[int, RankTimes] = {}
    for stage in stage_seats(plan):
        width = len(stage.seats[0])
        if width > 1:
            mend = "plan without tensor parallelism, or emulate by dilation"
            found = f"{width} devices that share a layer"
            raise LaunchError(Problem(plan.name, "tensor", found, "1, of virtual devices", mend))
        for (seat,) in stage.seats:
            kind, rows = types[seat.device], seat.rows[1] - seat.rows[0]
            seconds = layer_seconds(model, kind, 1, rows, profile)
            held = float(stage_parameters(table, stage.layers, 1))
            ranks[seat.rank] = RankTimes(
                forward=tuple(map(float, seconds.forward)),
                backward=tuple(map(float, seconds.backward)),
                optimizer=optimizer_seconds(
                    kind, plan.job.optimizer, held, profile, model.precision
                ),
            )
    return VirtualTimes(ranks=tuple(ranks[rank] for rank in sorted(ranks)))
