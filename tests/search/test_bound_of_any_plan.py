"""No plan that can be written down and fits is simulated to be faster than the certificate, whether
a search would find it or not."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from meshwright.cluster.spec import Cluster, DirectLink, Link, Node, Site
from meshwright.cost.out_of_memory import memory_problems
from meshwright.cost.profile import LayerTime, Profile
from meshwright.errors import MeshwrightError
from meshwright.model.spec import LayerGraph
from meshwright.plan.spec import Pipeline, Plan, Stage, StateDivision, with_stages
from meshwright.plan.validate import validate_plan
from meshwright.search.certificate import certificate
from meshwright.search.costs import costs_of
from meshwright.simulate.simulator import simulate_plan
from soaks import portion, tenth
from strategies import plans
from worlds import device, freeze, model

ROUND = 1e-9
"""Relative error of sums in another order."""

SCHEDULES = (
    "1f1b",
    "1f1b-2bp",
    "1f1b-2bp-batched",
    "gpipe",
    "gpipe-2bp-batched",
    "eager-1f1b",
    "eager-1f1b-2bp-batched",
    "zb-h1",
    "zb-h2",
)
DEALT = ("interleaved-1f1b", "interleaved-1f1b-2bp", "interleaved-1f1b-2bp-batched")
"""Schedules in which a pipeline rank holds stages in turn."""


@st.composite
def graphs(draw) -> LayerGraph:
    """Layers of unlike sizes, perhaps with tied or frozen weights, in 16 bits or 32, that tensor
    ranks divide or not."""
    graph = model(
        draw(st.lists(st.sampled_from([1.0, 10.0, 70.0]), min_size=1, max_size=8)),
        parameters=draw(st.sampled_from([0, 1000, 10_000_000, 60_000_000])),
        tied=draw(st.booleans()),
        units=draw(st.sampled_from([0, 1, 2, 4])),
        saved=draw(st.sampled_from([0.0, 1e6, 6e7, 3e8])),
    )
    if draw(st.booleans()):
        frozen = draw(st.sets(st.sampled_from(range(len(graph.layers)))))
        if len(frozen) < len(graph.layers):
            graph = freeze(graph, frozen, tied=draw(st.booleans()))
    precision = draw(st.sampled_from(["fp32", "fp16"]))
    casts = draw(st.booleans())
    traffic = draw(st.sampled_from([1.0, 1e8]))
    layers = tuple(
        replace(
            x,
            traffic_bytes=traffic,
            signature=f"{x.signature}/{traffic}",
            cast_parameters=x.parameters * casts,
        )
        for x in graph.layers
    )
    return replace(graph, precision=precision, layers=layers)


@st.composite
def clusters(draw, devices: int) -> Cluster:
    """So many devices of two types on some nodes at one or two sites, whose links may be of any
    speed."""
    bandwidths = st.sampled_from([1e7, 1e9, 1e11])
    latencies = st.sampled_from([0.0, 1e-6, 1e-3])
    links = st.builds(Link, bandwidth=bandwidths, latency=latencies, shared=st.booleans())
    precisions = {"fp32": draw(st.sampled_from([1e13, 3e13]))}
    types = {}
    for name in ("fast", "slow"):
        memory = draw(st.sampled_from([1.1, 1.3, 2.0, 16.0]))
        made = device(name, 10.0, memory)
        types[name] = replace(
            made,
            peak={**precisions, "fp16": draw(st.sampled_from([1e13, 4e13]))},
            memory_bandwidth=draw(st.sampled_from([1e11, 1e15])),
        )
    kinds = draw(st.lists(st.sampled_from(["fast", "slow"]), min_size=devices, max_size=devices))
    nodes: list[Node] = []
    while kinds:
        width = draw(st.integers(1, len(kinds)))
        nodes.append(
            Node(
                name=f"n{len(nodes)}",
                site=draw(st.sampled_from(["here", "there"])),
                devices=tuple(kinds[:width]),
                inside=draw(links),
                network=draw(links),
            )
        )
        kinds = kinds[width:]
    pairs = [(a.name, b.name) for a in nodes for b in nodes if a.name < b.name]
    wired = draw(st.lists(st.sampled_from(pairs), max_size=2, unique=True)) if pairs else []
    return Cluster(
        name="any",
        types=types,
        nodes=tuple(nodes),
        sites=tuple(Site(name=s, uplink=draw(st.none() | links)) for s in ("here", "there")),
        direct=tuple(DirectLink(between=pair, link=draw(links)) for pair in wired),
    )


@st.composite
def worlds(draw) -> tuple[LayerGraph, Cluster, Plan, Profile | None]:
    """A model, a cluster, a plan that can be simulated, and perhaps measured times."""
    graph = draw(graphs())
    plan = draw(plans(graph, max_devices=7, max_rows=4, widths=(1, 2, 4)))
    where = draw(clusters(len(plan.devices) + draw(st.integers(0, 2))))
    plan = _placed(plan, where, Random(draw(st.integers(0, 1000))))
    plan = replace(
        plan,
        job=replace(
            plan.job,
            precision=graph.precision,
            optimizer=draw(st.sampled_from(["adamw", "sgd"])),
        ),
    )
    plan = with_stages(plan, lambda stage: replace(stage, recompute=draw(st.booleans())))
    if draw(st.booleans()):
        plan = with_stages(
            plan, lambda stage: replace(stage, states=StateDivision(optimizer="all"))
        )
    plan = draw(ordered(plan))
    assume(_is_legal(plan, graph, where))
    return graph, where, plan, draw(st.none() | profiles(graph, where))


def _placed(plan: Plan, where: Cluster, chance: Random) -> Plan:
    """The plan on devices of a cluster in any order, each tensor group inside a node."""
    free = {}
    for node in where.nodes:
        names = [f"{node.name}:{i}" for i in range(len(node.devices))]
        free[node.name] = chance.sample(names, len(names))
    groups = [group for pipeline in plan.pipelines for s in pipeline.stages for group in s.devices]
    target: dict[str, str] = {}
    for group in sorted(chance.sample(groups, len(groups)), key=len, reverse=True):
        able = [names for names in free.values() if len(names) >= len(group)]
        assume(able)
        names = chance.choice(able)
        target |= {device: names.pop() for device in group}
    chosen = set(target.values())
    ranks = tuple(
        f"{node.name}:{i}"
        for node in where.nodes
        for i in range(len(node.devices))
        if f"{node.name}:{i}" in chosen
    )

    def moved(stage: Stage) -> Stage:
        return replace(
            stage, devices=tuple(tuple(target[name] for name in each) for each in stage.devices)
        )

    return replace(with_stages(plan, moved), devices=ranks)


@st.composite
def ordered(draw, plan: Plan) -> Plan:
    """The plan in one of the schedules, perhaps with several stages on each pipeline rank, or with
    an order of its own."""
    name = draw(st.sampled_from([*SCHEDULES, *DEALT, "zb-v", "custom"]))
    if name not in (*DEALT, "zb-v", "custom"):
        return replace(plan, schedule=name)
    if name == "custom":
        chance = Random(draw(st.integers(0, 1000)))
        return replace(
            plan,
            schedule="custom",
            pipelines=tuple(_in_any_order(pipeline, chance) for pipeline in plan.pipelines),
        )
    return replace(
        plan,
        schedule=name,
        pipelines=tuple(_folded(pipeline, back=name == "zb-v") for pipeline in plan.pipelines),
    )


def _folded(pipeline: Pipeline, *, back: bool) -> Pipeline:
    """The pipeline with each stage's layers cut in two, dealt out to the same devices in turn, or
    down the line and back up; as it is where there are too few layers."""
    stages = pipeline.stages
    layers = stages[-1].layers[1]
    if layers < 2 * len(stages):
        return pipeline
    cuts = [layers * i // (2 * len(stages)) for i in range(2 * len(stages) + 1)]
    devices = [*stages, *(reversed(stages) if back else stages)]
    return replace(
        pipeline,
        stages=tuple(
            replace(stage, layers=(a, b))
            for stage, a, b in zip(devices, cuts[:-1], cuts[1:], strict=True)
        ),
    )


def _in_any_order(pipeline: Pipeline, chance: Random) -> Pipeline:
    """Actions of each pipeline rank in an order that can be played: drawn one at a time from those
    whose inputs are there. Backwards are whole or in two parts, of which the second may take
    several micro-batches at once."""
    depth, count = len(pipeline.stages), pipeline.micro_batches
    split = [[chance.random() < 0.5 for _ in range(count)] for _ in range(depth)]
    ahead, back, done = [0] * depth, [0] * depth, [0] * depth
    texts: list[list[str]] = [[] for _ in range(depth)]
    while min(back) < count or any(d < count for d in done):
        able = [("F", s) for s in range(depth) if ahead[s] < (ahead[s - 1] if s else count)]
        able += [
            ("B", s)
            for s in range(depth)
            if back[s] < (back[s + 1] if s + 1 < depth else ahead[s]) and back[s] < ahead[s]
        ]
        able += [("W", s) for s in range(depth) if done[s] < back[s]]
        what, s = chance.choice(able)
        if what == "F":
            texts[s].append(f"F{ahead[s]}")
            ahead[s] += 1
        elif what == "B":
            parts = split[s][back[s]] or done[s] < back[s]
            texts[s].append(f"{'I' if parts else 'B'}{back[s]}")
            back[s] += 1
            done[s] += not parts
        else:
            last = chance.randint(done[s] + 1, back[s])
            texts[s].append(f"W{done[s]}:{last}" if last > done[s] + 1 else f"W{done[s]}")
            done[s] = last
    return replace(pipeline, actions=tuple(" ".join(words) for words in texts))


def _is_legal(plan: Plan, graph: LayerGraph, where: Cluster) -> bool:
    try:
        validate_plan(plan, graph, where)
        return not [*memory_problems(plan, graph, where)]
    except MeshwrightError:
        return False


@st.composite
def profiles(draw, graph: LayerGraph, where: Cluster) -> Profile:
    """Measured times that follow no rule, of some layers, widths and rows."""
    chance = Random(draw(st.integers(0, 1000)))
    layers = tuple(
        LayerTime(
            device=kind,
            signature=signature,
            precision=graph.precision,
            tensor=tensor,
            rows=rows,
            forward_seconds=10 ** chance.uniform(-4, -3),
            backward_seconds=10 ** chance.uniform(-4, -3),
            input_seconds=10 ** chance.uniform(-4, -3) if parts else None,
            weight_seconds=10 ** chance.uniform(-4, -3) if parts else None,
        )
        for kind in where.types
        for signature in dict.fromkeys(layer.signature for layer in graph.layers)
        for parts in (chance.random() < 0.5,)
        for tensor in chance.sample((1, 2, 4), 2)
        for rows in chance.sample((1, 2, 4, 8), chance.randint(1, 3))
        if chance.random() < 0.7
    )
    return Profile(
        model=graph.name,
        sequence=graph.sequence,
        layers=layers,
        step_overhead_seconds=chance.choice((0.0, 1e-3)),
    )


def check_no_plan_beats(world) -> None:
    graph, where, plan, profile = world
    step = simulate_plan(plan, graph, where, profile).step_seconds
    bound = certificate(costs_of(graph, where, plan.job, profile)).seconds
    assert bound <= step * (1 + ROUND)


@settings(max_examples=portion(150))
@given(worlds())
def test_no_plan_beats_the_certificate(world):
    check_no_plan_beats(world)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=tenth(10_000), database=None)
@given(worlds())
def test_no_plan_beats_the_certificate_in_many_cases(world):
    check_no_plan_beats(world)
