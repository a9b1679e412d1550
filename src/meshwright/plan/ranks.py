"""Assigns the ranks of a plan: the stages that each process holds, and the rows of the batch that
it works on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, chain

from meshwright.layout.shares import UNDIVIDED, Share, common_shares, holder
from meshwright.plan.spec import BoundaryKind, Job, Pipeline, Plan, ScheduleName, Stage
from meshwright.records import record
from meshwright.techniques import provided


@record
class RankPlacement:
    """The place of one rank in one stage. A rank has a placement in every stage that it holds."""

    rank: int
    device: str
    pipeline: int
    stage: int
    """Number of the stage, counted over all pipelines in order."""
    replica: int
    tensor_index: int
    rows: tuple[int, int]
    """Rows of every micro-batch that this rank works on: [first, last)."""


@record
class StagePlacement:
    """One stage with the placement of each of its ranks, and what instructions need to know of
    it."""

    number: int
    pipeline: int
    is_first: bool
    is_last: bool
    position: int
    """Index of the group of devices in its pipeline, from 0. Stages of one position are held by the
    same ranks, in the same mesh (virtual stages); without these it is the stage's index in its
    pipeline."""
    layers: tuple[int, int]
    recompute: bool
    plan_stage: Stage
    """The stage as the plan describes it."""
    placements: tuple[tuple[RankPlacement, ...], ...]
    """Seats by replica and tensor index, in the order of the stage's devices."""
    boundary: BoundaryKind = "direct"
    """How tensors cross the cut between the previous stage and this one, in both directions."""


@record
class RankView:
    """One rank of a plan, as techniques see it."""

    stages: tuple[StagePlacement, ...]
    """The stages that the rank holds, in layer order."""
    placement: RankPlacement
    """Its placement in the first of them."""


def row_intervals(stage: Stage, rows: int) -> tuple[tuple[int, int], ...]:
    """Returns the rows [first, last) of each replica in a micro-batch of `rows` rows."""
    shares = stage.rows or (rows // len(stage.devices),) * len(stage.devices)
    ends = tuple(accumulate(shares))
    return tuple(zip((0, *ends[:-1]), ends, strict=True))


def stage_placements(plan: Plan) -> tuple[StagePlacement, ...]:
    """Returns every stage of every pipeline, numbered in order."""
    return _stage_seats(plan.devices, plan.pipelines)


@lru_cache(maxsize=4)  # a plan is compiled, priced and weighed one after the other
def _stage_seats(
    devices: tuple[str, ...], pipelines: tuple[Pipeline, ...]
) -> tuple[StagePlacement, ...]:
    rank_of = {device: rank for rank, device in enumerate(devices)}
    found: list[StagePlacement] = []
    for p, pipeline in enumerate(pipelines):
        position_of = {s: g for g, held in enumerate(stage_layout(pipeline)) for s in held}
        for s, stage in enumerate(pipeline.stages):
            number = len(found)
            intervals = row_intervals(stage, pipeline.rows)
            found.append(
                StagePlacement(
                    number=number,
                    pipeline=p,
                    is_first=s == 0,
                    is_last=s == len(pipeline.stages) - 1,
                    position=position_of[s],
                    layers=stage.layers,
                    boundary=stage.boundary or "direct",
                    recompute=stage.recompute,
                    plan_stage=stage,
                    placements=tuple(
                        tuple(
                            RankPlacement(
                                rank=rank_of[device],
                                device=device,
                                pipeline=p,
                                stage=number,
                                replica=r,
                                tensor_index=t,
                                rows=intervals[r],
                            )
                            for t, device in enumerate(replica)
                        )
                        for r, replica in enumerate(stage.devices)
                    ),
                )
            )
    return tuple(found)


Ranks = tuple[int, ...]


def replicas_of(stages: Sequence[StagePlacement], layers: Sequence[int]) -> tuple[Ranks, ...]:
    """Returns the tensor ranks of every replica that holds any of the layers."""
    held = [s for s in stages if any(s.layers[0] <= layer < s.layers[1] for layer in layers)]
    found = (
        tuple(placement.rank for placement in replica)
        for stage in held
        for replica in stage.placements
    )
    return tuple(dict.fromkeys(found))


def copies_of(replicas: Sequence[Ranks]) -> Iterator[tuple[Ranks, Share | None]]:
    """Yields the groups of ranks that hold the same elements, and which share of what is divided.

    If all replicas have the same tensor width, ranks of one tensor index hold the same, and the
    share is None. Otherwise all ranks hold what is UNDIVIDED, and each common share has its own.
    """
    widths = {len(replica) for replica in replicas}
    if len(widths) == 1:
        yield from ((tuple(sorted(group)), None) for group in zip(*replicas, strict=True))
        return
    yield tuple(sorted(rank for replica in replicas for rank in replica)), UNDIVIDED
    for share in common_shares(widths):
        yield tuple(sorted(each[holder(share, len(each))] for each in replicas)), share


def members_of(stage: StagePlacement) -> Iterator[RankPlacement]:
    """Yields the placement of every rank of a stage, replica by replica."""
    return chain.from_iterable(stage.placements)


def tensor_width(stage: StagePlacement, placement: RankPlacement) -> int:
    """Returns the number of ranks that divide each layer in the replica of a placement."""
    return len(stage.placements[placement.replica])


def same_ranks(one: StagePlacement, other: StagePlacement) -> bool:
    """True if the same ranks hold both stages, so that no tensor moves between them."""
    return (one.pipeline, one.position) == (other.pipeline, other.position)


def uses_tensor_parallelism(plan: Plan) -> bool:
    """True if any layer is divided over several tensor ranks."""
    return any(len(replica) > 1 for p in plan.pipelines for s in p.stages for replica in s.devices)


def placements_of(stages: Sequence[StagePlacement], rank: int) -> tuple[RankPlacement, ...]:
    """Returns a rank's placements in stage order; there are several if the schedule has virtual
    stages."""
    placements = (placement for stage in stages for placement in members_of(stage))
    return tuple(placement for placement in placements if placement.rank == rank)


def pipeline_rows(pipeline: Pipeline) -> int:
    """Returns the number of rows of the global batch that a pipeline works through in one step."""
    return pipeline.rows * pipeline.micro_batches


def first_row(plan: Plan, pipeline: int, micro_batch: int) -> int:
    """Returns the row of the global batch at which a micro-batch begins."""
    before = sum(pipeline_rows(p) for p in plan.pipelines[:pipeline])
    return before + micro_batch * plan.pipelines[pipeline].rows


def gradient_bytes(job: Job) -> int:
    """Returns the bytes of one gradient: gradients are kept in the precision of the weights."""
    return 8 if job.precision == "fp64" else 4


def mesh_text(devices: Sequence[Sequence[object]], sign: str = "x") -> str:
    """Formats a mesh as data width x tensor width, `2 x 4`; replicas of unlike tensor widths as `4
    + 2 + 2`."""
    widths = [len(replica) for replica in devices]
    if len(set(widths)) > 1:
        return " + ".join(map(str, widths))
    return f"{len(widths)} {sign} {widths[0]}"


def describe_plan(plan: Plan) -> str:
    """Describes a plan in one line: `dp2 tp1 pp2 [12|4r] 8x4 1f1b`.

    The brackets give the number of layers of each stage, with r if it recomputes, and `8x4` is 8
    micro-batches of 4 rows. Unequal rows of replicas read `7+1`, unequal tensor widths `tp4+2`;
    `pp2 vpp3` means three stages on each of two groups of devices.
    """
    lines = []
    for pipeline in plan.pipelines:
        meshes = sorted({tuple(map(len, s.devices)) for s in pipeline.stages})
        mesh = " ".join(f"dp{len(widths)} tp{_widths_text(widths)}" for widths in meshes)
        cuts = "|".join(
            f"{b - a}{_options_text(s)}" for s in pipeline.stages for a, b in [s.layers]
        )
        rows = {"+".join(map(str, s.rows)): None for s in pipeline.stages if s.rows}
        unequal = [each for each in rows if len(set(each.split("+"))) > 1]
        share = "|".join(unequal) or str(pipeline.rows)
        groups = len(stage_layout(pipeline))
        each = len(pipeline.stages) / max(groups, 1)
        depth = f"pp{groups}" + f" vpp{each:g}" * (each > 1)
        lines.append(f"{mesh} {depth} [{cuts}] {pipeline.micro_batches}x{share}")
    return " + ".join(lines) + f" {plan.schedule}"


def _options_text(stage: Stage) -> str:
    """Formats what techniques add to a stage."""
    return "".join(text(stage) for text in provided("plan", "stage_text"))


def _widths_text(widths: Sequence[int]) -> str:
    return "+".join(map(str, widths if len(set(widths)) > 1 else widths[:1]))


StageLayout = tuple[tuple[int, ...], ...]
"""The stages that each group of devices holds; groups in the order of their first stages: ((0, 2),
(1, 3))."""

EXPLICIT_SCHEDULES: tuple[ScheduleName, ...] = ("list", "custom")
"""Schedules that no rule generates: `Pipeline.actions` lists their computations."""


def stage_layout(pipeline: Pipeline) -> StageLayout:
    """Returns the stages that each group of devices holds."""
    held: dict[object, list[int]] = {}
    for s, stage in enumerate(pipeline.stages):
        held.setdefault(stage.devices, []).append(s)
    return tuple(tuple(stages) for stages in held.values())


def needed_layout(schedule: ScheduleName, layout: StageLayout) -> str:
    """Returns the layout that a schedule needs, in words; empty if it can run this one."""
    groups = len(layout)
    stages = sum(len(held) for held in layout)
    if schedule in EXPLICIT_SCHEDULES:
        return ""
    if schedule.startswith("interleaved"):
        dealt = tuple(tuple(range(s, stages, groups)) for s in range(groups))
        if stages % groups == 0 and layout == dealt:
            return ""
        return "as many stages on every group of devices, dealt out in turn"
    if schedule == "zb-v":
        folded = tuple((s, 2 * groups - 1 - s) for s in range(groups))
        return "" if layout == folded else "two stages on every group: down the line and back up"
    return "" if stages == groups else "each device in one stage"
