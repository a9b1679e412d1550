"""Times orders of many micro-batches by what they do with a few: in between, a pipeline runs
evenly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from meshwright.plan.spec import ScheduleName
from meshwright.program.codes import B, Codes, I
from meshwright.program.schedules import schedule_codes
from meshwright.program.work import Work, group_ends, last_backwards, play
from meshwright.search.pipeline_seconds import Span

ROUNDS, LEAST = 3, 24
"""Micro-batches in which a pipeline comes to run evenly: so many times its stages, and at least so
many."""


def shortened(work: Work) -> Work:
    """Returns the work with no more micro-batches than a pipeline needs to run evenly."""
    few = min(work.micro_batches, max(LEAST, ROUNDS * len(work.forward)))
    return replace(work, micro_batches=few)


def extrapolated(work: Work, short: Work, codes: Sequence[Codes]) -> float:
    """Returns the seconds of an order for few micro-batches if it went on for all of them at the
    pace of its middle."""
    ends = _played(short, codes)
    return max(group_ends(work, ends)) + _later(work, short, codes, ends)


def played_spans(work: Work, codes: Sequence[Codes]) -> list[Span]:
    """Returns the last backward of every stage in an order."""
    return last_backwards(work, codes, _played(work, codes))


def last_of_many(work: Work, name: ScheduleName) -> list[Span]:
    """Returns about the same for a schedule with a rule."""
    short = shortened(work)
    codes = schedule_codes(name, short.layout, short.micro_batches)
    ends = _played(short, codes)
    later = _later(work, short, codes, ends)
    return [(begin + later, end + later) for begin, end in last_backwards(short, codes, ends)]


def _played(work: Work, codes: Sequence[Codes]) -> list[list[float]]:
    ends = play(work, codes)
    assert ends is not None, "the order comes to its end"
    return ends


def _later(
    work: Work, short: Work, codes: Sequence[Codes], ends: Sequence[Sequence[float]]
) -> float:
    """Returns the seconds that the micro-batches take which few lack, at the pace of the middle of
    the slowest group."""
    more = work.micro_batches - short.micro_batches
    if not more:
        return 0.0
    first, last = short.micro_batches // 3, 2 * short.micro_batches // 3
    pace = 0.0
    for own, ended in zip(codes, ends, strict=True):
        stage = min(own) >> 2
        whole, inputs = 4 * stage + B, 4 * stage + I
        back = [end for code, end in zip(own, ended, strict=True) if code in (whole, inputs)]
        pace = max(pace, (back[last] - back[first]) / (last - first))
    return more * pace
