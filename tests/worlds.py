"""Small clusters, and plans whose timing is known by heart."""

from __future__ import annotations

from itertools import count

from meshwright.cluster.spec import Cluster, DeviceType, Link, Node, Site, devices_of
from meshwright.model.spec import Layer, LayerGraph, Tensor
from meshwright.plan.spec import Job, Pipeline, Plan, Stage, Subject

DEVICE = DeviceType(
    name="g",
    memory=1 << 36,
    memory_bandwidth=1e18,
    peak={"fp32": 1e12},
    matmul_efficiency=1.0,
    attention_efficiency=0.5,
    memory_efficiency=1.0,
)
"""One TFLOP a second, and memory that is never the limit."""


def one_node(
    devices: int, *, bandwidth: float = 1e9, latency: float = 0.0, shared: bool = False
) -> Cluster:
    """A node `n` with a port per device, or with one bus."""
    inside = Link(bandwidth=bandwidth, latency=latency, shared=shared)
    node = Node(
        name="n", site="s", devices=("g",) * devices, inside=inside, network=Link(bandwidth=1e9)
    )
    return Cluster(name="one", types={"g": DEVICE}, nodes=(node,), sites=(Site(name="s"),))


def even_model(
    layers: int, *, seconds: float = 1e-3, cut_bytes: float = 1.0, parameters: int = 0
) -> LayerGraph:
    """Equal layers; a row takes `seconds` forward and twice that backward on DEVICE."""
    layer = Layer(
        name="l",
        signature="s",
        forward_flops=seconds * 1e12,
        backward_flops=2 * seconds * 1e12,
        traffic_bytes=0.0,
        parameters=parameters,
        saved_bytes=1000.0,
    )
    tensors = tuple(
        Tensor(name=f"t{i}", bytes=cut_bytes, producer=i, consumers=(i + 1,))
        for i in range(layers - 1)
    )
    return LayerGraph(
        name="even", sequence=1, precision="fp32", layers=(layer,) * layers, tensors=tensors
    )


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
    devices = [device.name for device in devices_of(cluster)][: data * tensor * stages]
    taken, depth = count(), len(model.layers) // stages
    mesh = tuple(
        Stage(
            layers=(s * depth, (s + 1) * depth),
            devices=tuple(tuple(devices[next(taken)] for _ in range(tensor)) for _ in range(data)),
        )
        for s in range(stages)
    )
    return Plan(
        name="even",
        model=Subject(name=model.name, fingerprint=""),
        cluster=Subject(name=cluster.name, fingerprint=""),
        job=Job(global_batch=data * micro_batches, sequence=1, precision="fp32", optimizer="sgd"),
        schedule=schedule,  # type: ignore[arg-type]
        devices=tuple(devices),
        pipelines=(Pipeline(micro_batches=micro_batches, rows=data, stages=mesh),),
    )
