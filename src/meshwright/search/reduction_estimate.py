"""Estimates when the gradients of all stages are summed, once their last backwards are known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from meshwright.cluster.topology import Resource
from meshwright.search.candidate import CandidatePipeline
from meshwright.search.costs import (
    PROBE_BYTES,
    Costs,
    TensorGroup,
    group_prefix,
    reduced_bytes,
    reduced_width,
    remembered,
    ring,
)
from meshwright.search.pipeline_seconds import Span
from meshwright.search.stage_devices import StageDevices


def reduced(
    costs: Costs, pipelines: Sequence[CandidatePipeline], spans: Sequence[list[Span]]
) -> float:
    """Returns when all gradients are summed."""
    end = max(last for span in spans for _, last in span)
    free: dict[Resource, float] = {}
    for begin, complete, size, closing, holders in sorted(
        _sums(costs, pipelines, spans), key=lambda found: found[1]
    ):
        latency, used = _rings(costs, _groups(holders))
        slowest = 0.0
        for name, each in used:
            done = max(free.get(name, 0.0), begin) + each * size
            free[name] = done
            slowest = max(slowest, done, complete + each * closing)
        end = max(end, slowest + latency)
    return end


def alone_after(
    costs: Costs, pipelines: Sequence[CandidatePipeline], backwards: Sequence[Sequence[float]]
) -> list[list[float]]:
    """Returns by how long the sums of every stage's gradients outlast its last backward, which
    takes these seconds, if nothing else uses the links and all holders are ready."""
    spans = [[(0.0, each) for each in own] for own in backwards]
    found = [[0.0 for _ in own] for own in backwards]
    for begin, complete, size, closing, holders in _sums(costs, pipelines, spans):
        latency, used = _rings(costs, _groups(holders))
        slowest = max((each for _, each in used), default=0.0)
        done = latency + max(begin + slowest * size, complete + slowest * closing)
        for (p, s), _, _, (_, end) in holders:
            found[p][s] = max(found[p][s], done - end)
    return found


Holder = tuple[tuple[int, int], StageDevices, tuple[int, int], Span]
"""The numbers of a pipeline and of its stage, the stage, its layers and its last backward."""

Sum = tuple[float, float, float, float, list[Holder]]
"""The time when the first gradients are there, when the last are, bytes on each rank, those that
are sent last, and the stages that hold them."""


def _sums(
    costs: Costs, pipelines: Sequence[CandidatePipeline], spans: Sequence[list[Span]]
) -> Iterator[Sum]:
    """Yields every sum of gradients: of layers with the same holders, and of tied parameters."""
    stages: list[Holder] = [
        ((p, s), stage, layers, span)
        for p, (pipeline, own) in enumerate(zip(pipelines, spans, strict=True))
        for s, (stage, layers, span) in enumerate(
            zip(pipeline.stages, pairwise(pipeline.bounds), own, strict=True)
        )
    ]
    for a, b in pairwise(sorted({cut for pipeline in pipelines for cut in pipeline.bounds})):
        holders = [stage for stage in stages if stage[2][0] <= a and b <= stage[2][1]]
        if sum(len(stage.groups) for _, stage, _, _ in holders) < 2:
            continue
        size, last = reduced_bytes(costs, (a, b), _widest(holders))
        if size > 0:
            begin = max(_passed(costs, holder, b) for holder in holders)
            complete = max(_passed(costs, holder, a) for holder in holders)
            yield begin, complete, size, last, holders
    for tied in costs.model.tied:
        holders = [
            stage for stage in stages if any(stage[2][0] <= x < stage[2][1] for x in tied.layers)
        ]
        if sum(len(stage.groups) for _, stage, _, _ in holders) > 1:
            ready = max(end for *_, (_, end) in holders)
            share = _widest(holders) if "tensor" in tied.divided else 1
            size = tied.parameters / share * reduced_width(costs)
            yield ready, ready, size, size, holders


def _groups(holders: Sequence[Holder]) -> tuple[TensorGroup, ...]:
    return tuple(group for _, stage, _, _ in holders for group in stage.groups)


def _widest(holders: Sequence[Holder]) -> int:
    return max(len(group) for _, stage, _, _ in holders for group in stage.groups)


def _passed(costs: Costs, holder: Holder, layer: int) -> float:
    """Returns when a stage's last backward, from its last layer to its first, has come to a layer
    and its gradients may be sent."""
    _, stage, (first, last), (begin, end) = holder
    _, prefix = group_prefix(costs, stage.groups[0], stage.rows[0])
    whole = prefix[last] - prefix[first]
    done = (prefix[last] - prefix[layer]) / whole if whole else 1.0
    delay = costs.system.reduction_delay
    return begin + (end - begin) * (delay + (1 - delay) * done)


Rings = tuple[float, tuple[tuple[Resource, float], ...]]
"""Latency, and seconds per byte on every resource."""


def _rings(costs: Costs, groups: tuple[TensorGroup, ...]) -> Rings:
    """Returns what the rings of all tensor ranks of some tensor groups ask of the links. Where
    groups differ in width, a rank of a narrow one is in the rings of all shares that it holds."""
    return remembered(costs, ("rings", groups), lambda: _priced_rings(costs, groups))


def _priced_rings(costs: Costs, groups: tuple[TensorGroup, ...]) -> Rings:
    latency = 0.0
    used: dict[Resource, float] = {}
    widest = max(map(len, groups))
    for t in range(widest):
        traffic = ring(costs, tuple(group[t * len(group) // widest] for group in groups))
        latency = max(latency, traffic.latency)
        for name, size in traffic.bytes_by_resource.items():
            each = size / PROBE_BYTES / costs.links.capacities[name]
            used[name] = used.get(name, 0.0) + each
    return latency, tuple(used.items())
