"""Makes the table of times that virtual devices follow: how long each layer takes on each rank."""

from __future__ import annotations

from functools import partial

from meshwright.cluster.spec import devices_of
from meshwright.cost.compute import layer_seconds, optimizer_seconds
from meshwright.cost.priced_plan import PricedPlan
from meshwright.errors import LaunchError, Problem
from meshwright.plan.ranks import stage_placements
from meshwright.program.operations import Op
from meshwright.records import Name, Seconds, record

TIMES_FILE = "virtual.json"
"""Name of the table's file in the run folder."""

MANY_PARAMETERS = 1e9
"""Number of parameters at which an optimizer step is priced; compared with a step over none, it
gives the seconds per parameter."""


@record
class RankTimes:
    """Holds the seconds of one rank's compute instructions, for its rows of a micro-batch."""

    forward: tuple[Seconds, ...]
    """Seconds of each of the model's layers."""
    backward: tuple[Seconds, ...]
    """Seconds of each of the model's layers."""
    optimizer: Seconds
    """Seconds of an optimizer step, apart from those for each parameter."""
    optimizer_per_parameter: Seconds
    parts: dict[Name, Seconds]
    """Seconds of the parts of split backwards, keyed by stage, operation and number of
    micro-batches: `3I1` is the first part on stage 3, `3W2` the second part of two micro-batches.
    """


@record
class VirtualTimes:
    """Holds the times of all ranks of a plan."""

    ranks: tuple[RankTimes, ...]


def virtual_times(priced: PricedPlan) -> VirtualTimes:
    """Returns the seconds that the cost model predicts: from measured layers if the profile has
    them, else from the roofline of the device types.

    Raises LaunchError for tensor parallelism: the sums inside a layer need real arithmetic.
    """
    plan, model, profile = priced.plan, priced.model, priced.profile
    types = {d.name: priced.cluster.types[d.type] for d in devices_of(priced.cluster)}
    parts = _parts(priced)
    ranks: dict[int, RankTimes] = {}
    for stage in stage_placements(plan):
        width = stage.mesh.width("tensor")
        if width > 1:
            mend = "plan without tensor parallelism, or emulate by dilation"
            found = f"{width} devices that share a layer"
            raise LaunchError(Problem(plan.name, "tensor", found, "1, of virtual devices", mend))
        for placement in stage.mesh.members:
            kind, rows = types[placement.device], placement.rows[1] - placement.rows[0]
            seconds = layer_seconds(model, kind, 1, rows, profile)
            update = partial(optimizer_seconds, kind, plan.job.optimizer)
            none, some = (update(n, profile, model.precision) for n in (0.0, MANY_PARAMETERS))
            ranks[placement.rank] = RankTimes(
                forward=tuple(map(float, seconds.forward)),
                backward=tuple(map(float, seconds.backward)),
                optimizer=none,
                optimizer_per_parameter=(some - none) / MANY_PARAMETERS,
                parts=parts[placement.rank],
            )
    return VirtualTimes(ranks=tuple(ranks[rank] for rank in sorted(ranks)))


def part_key(stage: int, op: Op, micro_batches: int) -> str:
    """Returns the key of a part in `RankTimes.parts`."""
    return f"{stage}{op}{micro_batches}"


def _parts(priced: PricedPlan) -> list[dict[str, Seconds]]:
    return [
        {
            part_key(i.stage, i.op, _count(i.micro_batches)): cost.seconds
            for i, cost in zip(instructions, costs, strict=True)
            if i.op in (Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT)
        }
        for instructions, costs in zip(priced.program.ranks, priced.prices.ranks, strict=True)
    ]


def _count(micro_batches: tuple[int, int] | None) -> int:
    return 1 if micro_batches is None else micro_batches[1] - micro_batches[0]
