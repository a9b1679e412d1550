"""Makes the plans that people write by hand, and AMP's: pipelines with given cuts, in 1F1B."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter

import numpy as np

from meshwright.rivals import amp
from meshwright.search.candidate import CandidatePipeline, excess_bytes
from meshwright.search.candidate_estimate import candidate_seconds, compute_seconds
from meshwright.search.costs import Costs, group_times
from meshwright.search.layer_partition import Stages, least_excess
from meshwright.search.space import divisors, legal_widths, usable_devices
from meshwright.search.stage_devices import StageDevices
from meshwright.stopping import raise_if_stopped

WORD_BYTES = 4
"""AMP counts 32-bit words."""

Bounds = tuple[int, ...]
"""S + 1 layer indices of S stages."""

Widths = tuple[int, int, int]
"""Data width, tensor width and number of stages."""


@dataclass(frozen=True, slots=True)
class HandMade:
    """Describes the best hand-made plan of a kind."""

    name: str
    pipeline: CandidatePipeline
    seconds: float
    """The seconds of its step in closed form."""
    fits: bool


def blocks(costs: Costs) -> tuple[int, int]:
    """Returns [first, last) of the layers with the commonest signature and all between them."""
    names = [layer.signature for layer in costs.model.layers]
    common, count = Counter(names).most_common(1)[0]
    if count == 1:
        return 0, len(names)
    return names.index(common), len(names) - names[::-1].index(common)


def even_bounds(costs: Costs, stages: int) -> Bounds | None:
    """Gives every stage equally many blocks, the remainder to the first ones; what stands before
    and after the blocks goes with the first and last stage. None with more stages than blocks."""
    first, last = blocks(costs)
    share, left = divmod(last - first, stages)
    if share == 0:
        return None
    sizes = np.full(stages, share)
    sizes[:left] += 1
    inner = first + np.cumsum(sizes)[:-1]
    return (0, *(int(cut) for cut in inner), len(costs.model.layers))


def in_rank_order(devices: Sequence[str], widths: Widths) -> Stages:
    """Places ranks as launchers do: rank = tensor index + tp * (replica + dp * stage), devices in
    order."""
    data, tensor, stages = widths
    groups = [tuple(devices[i : i + tensor]) for i in range(0, len(devices), tensor)]
    return tuple(tuple(groups[s * data : (s + 1) * data]) for s in range(stages))


def launched(stages: Stages, rows: int, micro_batches: int, bounds: Bounds) -> CandidatePipeline:
    """Returns a pipeline whose replicas have `rows` rows of every micro-batch each."""
    devices = tuple(StageDevices(groups, (rows,) * len(groups)) for groups in stages)
    return CandidatePipeline(devices, bounds, micro_batches)


def _all_widths(costs: Costs) -> Iterator[Widths]:
    """Yields the widths that use all devices."""
    devices = usable_devices(costs)
    per_node = Counter(device.node for device in devices)
    for tensor in legal_widths(costs):
        if any(count % tensor for count in per_node.values()):
            continue
        for data in divisors(len(devices) // tensor):
            stages = len(devices) // tensor // data
            if costs.job.global_batch % data == 0 and stages <= len(costs.model.layers):
                yield data, tensor, stages


def _evenly_cut(costs: Costs, widths: Widths) -> Iterator[CandidatePipeline]:
    """Yields an even pipeline with every size of micro-batches."""
    data, _, depth = widths
    bounds = even_bounds(costs, depth)
    if bounds is None:
        return
    stages = in_rank_order([device.name for device in usable_devices(costs)], widths)
    share = costs.job.global_batch // data
    for rows in divisors(share):
        yield launched(stages, rows, share // rows, bounds)


def ddp(costs: Costs) -> list[CandidatePipeline]:
    """Proposes data parallelism: every device holds a replica of the whole model."""
    every = (widths for widths in _all_widths(costs) if widths[1:] == (1, 1))
    return [pipeline for widths in every for pipeline in _evenly_cut(costs, widths)]


def even(costs: Costs) -> list[CandidatePipeline]:
    """Proposes every grid of Megatron's kind: all stages have equally many layers, ranks are in the
    default order."""
    every = _all_widths(costs)
    return [pipeline for widths in every for pipeline in _evenly_cut(costs, widths)]


def amp_ranking(costs: Costs) -> list[CandidatePipeline]:
    """Ranks grids as AMP does on our layer times, averaged over the devices as AMP does; best
    first. Empty where nodes differ in their number of devices, which AMP cannot express."""
    given = _amp_inputs(costs)
    names = [device.name for device in usable_devices(costs)]
    return [_transplanted(names, found) for found in amp.rank(*given)] if given else []


AmpInputs = tuple[amp.AmpModel, amp.AmpCluster, int]
"""A model, a cluster and the rows of a step."""


def _amp_inputs(costs: Costs) -> AmpInputs | None:
    """Returns what AMP plans for; None if it cannot express it."""
    devices = usable_devices(costs)
    per_node = Counter(device.node for device in devices)
    if len(set(per_node.values())) > 1:
        return None
    devices_per_node = next(iter(per_node.values()))
    nodes = {node.name: node for node in costs.cluster.nodes}
    cluster = amp.AmpCluster(
        devices_per_node=devices_per_node,
        nodes=tuple(
            amp.AmpNode(
                network=nodes[name].network.bandwidth / WORD_BYTES,
                inside=nodes[name].inside.bandwidth / WORD_BYTES,
            )
            for name in per_node
        ),
    )
    legal = {tensor for _, tensor, _ in _all_widths(costs)}
    tensors = sorted(legal & set(divisors(devices_per_node)))
    model = _amp_model(costs, [device.name for device in devices], tensors)
    return model, cluster, costs.job.global_batch


def best_of_amp(costs: Costs) -> HandMade | None:
    """Returns the first plan of AMP's ranking that fits without recomputation; else the one that
    misses by least. What could not fit however its layers were cut is not ranked."""
    given = _amp_inputs(costs)
    if given is None:
        return None
    names = [device.name for device in usable_devices(costs)]
    every = amp.space(*given)
    least = {each: _least_excess_bytes(costs, names, each) for each in every}
    for found in amp.ranked(*given, [each for each in every if least[each] <= 0]):
        pipeline = _transplanted(names, found)
        if excess_bytes(costs, pipeline, "1f1b") <= 0:
            seconds = candidate_seconds(costs, (pipeline,), "1f1b")
            return HandMade("amp", pipeline, seconds, fits=True)
    nearest: tuple[float, float, int, CandidatePipeline] | None = None
    for number, each in sorted(enumerate(every), key=lambda pair: least[pair[1]]):
        if nearest is not None and least[each] > nearest[0]:
            break
        found = amp.predict(given[0], given[1], each, given[2])
        pipeline = _transplanted(names, found)
        rated = excess_bytes(costs, pipeline, "1f1b"), found.seconds, number, pipeline
        nearest = min(nearest or rated, rated, key=itemgetter(0, 1, 2))
    if nearest is None:
        return None
    pipeline = nearest[-1]
    return HandMade("amp", pipeline, candidate_seconds(costs, (pipeline,), "1f1b"), fits=False)


def _least_excess_bytes(costs: Costs, names: Sequence[str], chosen: amp.Strategy) -> float:
    """Returns the bytes by which a strategy exceeds memory if its layers are cut for that alone."""
    stages = in_rank_order(names, (chosen.data, chosen.tensor, chosen.stages))
    devices = tuple(StageDevices(own, (chosen.micro_batch,) * len(own)) for own in stages)
    count = costs.job.global_batch // chosen.data // chosen.micro_batch
    return excess_bytes(costs, least_excess(costs, devices, count, "1f1b"), "1f1b")


def _amp_model(costs: Costs, names: Sequence[str], tensors: list[int]) -> amp.AmpModel:
    layers = costs.model.layers
    first, last = blocks(costs)
    forward = {}
    for tensor in tensors:
        groups = [tuple(names[i : i + tensor]) for i in range(0, len(names), tensor)]
        times = [group_times(costs, group, 1)[0] for group in groups]
        forward[tensor] = tuple(float(t) for t in np.mean(times, axis=0))
    behind = tuple(float(size) / WORD_BYTES for size in costs.table.cut[1:])
    return amp.AmpModel(
        forward_seconds=forward,
        assigned=tuple(range(len(layers))),
        uniform=(first, last - first, len(layers) - last),
        boundary_words=dict.fromkeys(tensors, behind),
        parameter_words=tuple(float(layer.parameters) for layer in layers),
        embedding_words=float(sum(tied.parameters for tied in costs.model.tied)),
        embeddings=tuple(sorted({i for tied in costs.model.tied for i in tied.layers})),
    )


def _transplanted(names: Sequence[str], prediction: amp.AmpPrediction) -> CandidatePipeline:
    chosen = prediction.strategy
    stages = in_rank_order(names, (chosen.data, chosen.tensor, chosen.stages))
    return launched(stages, chosen.micro_batch, prediction.micro_batches, prediction.bounds)


BASELINES: dict[str, Callable[[Costs], list[CandidatePipeline]]] = {
    "ddp": ddp,
    "even": even,
    "amp": amp_ranking,
}
"""Each kind of hand-made plan, under its name for users. AMP's come ranked by AMP."""


def best_by_hand(costs: Costs, name: str) -> HandMade | None:
    """Returns the best hand-made plan that fits; else the one that misses by least; None if there
    is none. Those of AMP are ranked as AMP does and never recompute, the others by our own
    estimate."""
    if name == "amp":
        return best_of_amp(replace(costs, recomputed=None))
    every = BASELINES[name](costs)
    excess = []
    for pipeline in every:
        raise_if_stopped()
        excess.append(excess_bytes(costs, pipeline, "1f1b"))
    fitting = [each for each, missing in zip(every, excess, strict=True) if missing <= 0]
    best = _fastest(costs, fitting)
    if best is not None:
        return HandMade(name, *best, fits=True)
    if not every:
        return None
    nearest = every[excess.index(min(excess))]
    return HandMade(name, nearest, candidate_seconds(costs, (nearest,), "1f1b"), fits=False)


def _fastest(
    costs: Costs, pipelines: Sequence[CandidatePipeline]
) -> tuple[CandidatePipeline, float] | None:
    """Returns the fastest of some pipelines in 1F1B, and its seconds in closed form."""
    best: tuple[CandidatePipeline, float] | None = None
    for pipeline in pipelines:
        raise_if_stopped()
        limit = best[1] if best else float("inf")
        if best and compute_seconds(costs, pipeline, "1f1b") >= limit:
            continue
        seconds = candidate_seconds(costs, (pipeline,), "1f1b", limit)
        if seconds < limit:
            best = pipeline, seconds
    return best
