"""Random models and plans that hold together, for the property tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice, pairwise

from hypothesis import strategies as st

from meshwright.cluster.spec import Islands, Link
from meshwright.model.spec import LayerGraph
from meshwright.plan.spec import Pipeline, Plan, PlanInput, Stage
from worlds import chain, cluster, device, divided, job, model, plan_by_hand


@st.composite
def models(draw: st.DrawFn, max_layers: int = 6) -> LayerGraph:
    """Chains of one to `max_layers` layers."""
    costs = draw(st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=1, max_size=max_layers))
    model = chain(costs, tied=draw(st.booleans()), skip=draw(st.booleans()))
    return replace(
        model,
        layers=tuple(divided(x, parameters=draw(SPLIT)) for x in model.layers),
        tied=tuple(replace(x, divided=draw(AXES)) for x in model.tied),
    )


AXES = st.sampled_from([(), ("tensor",)])
SPLIT = st.sampled_from([0, 840, 999, 1000])
"""Of a layer's thousand parameters, those that tensor ranks divide."""


@st.composite
def cuts(draw: st.DrawFn, layers: int, stages: int) -> list[tuple[int, int]]:
    """Ways to cut layers into non-empty stages."""
    inner = draw(
        st.lists(st.integers(1, layers - 1), min_size=stages - 1, max_size=stages - 1, unique=True)
        if stages > 1
        else st.just([])
    )
    return list(pairwise([0, *sorted(inner), layers]))


@st.composite
def meshes(
    draw: st.DrawFn, names: Iterator[str], widths: tuple[int, ...], most: tuple[int, int]
) -> tuple[tuple[str, ...], ...]:
    """Replicas of a stage, of any of the tensor widths, or of width 1 where no other fits.
    `most`: of replicas, and of their devices together."""
    replicas, room = most
    mesh = []
    count = draw(st.integers(1, min(replicas, room)))
    for to_come in reversed(range(count)):
        fitting = [width for width in widths if width <= room - to_come]
        tensor = draw(st.sampled_from(fitting or [1]))
        mesh.append(tuple(islice(names, tensor)))
        room -= tensor
    return tuple(mesh)


@st.composite
def plans(
    draw: st.DrawFn,
    model: LayerGraph,
    *,
    max_devices: int = 72,
    max_rows: int = 6,
    widths: tuple[int, ...] = (1, 2, 3, 4),
) -> Plan:
    """Legal plans: one or two unequal pipelines, stages of unequal data widths and row shares, from
    one tensor width everywhere to another for each replica."""
    some = st.lists(st.sampled_from(widths), min_size=1, max_size=3, unique=True).map(tuple)
    kinds = draw(st.one_of(st.just(widths[:2]), some))
    names = (f"n:{number}" for number in count())
    pipelines: list[Pipeline] = []
    room = max_devices
    for others in reversed(range(draw(st.integers(1, min(2, max_devices))))):
        depth = draw(st.integers(1, min(3, len(model.layers), room - others)))
        rows = draw(st.integers(2, max_rows))
        stages = []
        for position, (first, last) in enumerate(draw(cuts(len(model.layers), depth))):
            free = room - others - (depth - position - 1)
            mesh = draw(meshes(names, kinds, (min(3, rows), free)))
            shares = (rows - len(mesh) + 1, *(1,) * (len(mesh) - 1))
            stages.append(Stage(layers=(first, last), devices=mesh, rows=shares))
            room -= sum(map(len, mesh))
        pipelines.append(
            Pipeline(micro_batches=draw(st.integers(1, 5)), rows=rows, stages=tuple(stages))
        )
    return plan_by_hand(
        *pipelines,
        sequence=model.sequence,
        name="random",
        model=PlanInput(name=model.name, fingerprint=""),
        cluster=PlanInput(name="random", fingerprint=""),
        schedule=draw(st.sampled_from(["1f1b", "gpipe"])),
    )


@st.composite
def models_and_plans(draw: st.DrawFn) -> tuple[LayerGraph, Plan]:
    """A random model with a random legal plan for it."""
    model = draw(models())
    return model, draw(plans(model))


@st.composite
def small_worlds(draw, sizes):
    """Devices of two types in one to three nodes; `sizes`: for every number of devices the most
    layers and the most rows."""
    count = draw(st.sampled_from(sorted(sizes)))
    most_layers, most_rows = sizes[count]
    kinds = draw(st.lists(st.sampled_from(["fast", "slow"]), min_size=count, max_size=count))
    first, second = sorted(draw(st.tuples(st.integers(1, count), st.integers(1, count))))
    nodes = [tuple(kinds[a:b]) for a, b in ((0, first), (first, second), (second, count)) if b > a]
    memory = draw(st.sampled_from([1.15, 1.3, 16.0]))
    types = (
        device("fast", draw(st.sampled_from([10.0, 20.0, 35.0])), memory),
        device("slow", 10.0, draw(st.sampled_from([memory, 16.0]))),
    )
    network = Link(
        bandwidth=draw(st.sampled_from([1e7, 1e9, 1e11])),
        latency=draw(st.sampled_from([0.0, 1e-5, 1e-3])),
        shared=draw(st.booleans()),
    )
    layers = draw(st.lists(st.sampled_from([5.0, 10.0, 40.0]), min_size=1, max_size=most_layers))
    graph = model(
        layers,
        parameters=draw(st.sampled_from([1000, 1_000_000, 10_000_000])),
        tied=draw(st.booleans()),
        units=draw(st.sampled_from([0, 1, 2, 4])),
        saved=draw(st.sampled_from([1e6, 6e7])),
    )
    where = cluster(*nodes, network=network, types=types)
    return graph, where, job(draw(st.integers(1, most_rows)))


@st.composite
def worlds_with_islands(draw, sizes):
    """Small worlds with a slow link inside nodes, and a fast one between some of their devices."""
    graph, where, todo = draw(small_worlds(sizes))
    inside = Link(bandwidth=draw(st.sampled_from([1e7, 1e9])), shared=draw(st.booleans()))
    joined = Link(bandwidth=1e11, latency=1e-6)
    nodes = []
    for node in where.nodes:
        order = draw(st.permutations(range(len(node.devices))))
        size = draw(st.integers(2, 3))
        groups = tuple(
            tuple(order[i : i + size]) for i in range(0, len(order), size) if i + 1 < len(order)
        )
        islands = Islands(groups=groups, link=joined) if groups else None
        nodes.append(replace(node, inside=inside, islands=islands))
    return graph, replace(where, nodes=tuple(nodes)), todo
