"""Small models and clusters, whose costs can be worked out by hand."""

from __future__ import annotations

from meshwright.cluster.spec import Cluster, DeviceType, Link, Node, Site
from meshwright.model.spec import Layer, LayerGraph, Tensor, Tied
from meshwright.plan.spec import Job

GIB = 1 << 30


def device(name: str, tflops: float = 10.0, memory_gib: float = 16.0) -> DeviceType:
    """All efficiencies 1 and memory so quick that compute alone counts."""
    return DeviceType(
        name=name,
        memory=int(memory_gib * GIB),
        memory_bandwidth=1e15,
        peak={"fp32": tflops * 1e12},
        matmul_efficiency=1.0,
        attention_efficiency=1.0,
        memory_efficiency=1.0,
    )


FAST, SLOW = device("fast", 20.0), device("slow", 10.0)
NVLINK = Link(bandwidth=1e11, latency=1e-6)
ETHERNET = Link(bandwidth=1e9, latency=1e-5)


def cluster(*nodes: tuple[str, ...], network: Link = ETHERNET, types=(FAST, SLOW)) -> Cluster:
    """Nodes a, b, c... with these device types."""
    return Cluster(
        name="test",
        types={kind.name: kind for kind in types},
        nodes=tuple(
            Node(name="abcdefgh"[i], site="here", devices=kinds, inside=NVLINK, network=network)
            for i, kinds in enumerate(nodes)
        ),
        sites=(Site(name="here"),),
    )


def layer(name: str, gflops: float, parameters: int, *, units: int = 4, saved: float = 1e6):
    """A layer of `gflops` per row forward, twice that backward, wholly split by tensor ranks."""
    return Layer(
        name=name,
        signature=f"{gflops}/{parameters}/{units}",
        forward_flops=gflops * 1e9,
        backward_flops=2e9 * gflops,
        traffic_bytes=1.0,
        parameters=parameters,
        saved_bytes=saved,
        tensor_units=units,
        split_parameters=parameters if units else 0,
        split_flops=gflops * 1e9 if units else 0.0,
        split_saved_bytes=saved if units else 0.0,
        forward_all_reduce_bytes=(1e5,) if units else (),
        backward_all_reduce_bytes=(1e5,) if units else (),
    )


def model(
    gflops: list[float], *, parameters: int = 1_000_000, tied: bool = False, **options
) -> LayerGraph:
    """A chain; a row hands 100 kB from layer to layer."""
    last = len(gflops) - 1
    return LayerGraph(
        name="chain",
        sequence=16,
        precision="fp32",
        layers=tuple(layer(f"l{i}", g, parameters, **options) for i, g in enumerate(gflops)),
        tensors=tuple(
            Tensor(name=f"t{i}", bytes=1e5, producer=i, consumers=(i + 1,)) for i in range(last)
        ),
        tied=(Tied(name="table", layers=(0, last), parameters=500_000),) if tied and last else (),
    )


def job(global_batch: int = 8, optimizer: str = "adamw") -> Job:
    """fp32, as the models here."""
    return Job(global_batch=global_batch, sequence=16, precision="fp32", optimizer=optimizer)
