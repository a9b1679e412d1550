"""Predicts the step and the memory of runs of other tools, with the planner's own prices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from meshwright.cluster.catalog import catalog
from meshwright.cluster.spec import Cluster, DeviceType, Link, Node, Precision, Site, devices_of
from meshwright.cost.constants import FRAGMENTATION
from meshwright.cost.memory import device_memory, framework_bytes, total_bytes
from meshwright.cost.profile import Profile
from meshwright.cost.runtimes import as_run_by
from meshwright.cost.sharded import (
    ShardedStep,
    sharded_memory_bytes,
    sharded_step_seconds,
)
from meshwright.errors import PlanError, Problem, ProfileError
from meshwright.model.config import LanguageModel
from meshwright.model.spec import LayerGraph
from meshwright.model.transformer.counted_graph import counted_graph
from meshwright.model.unfused import with_unfused_attention
from meshwright.plan.spec import Job, Pipeline, Plan, PlanInput, RuntimeName, Stage, StateDivision
from meshwright.plan.validate import validate_plan
from meshwright.recorded.spec import SHARDED, RecordedRun, micro_batches_of, shape_of
from meshwright.simulate.symmetry import simulate_by_symmetry

NETWORK_LATENCY = 15e-6
"""Seconds of a message between nodes, where a runs file does not say: NCCL over InfiniBand or RoCE
takes 10 to 20 us."""


PRICED_AS: Mapping[str, RuntimeName] = {
    "megatron": "megatron",
    "nemo": "megatron",
    "megatron-deepspeed": "deepspeed",
    "deepspeed": "deepspeed",
    "gpt-neox": "deepspeed",
    "fsdp": "fsdp",
    "torchtitan": "fsdp",
}
"""The system of `cost/runtimes.py` that a framework is priced as; one that is not listed is priced
as a plain PyTorch loop, which is what `meshwright` runs."""


def runtime_of(run: RecordedRun) -> RuntimeName:
    """Returns the system whose constants describe the run's framework."""
    return PRICED_AS.get(run.framework.lower(), "meshwright")


@dataclass(frozen=True, slots=True)
class Machines:
    """Holds a device type with the links that its nodes have."""

    type: DeviceType
    inside: Link
    network: Link | None = None


@dataclass(frozen=True, slots=True)
class PreparedRun:
    """Holds a run as the cost model sees it."""

    run: RecordedRun
    model: LayerGraph
    """What is computed."""
    held: LayerGraph
    """What is kept: without the scores of attention if these are repeated."""
    cluster: Cluster
    plan: Plan
    """Its layout; of a sharded run, plain data parallelism on one node."""
    step: ShardedStep | None
    """How a sharded run works through its batch; None for another."""


def machines_of(cluster: Cluster | None = None) -> dict[str, Machines]:
    """Returns the machines of every device type of the catalogue, and of a cluster file, whose
    links come first."""
    found = {name: Machines(each.type, each.inside) for name, each in catalog().items()}
    for node in reversed(cluster.nodes if cluster else ()):
        for name in node.devices:
            kind = cluster.types[name] if cluster else found[name].type
            found[name] = Machines(kind, node.inside, node.network)
    return found


def _cluster(run: RecordedRun, machines: Machines) -> Cluster:
    """Returns equal nodes of the run's devices."""
    network = machines.network or Link(bandwidth=1.0, latency=NETWORK_LATENCY)
    if run.network is not None:
        network = Link(bandwidth=run.network, latency=network.latency)
    size = min(run.devices, run.devices_per_node)
    nodes = tuple(
        Node(
            name=f"n{index}",
            site="here",
            devices=(machines.type.name,) * size,
            inside=machines.inside,
            network=network,
        )
        for index in range(run.devices // size)
    )
    types = {machines.type.name: machines.type}
    return Cluster(name=run.run, types=types, nodes=nodes, sites=(Site(name="here"),))


@lru_cache(maxsize=256)
def _graph(
    shape: LanguageModel, sequence: int, precision: Precision, *, unfused: bool
) -> LayerGraph:
    graph = counted_graph(shape, sequence, precision)
    return with_unfused_attention(graph, shape.heads) if unfused else graph


def stage_bounds(layers: int, parts: int, *, blocks: bool) -> tuple[int, ...]:
    """Returns the cuts of embedding, blocks and output, `layers` in all, into `parts` stages: with
    equally many blocks each (embedding and output go with the first and the last), or with equally
    many layers each. The first stages take what is left over."""
    outer = 1 if blocks else 0
    share, left = divmod(layers - 2 * outer, parts)
    cuts = [outer + share * s + min(s, left) for s in range(1, parts)]
    return (0, *cuts, layers)


def _plan(run: RecordedRun, model: LayerGraph, cluster: Cluster) -> Plan:
    """Returns the run's layout: ranks in the order of launchers, tensor ranks side by side, then
    replicas, then stages."""
    names = tuple(device.name for device in devices_of(cluster))[: run.devices]
    data, stages = run.data, run.stages
    if run.sharding in SHARDED:
        names, data = names[:1], 1
    groups = [names[i : i + run.tensor] for i in range(0, len(names), run.tensor)]
    bounds = stage_bounds(len(model.layers), stages * run.chunks, blocks=run.cut == "blocks")
    states = StateDivision(optimizer="all") if run.sharding == "optimizer" and data > 1 else None
    found = tuple(
        Stage(
            layers=layers,
            devices=tuple(groups[(s % stages) * data : (s % stages + 1) * data]),
            recompute=run.recompute == "full",
            states=states,
        )
        for s, layers in enumerate(pairwise(bounds))
    )
    micro_batches = micro_batches_of(run)
    pipeline = Pipeline(micro_batches=micro_batches, rows=data * run.rows, stages=found)
    return Plan(
        name=run.run,
        model=PlanInput(name=model.name, fingerprint=""),
        cluster=PlanInput(name=cluster.name, fingerprint=""),
        job=Job(
            global_batch=data * run.rows * micro_batches,
            sequence=run.sequence,
            precision=run.precision,
            optimizer=run.optimizer,
            # What sharded states hold is counted apart, from the whole states of our own runtime.
            runtime="meshwright" if run.sharding in SHARDED else runtime_of(run),
        ),
        schedule=run.schedule or ("interleaved-1f1b" if run.chunks > 1 else "1f1b"),
        devices=names,
        pipelines=(pipeline,),
    )


def prepare(run: RecordedRun, machines: Mapping[str, Machines], place: str = "") -> PreparedRun:
    """Returns a checked run as the cost model sees it; `place` names it in errors. Raises
    ProfileError for a device type that is not among `machines`, or a layout that no plan can
    have."""
    place = place or run.run
    if run.device not in machines:
        wanted = f"one of: {', '.join(sorted(machines))}"
        mend = "describe it in a cluster file, and name that with --cluster"
        raise ProfileError(Problem(place, "device", run.device, wanted, mend))
    shape = shape_of(run)
    unfused = run.attention == "unfused"
    model = _graph(shape, run.sequence, run.precision, unfused=unfused)
    kept = unfused and run.recompute != "selective"
    cluster = _cluster(run, machines[run.device])
    plan = _plan(run, model, cluster)
    try:
        validate_plan(plan, model, cluster, source=place)
    except PlanError as failure:
        raise ProfileError(*failure.problems) from None
    step = None
    if run.sharding in SHARDED:
        step = ShardedStep(
            rows=run.rows,
            micro_batches=micro_batches_of(run),
            sharding="gradients" if run.sharding == "gradients" else "full",
            recompute=run.recompute == "full",
            optimizer=run.optimizer,
            within_nodes=run.sharding == "hybrid",
        )
    held = _graph(shape, run.sequence, run.precision, unfused=kept)
    return PreparedRun(run, model, held, cluster, plan, step)


def predicted_seconds(prepared: PreparedRun, profile: Profile | None = None) -> float:
    """Returns the predicted seconds of a step: simulated, or in closed form if weights or gradients
    are sharded; with the constants of the run's framework where the profile has none. Raises
    ClusterError if a device does not offer the model's precision."""
    model, cluster = prepared.model, prepared.cluster
    profile = as_run_by(runtime_of(prepared.run), profile, model)
    if prepared.step is not None:
        return sharded_step_seconds(model, cluster, prepared.step, profile)
    return simulate_by_symmetry(prepared.plan, model, cluster, profile).step_seconds


def predicted_bytes(prepared: PreparedRun) -> float:
    """Returns the predicted peak bytes of the fullest device, of the kind that was measured."""
    kind = prepared.cluster.types[prepared.run.device]
    every = device_memory(prepared.plan, prepared.held, prepared.cluster)
    if prepared.step is not None:
        tensors = sharded_memory_bytes(prepared.held, prepared.cluster, prepared.step, every[0])
    else:
        tensors = max(total_bytes(each) for each in every) - framework_bytes(kind)
    return tensors + _beside_tensors(prepared.run, kind)


def _beside_tensors(run: RecordedRun, kind: DeviceType) -> float:
    """Returns the bytes beside tensors that a measurement of this kind counts."""
    fragmented = FRAGMENTATION[kind.processor] * kind.memory
    return {
        "allocated": 0.0,
        "reserved": fragmented,
        "device": float(framework_bytes(kind)),
    }[run.memory_kind]
