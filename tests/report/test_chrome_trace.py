"""Traces are what Perfetto reads: well-formed events, none overlapping on a track."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from meshwright.model.spec import LayerGraph
from meshwright.plan.spec import Plan
from meshwright.report.chrome_trace import chrome_trace, save_chrome_trace
from meshwright.simulate.simulator import simulate_plan
from plain_constants import PLAINLY
from strategies import models_and_plans
from worlds import even_model, even_plan, one_node


@given(models_and_plans(), st.sampled_from([1e5, 1e7]))
def test_events_of_a_track_never_overlap(case: tuple[LayerGraph, Plan], bandwidth: float) -> None:
    model, plan = case
    cluster = one_node(len(plan.devices), bandwidth=bandwidth, shared=True)
    tracks = defaultdict(list)
    for event in chrome_trace(simulate_plan(plan, model, cluster))["traceEvents"]:
        if event["ph"] == "X":
            tracks[event["pid"], event["tid"]].append((event["ts"], event["dur"]))
    for events in tracks.values():
        events.sort()
        for (start, duration), (following, _) in pairwise(events):
            assert start + duration <= following + 1e-6


@given(models_and_plans())
def test_every_interval_and_memory_point_is_an_event(case: tuple[LayerGraph, Plan]) -> None:
    model, plan = case
    timeline = simulate_plan(plan, model, one_node(len(plan.devices)))
    events = json.loads(json.dumps(chrome_trace(timeline), allow_nan=False))["traceEvents"]
    by_kind = {kind: [e for e in events if e["ph"] == kind] for kind in "XCM"}
    assert len(by_kind["X"]) == len(timeline.intervals)
    assert len(by_kind["C"]) == len(timeline.memory)
    assert len(events) == sum(map(len, by_kind.values()))
    named = {(e["pid"], e["tid"]) for e in by_kind["M"] if e["name"] == "thread_name"}
    assert {(e["pid"], e["tid"]) for e in by_kind["X"]} == named
    processes = [e["args"]["name"] for e in by_kind["M"] if e["name"] == "process_name"]
    assert processes == [f"rank {rank} on {d}" for rank, d in enumerate(plan.devices)]


def test_overlapping_transfers_go_to_numbered_tracks() -> None:
    """Both replicas of stage 0 hand their row to the one device of stage 1 at the same moment."""
    model, cluster = even_model(2, cut_bytes=1e6), one_node(3)
    plan = even_plan(model, cluster, data=2, stages=1)
    whole = even_plan(model, cluster, stages=1)
    first, second = plan.pipelines[0].stages[0], whole.pipelines[0].stages[0]
    stages = (
        {"layers": (0, 1), "devices": first.devices},
        {"layers": (1, 2), "devices": (("n:2",),)},
    )
    pipeline = replace(
        plan.pipelines[0], stages=tuple(replace(second, **stage) for stage in stages)
    )
    joined = replace(plan, devices=("n:0", "n:1", "n:2"), pipelines=(pipeline,))
    events = chrome_trace(simulate_plan(joined, model, cluster))["traceEvents"]
    names = {e["args"]["name"] for e in events if e["name"] == "thread_name" and e["pid"] == 2}
    assert {"receive", "receive 2"} <= names


def test_times_are_microseconds_and_the_file_is_json(tmp_path: Path) -> None:
    model, cluster = even_model(1), one_node(1)
    timeline = simulate_plan(even_plan(model, cluster), model, cluster, PLAINLY)
    save_chrome_trace(timeline, tmp_path / "step.json")
    document = json.loads((tmp_path / "step.json").read_text())
    forward = next(e for e in document["traceEvents"] if e["name"] == "0F0")
    assert forward["dur"] == 1000.0
    assert forward["cat"] == "F"
    assert document["otherData"]["source"] == "simulated"


def test_every_stream_has_its_tracks_and_times_are_whole_nanoseconds() -> None:
    model, cluster = even_model(2, seconds=1e-3 / 3, cut_bytes=1e6), one_node(2)
    timeline = simulate_plan(even_plan(model, cluster, stages=2), model, cluster, PLAINLY)
    events = chrome_trace(timeline)["traceEvents"]
    tracks = {e["args"]["name"]: e["tid"] for e in events if e["name"] == "thread_name"}
    assert len(set(tracks.values())) == len(tracks) > 2
    assert all(isinstance(track, int) for track in tracks.values())
    forward = next(e for e in events if e["name"] == "0F0")
    assert (forward["ts"], forward["dur"]) == (0.0, 333.333)
    assert forward["tid"] == tracks["compute"]
