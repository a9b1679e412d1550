"""Small models and clusters, whose costs can be worked out by hand."""

from __future__ import annotations

from hypothesis import strategies as st

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
