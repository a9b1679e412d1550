"""Small clusters, models, jobs and plans, whose costs can be worked out by hand."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

from meshwright.cluster.spec import Cluster, DeviceType, Link, Node, Precision, Site, devices_of
from meshwright.model.spec import Layer, LayerGraph, Tensor, Tied, with_division
from meshwright.plan.spec import Job, Pipeline, Plan, PlanInput, Stage

GIB = 1 << 30
ANY = PlanInput(name="any", fingerprint="")
"""The model or the cluster of a plan, where no test asks which."""


def device(
    name: str, tflops: float = 10.0, memory_gib: float = 16.0, precision: Precision = "fp32"
) -> DeviceType:
    """A type whose efficiencies are all 1, with memory so quick that compute alone counts."""
    return DeviceType(
        name=name,
        memory=int(memory_gib * GIB),
        memory_bandwidth=1e15,
        peak={precision: tflops * 1e12},
        matmul_efficiency=1.0,
        attention_efficiency=1.0,
        memory_efficiency=1.0,
    )


FAST, SLOW = device("fast", 20.0), device("slow", 10.0)
DEVICE = replace(device("g", 1.0, 64.0), memory_bandwidth=1e18, attention_efficiency=0.5)
"""One TFLOP a second, and memory that is never the limit."""
NVLINK = Link(bandwidth=1e11, latency=1e-6, kind="measured")
ETHERNET = Link(bandwidth=1e9, latency=1e-5, kind="measured")
"""What is stated of links in these worlds is what messages reach."""


def cluster(
    *nodes: tuple[str, ...],
    inside: Link = NVLINK,
    network: Link = ETHERNET,
    types: tuple[DeviceType, ...] = (FAST, SLOW),
    names: Sequence[str] = "abcdefgh",
) -> Cluster:
    """Nodes a, b, c ... with these device types, at one site."""
    return Cluster(
        name="test",
        types={kind.name: kind for kind in types},
        nodes=tuple(
            Node(name=names[i], site="here", devices=kinds, inside=inside, network=network)
            for i, kinds in enumerate(nodes)
        ),
        sites=(Site(name="here"),),
    )


def one_node(
    devices: int, *, bandwidth: float = 1e9, latency: float = 0.0, shared: bool = False
) -> Cluster:
    """A node `n` with a port for each device, or with one bus."""
    inside = Link(bandwidth=bandwidth, latency=latency, shared=shared, kind="measured")
    return cluster(
        ("g",) * devices,
        inside=inside,
        network=Link(bandwidth=1e9, kind="measured"),
        types=(DEVICE,),
        names=("n",),
    )


def layer(name: str = "l", flops: float = 1.0, **facts: Any) -> Layer:
    """A layer that computes twice as much backward as forward, and moves, holds and keeps only what
    `facts` say."""
    usual = {
        "signature": name,
        "forward_flops": flops,
        "backward_flops": 2 * flops,
        "traffic_bytes": 0.0,
        "parameters": 0,
        "saved_bytes": 0.0,
    }
    return Layer(name=name, **(usual | facts))


def in_a_row(layers: Sequence[Layer], *, cut_bytes: float, **facts: Any) -> LayerGraph:
    """A model in fp32 each of whose layers hands `cut_bytes` a row to the next."""
    tensors = tuple(
        Tensor(name=f"t{i}", bytes=cut_bytes, producer=i, consumers=(i + 1,))
        for i in range(len(layers) - 1)
    )
    usual = {"name": "chain", "sequence": 8, "precision": "fp32", "tensors": tensors}
    return LayerGraph(layers=tuple(layers), **(usual | facts))


def even_model(
    layers: int, *, seconds: float = 1e-3, cut_bytes: float = 1.0, parameters: int = 0
) -> LayerGraph:
    """Equal layers; a row takes `seconds` forward and twice that backward on DEVICE."""
    facts = {"signature": "s", "parameters": parameters, "saved_bytes": 1000.0}
    one = layer("l", seconds * 1e12, **facts)
    return in_a_row((one,) * layers, cut_bytes=cut_bytes, name="even", sequence=1)


def chain(costs: list[float], *, tied: bool = False, skip: bool = False) -> LayerGraph:
    """Layers in a row, of amounts in proportion to their costs; optionally the first and last
    share a parameter, or are joined by a skip."""
    last = len(costs) - 1
    layers = [
        layer(
            f"l{i}",
            1e9 * cost,
            signature=f"s{cost}",
            traffic_bytes=1e6 * cost,
            parameters=1000,
            saved_bytes=1e5 * cost,
        )
        for i, cost in enumerate(costs)
    ]
    shared = (Tied(name="shared", layers=(0, last), parameters=500),) if tied and last else ()
    model = in_a_row(layers, cut_bytes=64.0, tied=shared)
    if not skip or last < 2:
        return model
    beside = Tensor(name="skip", bytes=32.0, producer=0, consumers=(last,))
    return replace(model, tensors=(*model.tensors, beside))


def divided(layer: Layer, **changes: Any) -> Layer:
    """The layer with changes of what it does when tensor ranks divide it."""
    return with_division(layer, replace(layer.along("tensor"), **changes))


def model(
    gflops: list[float],
    *,
    parameters: int = 1_000_000,
    tied: bool = False,
    units: int = 4,
    saved: float = 1e6,
) -> LayerGraph:
    """Layers in a row that compute so much for a row forward, wholly divided by tensor ranks; a row
    hands 100 kB from layer to layer."""
    last, splits = len(gflops) - 1, units > 0
    layers = [
        divided(
            layer(
                f"l{i}",
                each * 1e9,
                signature=f"{each}/{parameters}/{units}",
                traffic_bytes=1.0,
                parameters=parameters,
                saved_bytes=saved,
            ),
            units=units,
            parameters=parameters * splits,
            flops=each * 1e9 * splits,
            saved_bytes=saved * splits,
            forward_all_reduce_bytes=(1e5,) * splits,
            backward_all_reduce_bytes=(1e5,) * splits,
        )
        for i, each in enumerate(gflops)
    ]
    shared = (Tied(name="table", layers=(0, last), parameters=500_000),) if tied and last else ()
    return in_a_row(layers, cut_bytes=1e5, sequence=16, tied=shared)


def freeze(model: LayerGraph, layers: Container[int], *, tied: bool = False) -> LayerGraph:
    """The model with some layers' own weights frozen, and what is tied if asked for: no gradients
    of weights there, and no backward at all where nothing is trained in a layer or before it."""
    shared = set() if tied else {n for each in model.tied for n in each.layers}
    found: list[Layer] = []
    for n, own in enumerate(model.layers):
        before = [t.producer for t in model.tensors if n in t.consumers]
        held = n in layers
        flows = not held or n in shared or any(found[each].has_backward for each in before)
        changed = replace(
            own,
            signature=f"{own.signature}-{held}-{flows}",
            has_backward=flows,
            backward_flops=own.backward_flops if flows else 0.0,
            saved_bytes=own.saved_bytes if flows else 0.0,
        )
        tensor = own.along("tensor")
        if not flows:
            changed = divided(changed, saved_bytes=0.0)
        if held:
            changed = replace(
                changed,
                parameters=0,
                cast_parameters=0,
                frozen_parameters=own.parameters,
                cast_frozen=own.cast_parameters,
                backward_flops=max(changed.backward_flops - own.forward_flops, 0.0),
            )
            changed = divided(changed, parameters=0, frozen_parameters=tensor.parameters)
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


def job(global_batch: int = 8, optimizer: str = "adamw") -> Job:
    """A job for what `model` makes."""
    return Job(global_batch=global_batch, sequence=16, precision="fp32", optimizer=optimizer)


def plan_by_hand(
    *pipelines: Pipeline,
    sequence: int = 1,
    precision: Precision = "fp32",
    optimizer: str = "adamw",
    **facts: Any,
) -> Plan:
    """A plan of these pipelines; its ranks are their devices, in the order of the stages."""
    named = (d for p in pipelines for s in p.stages for replica in s.devices for d in replica)
    usual = {
        "name": "by hand",
        "model": ANY,
        "cluster": ANY,
        "job": Job(
            global_batch=sum(p.micro_batches * p.rows for p in pipelines),
            sequence=sequence,
            precision=precision,
            optimizer=optimizer,
        ),
        "devices": tuple(dict.fromkeys(named)),
    }
    return Plan(pipelines=pipelines, **(usual | facts))


def even_plan(
    model: LayerGraph,
    cluster: Cluster,
    *,
    data: int = 1,
    tensor: int = 1,
    stages: int = 1,
    micro_batches: int = 1,
    schedule: str = "1f1b",
) -> Plan:
    """Classic dp x tp x pp with one row per replica, on the first devices of the cluster."""
    devices = [device.name for device in devices_of(cluster)]
    taken, depth = count(), len(model.layers) // stages
    mesh = tuple(
        Stage(
            layers=(s * depth, (s + 1) * depth),
            devices=tuple(tuple(devices[next(taken)] for _ in range(tensor)) for _ in range(data)),
        )
        for s in range(stages)
    )
    return plan_by_hand(
        Pipeline(micro_batches=micro_batches, rows=data, stages=mesh),
        name="even",
        model=PlanInput(name=model.name, fingerprint=""),
        cluster=PlanInput(name=cluster.name, fingerprint=""),
        optimizer="sgd",
        schedule=schedule,
    )
