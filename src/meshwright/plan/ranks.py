"""Plan to ranks: where each process stands, and which rows of the batch it sees."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from meshwright.plan.spec import Pipeline, Plan, Stage
from meshwright.records import record


@record
class Seat:
    """The place of one rank in a plan."""

    rank: int
    device: str
    pipeline: int
    stage: int
    """Number of the stage, counted over all pipelines."""
    replica: int
    tensor_index: int
    rows: tuple[int, int]
    """Rows of every micro-batch that this rank works on: [first, last)."""


@record
class StageSeats:
    """All seats of one stage, with the facts that its instructions need."""

    number: int
    pipeline: int
    is_first: bool
    is_last: bool
    layers: tuple[int, int]
    seats: tuple[tuple[Seat, ...], ...]
    """Data width x tensor width, as the stage's devices."""


def row_intervals(stage: Stage, rows: int) -> tuple[tuple[int, int], ...]:
    """[first, last) of each replica in a micro-batch of `rows` rows."""
    shares = stage.rows or (rows // len(stage.devices),) * len(stage.devices)
    ends = tuple(accumulate(shares))
    return tuple(zip((0, *ends[:-1]), ends, strict=True))


def stage_seats(plan: Plan) -> tuple[StageSeats, ...]:
    """Every stage of every pipeline, numbered in order."""
    rank_of = {device: rank for rank, device in enumerate(plan.devices)}
    found: list[StageSeats] = []
    for p, pipeline in enumerate(plan.pipelines):
        for s, stage in enumerate(pipeline.stages):
            number = len(found)
            intervals = row_intervals(stage, pipeline.rows)
            found.append(
                StageSeats(
                    number=number,
                    pipeline=p,
                    is_first=s == 0,
                    is_last=s == len(pipeline.stages) - 1,
                    layers=stage.layers,
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


def pipeline_rows(pipeline: Pipeline) -> int:
    """Rows of the global batch that a pipeline works through in one step."""
    return pipeline.rows * pipeline.micro_batches


def first_row(plan: Plan, pipeline: int, micro_batch: int) -> int:
    """Row of the global batch at which a micro-batch begins."""
    before = sum(pipeline_rows(p) for p in plan.pipelines[:pipeline])
    return before + micro_batch * plan.pipelines[pipeline].rows


def mesh_text(devices: Sequence[Sequence[object]], sign: str = "x") -> str:
    """Data width x tensor width, `2 x 4`; replicas of unlike tensor widths as `4 + 2 + 2`."""
    widths = [len(replica) for replica in devices]
    if len(set(widths)) > 1:
        return " + ".join(map(str, widths))
    return f"{len(widths)} {sign} {widths[0]}"


def describe(plan: Plan) -> str:
    """A plan in one line: `dp2 tp1 pp2 [12|4] 8x4 1f1b`; unequal rows of replicas as `7+1`,
    unequal tensor widths as `tp4+2`."""
    lines = []
    for pipeline in plan.pipelines:
        meshes = sorted({tuple(map(len, s.devices)) for s in pipeline.stages})
        mesh = " ".join(f"dp{len(widths)} tp{_widths_text(widths)}" for widths in meshes)
        cuts = "|".join(str(s.layers[1] - s.layers[0]) for s in pipeline.stages)
        rows = {"+".join(map(str, s.rows)): None for s in pipeline.stages if s.rows}
        unequal = [each for each in rows if len(set(each.split("+"))) > 1]
        share = "|".join(unequal) or str(pipeline.rows)
        lines.append(f"{mesh} pp{len(pipeline.stages)} [{cuts}] {pipeline.micro_batches}x{share}")
    return " + ".join(lines) + f" {plan.schedule}"


def _widths_text(widths: Sequence[int]) -> str:
    return "+".join(map(str, widths if len(set(widths)) > 1 else widths[:1]))
