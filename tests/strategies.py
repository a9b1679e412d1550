"""Random models and plans that hold together, for the property tests."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import replace
from itertools import count, islice, pairwise

from hypothesis import strategies as st

from meshwright.model.spec import Layer, LayerGraph, Tensor, Tied
from meshwright.plan.spec import Job, Pipeline, Plan, Stage, Subject


def layer(name: str, *, cost: float = 1.0, parameters: int = 1000, units: int = 0) -> Layer:
    """A layer whose amounts are in proportion to its cost."""
    return Layer(
        name=name,
        signature=f"s{cost}-{parameters}",
        forward_flops=1e9 * cost,
        backward_flops=2e9 * cost,
        traffic_bytes=1e6 * cost,
        parameters=parameters,
        saved_bytes=1e5 * cost,
        tensor_units=units,
    )


def chain(costs: list[float], *, tied: bool = False, skip: bool = False) -> LayerGraph:
    """Layers in a row; optionally the first and last share a parameter, or are joined by a skip."""
    last = len(costs) - 1
    tensors = [
        Tensor(name=f"t{i}", bytes=64.0, producer=i, consumers=(i + 1,)) for i in range(last)
    ]
    if skip and last > 1:
        tensors.append(Tensor(name="skip", bytes=32.0, producer=0, consumers=(last,)))
    shared = (Tied(name="shared", layers=(0, last), parameters=500),) if tied and last else ()
    return LayerGraph(
        name="chain",
        sequence=8,
        precision="fp32",
        layers=tuple(layer(f"l{i}", cost=cost) for i, cost in enumerate(costs)),
        tensors=tuple(tensors),
        tied=shared,
    )


def freeze(model: LayerGraph, layers: Container[int], *, tied: bool = False) -> LayerGraph:
    """The model with some layers' own weights frozen, and what is tied if asked for: no gradients
    of weights there, and no backward at all where nothing is trained in a layer or before it."""
    shared = set() if tied else {n for each in model.tied for n in each.layers}
    found: list[Layer] = []
    for n, layer in enumerate(model.layers):
        before = [t.producer for t in model.tensors if n in t.consumers]
        held = n in layers
        flows = not held or n in shared or any(found[each].has_backward for each in before)
        changed = replace(
            layer,
            signature=f"{layer.signature}-{held}-{flows}",
            has_backward=flows,
            backward_flops=layer.backward_flops if flows else 0.0,
            saved_bytes=layer.saved_bytes if flows else 0.0,
            split_saved_bytes=layer.split_saved_bytes if flows else 0.0,
        )
        if held:
            changed = replace(
                changed,
                parameters=0,
                cast_parameters=0,
                split_parameters=0,
                frozen_parameters=layer.parameters,
                cast_frozen=layer.cast_parameters,
                split_frozen=layer.split_parameters,
                backward_flops=max(changed.backward_flops - layer.forward_flops, 0.0),
            )
        found.append(changed)
    return replace(
        model,
        layers=tuple(found),
        tensors=tuple(replace(t, gradient=found[t.producer].has_backward) for t in model.tensors),
        tied=tuple(
            replace(t, parameters=0, frozen_parameters=t.parameters) if tied else t
            for t in model.tied
        ),
    )


@st.composite
def models(draw: st.DrawFn, max_layers: int = 6) -> LayerGraph:
    """Chains of one to `max_layers` layers."""
    costs = draw(st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=1, max_size=max_layers))
    model = chain(costs, tied=draw(st.booleans()), skip=draw(st.booleans()))
    return replace(
        model,
        layers=tuple(replace(x, split_parameters=draw(SPLIT)) for x in model.layers),
        tied=tuple(replace(x, split=draw(st.booleans())) for x in model.tied),
    )


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
    """Replicas of a stage, of any of the tensor widths, or of width 1 where no other fits; at most
    so many replicas, of at most so many devices together."""
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
    devices = [
        d for p in pipelines for stage in p.stages for replica in stage.devices for d in replica
    ]
    return Plan(
        name="random",
        model=Subject(name=model.name, fingerprint=""),
        cluster=Subject(name="random", fingerprint=""),
        job=Job(
            global_batch=sum(p.micro_batches * p.rows for p in pipelines),
            sequence=model.sequence,
            precision="fp32",
        ),
        schedule=draw(st.sampled_from(["1f1b", "gpipe"])),
        devices=tuple(devices),
        pipelines=tuple(pipelines),
    )


@st.composite
def models_and_plans(draw: st.DrawFn) -> tuple[LayerGraph, Plan]:
    """A random model with a random legal plan for it."""
    model = draw(models())
    return model, draw(plans(model))
