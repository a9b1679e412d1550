"""Writes a timeline in Chrome's trace event format, which Perfetto and chrome://tracing open.

Format: "Trace TraceEvent Format", Google, 2016: `X` complete events, `C` counters, `M` metadata;
times in microseconds."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from meshwright import files
from meshwright.program.operations import Stream
from meshwright.program.timeline import Interval, Timeline

TraceEvent = dict[str, Any]

MICROSECONDS = 1e6
_STREAMS: tuple[Stream, ...] = ("compute", "send", "receive", "reduce")
_TRACKS_PER_STREAM = 1000
"""Distance between the first track numbers of two streams, so that streams keep their order."""


def sub_tracks(intervals: Iterable[Interval]) -> Iterator[tuple[int, Interval]]:
    """Yields each interval with the lowest track number on which it overlaps no earlier one."""
    ends: list[float] = []
    for i in sorted(intervals, key=lambda i: (i.start_seconds, i.end_seconds)):
        track = next((k for k, end in enumerate(ends) if end <= i.start_seconds), len(ends))
        ends[track : track + 1] = [i.end_seconds]
        yield track, i


def chrome_trace(timeline: Timeline) -> dict[str, Any]:
    """Converts a timeline to a trace, plain data for JSON: one process per device, one track per
    stream (more if transfers overlap), memory as a counter."""
    by_stream: dict[tuple[int, Stream], list[Interval]] = defaultdict(list)
    for i in timeline.intervals:
        by_stream[i.rank, i.stream].append(i)
    events: list[TraceEvent] = []
    for rank, device in enumerate(timeline.devices):
        events.append(_name("process_name", rank, 0, f"rank {rank} on {device}"))
        events.append(_sort_index("process_sort_index", rank, 0, rank))
        for number, stream in enumerate(_STREAMS):
            tracks: set[int] = set()
            for sub, i in sub_tracks(by_stream[rank, stream]):
                track = number * _TRACKS_PER_STREAM + sub
                if track not in tracks:
                    tracks.add(track)
                    name = stream if sub == 0 else f"{stream} {sub + 1}"
                    events.append(_name("thread_name", rank, track, name))
                    events.append(_sort_index("thread_sort_index", rank, track, track))
                events.append(_complete(i, track))
    events += [
        {
            "ph": "C",
            "name": "memory",
            "pid": point.rank,
            "ts": point.seconds * MICROSECONDS,
            "args": {"bytes": point.bytes},
        }
        for point in timeline.memory
    ]
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"source": timeline.source, "step_seconds": timeline.step_seconds},
    }


def _complete(i: Interval, track: int) -> TraceEvent:
    """Returns a complete event. Start and end are both rounded to a nanosecond, so that intervals
    that touch never overlap."""
    start = round(i.start_seconds * MICROSECONDS, 3)
    end = round(i.end_seconds * MICROSECONDS, 3)
    arguments = {"stage": i.stage, "micro_batch": i.micro_batch, "peer": i.peer, "bytes": i.bytes}
    return {
        "ph": "X",
        "name": i.label,
        "cat": str(i.op),
        "pid": i.rank,
        "tid": track,
        "ts": start,
        "dur": round(end - start, 3),
        "args": {name: value for name, value in arguments.items() if value is not None},
    }


def _name(kind: str, process: int, track: int, name: str) -> TraceEvent:
    return {"ph": "M", "name": kind, "pid": process, "tid": track, "args": {"name": name}}


def _sort_index(kind: str, process: int, track: int, index: int) -> TraceEvent:
    return {"ph": "M", "name": kind, "pid": process, "tid": track, "args": {"sort_index": index}}


def save_chrome_trace(timeline: Timeline, path: Path) -> None:
    """Writes `chrome_trace(timeline)` as JSON."""
    files.write_text(path, json.dumps(chrome_trace(timeline)) + "\n")
