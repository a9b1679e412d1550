"""Assigns the ranks of a plan: the stages that each process holds, and the rows of the batch that
it works on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate

from meshwright.layout.shares import UNDIVIDED, Share, common_shares, holder
from meshwright.plan.spec import BoundaryKind, Job, Pipeline, Plan, Stage
from meshwright.plan.virtual import layout_of
from meshwright.records import record
from meshwright.techniques import provided


@record
class Seat:
    """The place of one rank in one stage. A rank has a seat in every stage that it holds."""

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
class StageSeats:
    """One stage with the seat of each of its ranks, and what instructions need to know of it."""

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
    of_plan: Stage
    """The stage as the plan describes it."""
    seats: tuple[tuple[Seat, ...], ...]
    """Seats by replica and tensor index, in the order of the stage's devices."""
    boundary: BoundaryKind = "direct"
    """How tensors cross the cut between the previous stage and this one, in both directions."""


@record
class RankView:
    """One rank of a plan, as techniques see it."""

    stages: tuple[StageSeats, ...]
    """The stages that the rank holds, in layer order."""
    seat: Seat
    """Its placement in the first of them."""


def row_intervals(stage: Stage, rows: int) -> tuple[tuple[int, int], ...]:
    """Return the rows [first, last) of each replica in a micro-batch of `rows` rows."""
    shares = stage.rows or (rows // len(stage.devices),) * len(stage.devices)
    ends = tuple(accumulate(shares))
    return tuple(zip((0, *ends[:-1]), ends, strict=True))


def stage_seats(plan: Plan) -> tuple[StageSeats, ...]:
    """Return every stage of every pipeline, numbered in order."""
    return _stage_seats(plan.devices, plan.pipelines)


@lru_cache(maxsize=4)  # a plan is compiled, priced and weighed one after the other
def _stage_seats(
    devices: tuple[str, ...], pipelines: tuple[Pipeline, ...]
) -> tuple[StageSeats, ...]:
    rank_of = {device: rank for rank, device in enumerate(devices)}
    found: list[StageSeats] = []
    for p, pipeline in enumerate(pipelines):
        position_of = {s: g for g, held in enumerate(layout_of(pipeline)) for s in held}
        for s, stage in enumerate(pipeline.stages):
            number = len(found)
            intervals = row_intervals(stage, pipeline.rows)
            found.append(
                StageSeats(
                    number=number,
                    pipeline=p,
                    is_first=s == 0,
                    is_last=s == len(pipeline.stages) - 1,
                    position=position_of[s],
                    layers=stage.layers,
                    boundary=stage.boundary or "direct",
                    recompute=stage.recompute,
                    of_plan=stage,
                    seats=tuple(
                        tuple(
                            Seat(
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


def replicas_of(stages: Sequence[StageSeats], layers: Sequence[int]) -> tuple[Ranks, ...]:
    """Return the tensor ranks of every replica that holds any of the layers."""
    held = [s for s in stages if any(s.layers[0] <= layer < s.layers[1] for layer in layers)]
    found = (tuple(seat.rank for seat in replica) for stage in held for replica in stage.seats)
    return tuple(dict.fromkeys(found))


def copies_of(replicas: Sequence[Ranks]) -> Iterator[tuple[Ranks, Share | None]]:
    """Yield the groups of ranks that hold the same elements, and which share of what is divided.

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


def held_together(one: StageSeats, other: StageSeats) -> bool:
    """True if the same ranks hold both stages, so that no tensor moves between them."""
    return (one.pipeline, one.position) == (other.pipeline, other.position)


def divides_layers(plan: Plan) -> bool:
    """True if any layer is divided over several tensor ranks."""
    return any(len(replica) > 1 for p in plan.pipelines for s in p.stages for replica in s.devices)


def seats_of(stages: Sequence[StageSeats], rank: int) -> tuple[Seat, ...]:
    """Return a rank's seats in stage order; there are several if the schedule has virtual
    stages."""
    seats = (seat for stage in stages for replica in stage.seats for seat in replica)
    return tuple(seat for seat in seats if seat.rank == rank)


def pipeline_rows(pipeline: Pipeline) -> int:
    """Return the number of rows of the global batch that a pipeline works through in one step."""
    return pipeline.rows * pipeline.micro_batches


def first_row(plan: Plan, pipeline: int, micro_batch: int) -> int:
    """Return the row of the global batch at which a micro-batch begins."""
    before = sum(pipeline_rows(p) for p in plan.pipelines[:pipeline])
    return before + micro_batch * plan.pipelines[pipeline].rows


def gradient_bytes(job: Job) -> int:
    """Return the bytes of one gradient: gradients are kept in the precision of the weights."""
    return 8 if job.precision == "fp64" else 4


def mesh_text(devices: Sequence[Sequence[object]], sign: str = "x") -> str:
    """Format a mesh as data width x tensor width, `2 x 4`; replicas of unlike tensor widths as `4 +
    2 + 2`."""
    widths = [len(replica) for replica in devices]
    if len(set(widths)) > 1:
        return " + ".join(map(str, widths))
    return f"{len(widths)} {sign} {widths[0]}"


def describe(plan: Plan) -> str:
    """Describe a plan in one line: `dp2 tp1 pp2 [12|4r] 8x4 1f1b`.

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
        groups = len(layout_of(pipeline))
        each = len(pipeline.stages) / max(groups, 1)
        depth = f"pp{groups}" + f" vpp{each:g}" * (each > 1)
        lines.append(f"{mesh} {depth} [{cuts}] {pipeline.micro_batches}x{share}")
    return " + ".join(lines) + f" {plan.schedule}"


def _options_text(stage: Stage) -> str:
    """Format what techniques add to a stage."""
    return "".join(text(stage) for text in provided("plan", "stage_text"))


def _widths_text(widths: Sequence[int]) -> str:
    return "+".join(map(str, widths if len(set(widths)) > 1 else widths[:1]))
