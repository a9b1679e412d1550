"""Proposes the plans that people write by hand, and AMP's, as candidates with given layer cuts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

from meshwright.rivals import amp
from meshwright.search.costs import Costs, group_times
from meshwright.search.estimate import Bounds, Candidate
from meshwright.search.placement import default_placement
from meshwright.search.space import DeviceSet, Grid, Shape, divisors, grids, shapes

WORD_BYTES = 4
"""AMP counts 32-bit words."""


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


def _by_hand(costs: Costs, used: DeviceSet, grid: Grid) -> list[Candidate]:
    bounds = even_bounds(costs, grid.stages)
    if bounds is None:
        return []
    place = default_placement(used.devices, grid)
    return [Candidate(used, place, shape, bounds) for shape in shapes(grid, costs.job, ("1f1b",))]


def ddp(costs: Costs, used: DeviceSet) -> list[Candidate]:
    """Proposes data parallelism: every device holds a replica of the whole model."""
    every = grids(used.devices, costs.model, costs.job, Counter())
    return [
        candidate
        for grid in every
        if grid.tensor == grid.stages == 1
        for candidate in _by_hand(costs, used, grid)
    ]


def even(costs: Costs, used: DeviceSet) -> list[Candidate]:
    """Proposes every grid of Megatron's kind: all stages have equally many layers, ranks are in the
    default order."""
    every = grids(used.devices, costs.model, costs.job, Counter())
    return [candidate for grid in every for candidate in _by_hand(costs, used, grid)]


def amp_ranking(costs: Costs, used: DeviceSet) -> list[Candidate]:
    """Ranks grids as AMP does on our layer times, averaged over the devices as AMP does; best
    first. Empty where nodes differ in their number of devices, which AMP cannot express."""
    per_node = Counter(device.node for device in used.devices)
    if len(set(per_node.values())) > 1:
        return []
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
    legal = {grid.tensor for grid in grids(used.devices, costs.model, costs.job, Counter())}
    model = _amp_model(costs, used, sorted(legal & set(divisors(devices_per_node))))
    ranking = amp.rank(model, cluster, costs.job.global_batch)
    return [_transplanted(used, prediction) for prediction in ranking]


def _amp_model(costs: Costs, used: DeviceSet, tensors: list[int]) -> amp.AmpModel:
    layers = costs.model.layers
    names = [device.name for device in used.devices]
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


def _transplanted(used: DeviceSet, prediction: amp.AmpPrediction) -> Candidate:
    chosen = prediction.strategy
    grid = Grid(data=chosen.data, tensor=chosen.tensor, stages=chosen.stages)
    shape = Shape(
        grid=grid, rows=chosen.micro_batch, micro_batches=prediction.micro_batches, schedule="1f1b"
    )
    return Candidate(used, default_placement(used.devices, grid), shape, prediction.bounds)


BASELINES: dict[str, Callable[[Costs, DeviceSet], list[Candidate]]] = {
    "ddp": ddp,
    "even": even,
    "amp": amp_ranking,
}
"""Each kind of hand-made plan, under its name for users. AMP's candidates come ranked by AMP."""
