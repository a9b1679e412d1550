"""Playing one of every set of identical replicas gives what playing all of them gives."""

from dataclasses import replace
from math import ulp

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from meshwright.cluster.spec import Cluster, DirectLink, Islands, Link, Node, Site, devices_of
from meshwright.cluster.topology import Resource
from meshwright.cost.pricing import price_program
from meshwright.model.spec import Tied
from meshwright.plan.spec import Pipeline, Plan, Stage
from meshwright.program.compile import compile_plan
from meshwright.simulate.critical_path import step_breakdown
from meshwright.simulate.simulator import simulate_plan
from meshwright.simulate.symmetry import find_symmetry, priced_for_all, simulate_by_symmetry
from soaks import portion
from worlds import DEVICE, cluster, divided, even_model, even_plan, plan_by_hand


def sites(nodes: int, each: int, *, shared: bool, uplink: float = 1e8) -> Cluster:
    """Nodes of `each` devices, the second half of them at another site."""
    made = cluster(
        *(("g",) * each,) * nodes,
        inside=Link(bandwidth=1e9, latency=1e-6, shared=shared),
        network=Link(bandwidth=2e8, latency=1e-5, shared=shared),
        types=(DEVICE,),
        names=[f"n{i}" for i in range(nodes)],
    )
    half = (nodes + 1) // 2
    placed = [replace(n, site="home" if i < half else "away") for i, n in enumerate(made.nodes)]
    way = Link(bandwidth=uplink, latency=1e-4)
    ends = tuple(Site(name=name, uplink=way) for name in ("home", "away"))
    return replace(made, nodes=tuple(placed), sites=ends)


def in_pairs(where: Cluster) -> Cluster:
    """The cluster with every two neighbours in a node joined by a better link."""
    bridge = Link(bandwidth=8e9, latency=5e-7)

    def paired(node: Node) -> Node:
        groups = tuple((i, i + 1) for i in range(0, len(node.devices) - 1, 2))
        return replace(node, islands=Islands(groups=groups, link=bridge))

    return replace(where, nodes=tuple(map(paired, where.nodes)))


@settings(max_examples=portion(60))
@given(
    data=st.sampled_from([1, 2, 4]),
    tensor=st.sampled_from([1, 2]),
    stages=st.integers(1, 4),
    micro_batches=st.integers(1, 5),
    each=st.sampled_from([1, 2, 4]),
    shared=st.booleans(),
    paired=st.booleans(),
    schedule=st.sampled_from(["1f1b", "gpipe"]),
    parameters=st.sampled_from([0, 100_000, 10_000_000]),
)
def test_regular_plans_take_as_long_folded(  # noqa: PLR0913 - a case has as many facts
    data, tensor, stages, micro_batches, each, shared, paired, schedule, parameters
):
    model = even_model(stages * 2, cut_bytes=1e4, parameters=parameters)
    where = sites(-(-data * tensor * stages // each), each, shared=shared)
    where = in_pairs(where) if paired and each > 1 else where
    plan = even_plan(
        model,
        where,
        data=data,
        tensor=tensor,
        stages=stages,
        micro_batches=micro_batches,
        schedule=schedule,
    )
    check(plan, model, where)


def check(plan, model, where):
    whole, folded = simulate_plan(plan, model, where), simulate_by_symmetry(plan, model, where)
    assert folded.step_seconds == pytest.approx(whole.step_seconds, rel=1e-9)
    assert step_breakdown(folded.timeline()) == pytest.approx(
        step_breakdown(whole), rel=1e-6, abs=1e-9
    )


def whole(*replicas: tuple[str, ...]) -> Stage:
    """All four layers."""
    return Stage(layers=(0, 4), devices=replicas)


def two_lines(narrow: bool) -> Plan:
    """Four replicas of one stage, and stages of two replicas and one or two."""
    devices = tuple(f"n{i}:{j}" for i in range(2) for j in range(2))
    second = (("n3:0",),) if narrow else (("n3:0",), ("n3:1",))
    stages = (
        Stage(layers=(0, 2), devices=(("n2:0",), ("n2:1",))),
        Stage(layers=(2, 4), devices=second),
    )
    return plan_by_hand(
        Pipeline(micro_batches=2, rows=4, stages=(whole(*((d,) for d in devices)),)),
        Pipeline(micro_batches=2, rows=2, stages=stages),
        optimizer="sgd",
    )


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("narrow", [False, True])
def test_unlike_pipelines_take_as_long_folded(shared, narrow):
    model = even_model(4, cut_bytes=1e5, parameters=3_000_000)
    check(two_lines(narrow), model, sites(4, 2, shared=shared))


def unlike_widths(second: tuple[tuple[str, ...], ...]) -> Plan:
    """Two replicas of two tensor ranks each in one pipeline, and another pipeline."""
    first = whole(("n0:0", "n0:1"), ("n1:0", "n1:1"))
    return plan_by_hand(
        Pipeline(micro_batches=2, rows=4, stages=(first,)),
        Pipeline(micro_batches=2, rows=2, stages=(whole(*second),)),
        optimizer="sgd",
    )


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("second", "played"),
    [
        ((("n2:0", "n2:1", "n3:0", "n3:1"),), 2 + 4),
        ((("n2:0",), ("n2:1",), ("n3:0",), ("n3:1",))[:2], 2 + 1),
        ((("n2:0",), ("n3:0", "n3:1")), 2 + 3),
        ((("n2:0", "n2:1"),), 1 + 1),
    ],
)
def test_unlike_tensor_widths_take_as_long_folded(second, played, shared):
    """Only where all tensor widths are equal one tensor rank stands for the others."""
    model = even_model(4, cut_bytes=1e5, parameters=3_000_000)
    model = replace(model, layers=tuple(divided(x, parameters=2_900_000) for x in model.layers))
    plan, where = unlike_widths(second), sites(4, 2, shared=shared)
    check(plan, model, where)
    assert len(find_symmetry(plan, where, model).ranks) == played


@settings(max_examples=portion(80))
@given(
    widths=st.lists(
        st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (2, 4)]), min_size=2, max_size=4
    ),
    replicas=st.sampled_from([1, 2, 4]),
    shared=st.booleans(),
    tied=st.booleans(),
    boundary=st.sampled_from(["direct", "broadcast", "scatter_gather"]),
    schedule=st.sampled_from(["1f1b", "gpipe"]),
)
@example(
    widths=[(2, 2), (2, 2), (1, 2)],
    replicas=2,
    shared=True,
    tied=False,
    boundary="scatter_gather",
    schedule="1f1b",
)  # a node's bus carries the gathers of two replicas
def test_stages_of_unlike_tensor_widths_take_as_long_folded(
    widths, replicas, shared, tied, boundary, schedule
):
    """Each stage has `replicas` times its first number of replicas, and its second one is their
    tensor width."""
    model = even_model(len(widths), cut_bytes=1e5, parameters=3_000_000)
    layers = [divided(x, parameters=2_900_000) for x in model.layers]
    ends = (0, len(widths) - 1)
    both = Tied(name="ends", parameters=100_000, layers=ends, divided=("tensor",))
    model = replace(model, layers=tuple(layers), tied=(both,) if tied else ())
    where = sites(4 * len(widths), 4, shared=shared)
    stages, names = [], [device.name for device in devices_of(where)]
    for s, (data, tensor) in enumerate(widths):
        own = names[16 * s : 16 * s + 16]
        number = min(replicas * data, 16 // tensor)
        groups = tuple(tuple(own[tensor * n : tensor * (n + 1)]) for n in range(number))
        kind = boundary if s else None
        stages.append(Stage(layers=(s, s + 1), devices=groups, boundary=kind))
    pipeline = Pipeline(micro_batches=3, rows=16, stages=tuple(stages))
    plan = replace(plan_by_hand(pipeline, optimizer="sgd"), schedule=schedule)
    check(plan, model, where)


def test_half_of_two_replicas_is_played_if_the_stages_differ_in_their_tensor_width():
    model, where = even_model(2, cut_bytes=1e5), sites(3, 4, shared=True)
    first = Stage(layers=(0, 1), devices=(("n0:0",), ("n0:1",)))
    second = Stage(layers=(1, 2), devices=(("n1:0", "n1:1"), ("n1:2", "n1:3")))
    plan = plan_by_hand(Pipeline(micro_batches=2, rows=2, stages=(first, second)))
    assert len(find_symmetry(plan, where, model).ranks) == 3


def test_one_of_all_replicas_is_played():
    model, where = even_model(2), sites(4, 2, shared=False)
    plan = even_plan(model, where, data=4, stages=2)
    assert len(find_symmetry(plan, where, model).ranks) == 2
    assert len(find_symmetry(two_lines(False), where, model).ranks) == 1 + 2
    assert len(find_symmetry(two_lines(True), where, model).ranks) == 1 + 3


@pytest.mark.parametrize(
    ("data", "tensor", "stages", "played"),
    [(8, 2, 1, 1), (16, 1, 1, 2), (4, 2, 2, 2), (2, 4, 2, 2)],
)
def test_islands_are_played_whole_or_by_tensor_rank(data, tensor, stages, played):
    model, where = even_model(2, parameters=100_000), in_pairs(sites(4, 4, shared=False))
    where = replace(where, nodes=tuple(replace(node, site="home") for node in where.nodes))
    plan = even_plan(model, where, data=data, tensor=tensor, stages=stages, micro_batches=2)
    check(plan, model, where)
    assert len(find_symmetry(plan, where, model).ranks) == played


@st.composite
def islands(draw, devices: int) -> Islands | None:
    """Islands of two or three neighbours, or of every other device."""
    size = draw(st.integers(2, 3))
    step = draw(st.sampled_from([1, devices // size])) if devices >= size else 1
    order = [i for first in range(step) for i in range(first, devices, step)]
    groups = [tuple(order[i : i + size]) for i in range(0, devices - size + 1, size)]
    link = Link(bandwidth=draw(st.sampled_from([5e9, 4.4e9])), latency=5e-7)
    return Islands(groups=tuple(groups), link=link) if groups else None


@st.composite
def uneven_clusters(draw) -> Cluster:
    """Nodes of one to four devices of two types, alike or not, at one site or two, often with an
    explicit link between two of them."""
    widths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    if draw(st.booleans()):
        widths = widths[:1] * (len(widths) + 1)
    kinds = ["g"] if draw(st.booleans()) else ["g", "h"]
    shared = draw(st.booleans())
    inside = Link(bandwidth=draw(st.sampled_from([1e9, 3.3e9])), latency=1e-6, shared=shared)
    alone = draw(st.none() | st.just(6.1e7))
    network = Link(bandwidth=draw(st.sampled_from([2e8, 1.37e8])), latency=1e-5, shared=shared,
                   single_flow=alone)  # fmt: skip
    places = st.sampled_from(draw(st.sampled_from([["home"], ["home", "away"]])))
    nodes = tuple(
        Node(
            name=f"n{i}",
            site=draw(places),
            devices=(draw(st.sampled_from(kinds)),) * width,
            inside=inside,
            network=network,
        )
        for i, width in enumerate(widths)
    )
    if draw(st.booleans()):
        nodes = tuple(replace(node, islands=draw(islands(len(node.devices)))) for node in nodes)
    pairs = [(a.name, b.name) for a in nodes for b in nodes if a.name < b.name]
    wire = Link(bandwidth=7.7e7, latency=1e-6, shared=draw(st.booleans()))
    chosen = draw(st.lists(st.sampled_from(pairs), max_size=2, unique=True)) if pairs else []
    uplink = Link(bandwidth=draw(st.sampled_from([1e8, 3.1e7])), latency=1e-4)
    return Cluster(
        name="uneven",
        types={"g": DEVICE, "h": replace(DEVICE, name="h", peak={"fp32": 4e11})},
        nodes=nodes,
        sites=tuple(Site(name=name, uplink=uplink) for name in ("home", "away")),
        direct=tuple(DirectLink(between=pair, link=wire) for pair in chosen),
    )


@settings(max_examples=portion(200))
@given(uneven_clusters(), st.data())
def test_uneven_clusters_with_explicit_links_take_as_long_folded(where, data):
    """To the last digit; sums of equal bytes on a shared bus may round in its last place."""
    model = even_model(
        6,
        cut_bytes=data.draw(st.sampled_from([1e4, 12345.0, 1e6])),
        parameters=data.draw(st.sampled_from([0, 100_003, 3_000_000])),
    )
    count = len(devices_of(where))
    stages = data.draw(st.sampled_from([s for s in (1, 2, 3) if s <= count]))
    replicas = data.draw(st.integers(1, count // stages))
    plan = even_plan(
        model,
        where,
        data=replicas,
        tensor=data.draw(st.integers(1, count // stages // replicas)),
        stages=stages,
        micro_batches=data.draw(st.integers(1, 5)),
        schedule=data.draw(st.sampled_from(["1f1b", "gpipe"])),
    )
    whole = simulate_plan(plan, model, where).step_seconds
    assert abs(simulate_by_symmetry(plan, model, where).step_seconds - whole) <= ulp(whole)


def linked(where: Cluster, joined, link: Link, other: Link) -> Cluster:
    """The cluster with links between nodes for which `joined` is true of their numbers, one kind
    for nodes whose numbers differ by one."""
    names = [node.name for node in where.nodes]
    direct = tuple(
        DirectLink(between=(a, b), link=link if j == i + 1 else other)
        for i, a in enumerate(names)
        for j, b in enumerate(names)
        if i < j and joined(i, j)
    )
    return replace(where, direct=direct)


WAYS = {
    "every": lambda i, j: i < j,
    "pairs": lambda i, j: i % 2 == 0 and j == i + 1,
    "halves": lambda i, j: j == i + 4,
    "line": lambda i, j: j == i + 1,
    "one": lambda i, j: (i, j) == (1, 2),
}


@settings(max_examples=portion(150))
@given(
    ways=st.sampled_from(sorted(WAYS)),
    nodes=st.sampled_from([2, 4, 8]),
    each=st.sampled_from([1, 2, 4]),
    stages=st.sampled_from([1, 2, 4]),
    tensor=st.sampled_from([1, 2]),
    shared=st.booleans(),
    tied=st.booleans(),
    parameters=st.sampled_from([0, 100_000, 10_000_000]),
    place=st.randoms(use_true_random=False),
)
def test_nodes_with_explicit_links_take_as_long_folded(  # noqa: PLR0913 - a case has as many facts
    ways, nodes, each, stages, tensor, shared, tied, parameters, place
):
    count = nodes * each // stages // tensor
    assume(count >= 1)
    model = replace(even_model(stages * 2, cut_bytes=1e5, parameters=parameters), tied=())
    if tied and stages > 1:
        weight = Tied(name="table", layers=(0, stages * 2 - 1), parameters=1_000_000)
        model = replace(model, tied=(weight,))
    link, other = (Link(bandwidth=each, latency=1e-6, shared=shared) for each in (3e8, 6e7))
    where = linked(sites(nodes, each, shared=shared), WAYS[ways], link, other)
    plan = even_plan(
        model, where, data=count, tensor=tensor, stages=stages, micro_batches=place.randint(1, 4)
    )
    check(plan, model, where)


@pytest.mark.parametrize(("ways", "played"), [("every", 2), ("pairs", 4), ("one", 8)])
def test_nodes_that_are_joined_alike_are_played_once(ways, played):
    """Of 16 replicas of two stages, each on four nodes: one where every link is given, one on
    either node of a pair, one on every node where a single link tells nodes apart."""
    where = sites(8, 4, shared=False)
    where = replace(where, nodes=tuple(replace(node, site="home") for node in where.nodes))
    link = Link(bandwidth=3e8, latency=1e-6)
    where = linked(where, WAYS[ways], link, link)
    model = even_model(2, cut_bytes=1e5, parameters=1_000_000)
    plan = even_plan(model, where, data=16, stages=2, micro_batches=2)
    check(plan, model, where)
    assert len(find_symmetry(plan, where, model).ranks) == played


def test_an_explicit_link_carries_the_messages_of_all_slices():
    where = sites(2, 2, shared=False)
    wire = DirectLink(between=("n0", "n1"), link=Link(bandwidth=5e7, latency=1e-6))
    where = replace(where, direct=(wire,))
    model = even_model(4, cut_bytes=1e4, parameters=100_000)
    plan = even_plan(model, where, data=2, stages=2, micro_batches=2)
    folded = find_symmetry(plan, where, model)
    assert len(folded.ranks) == 2
    program = compile_plan(plan, model, only=folded.ranks)
    prices = price_program(program, plan, model, where)
    there = Resource("n0", "link", "out", "n1")
    one, both = (
        max(each.get(there, 0) for each in _carried(priced)[0])
        for priced in (prices, priced_for_all(program, prices, folded))
    )
    assert both == 2 * one > 0


def _carried(prices):
    return [[each.traffic.bytes_by_resource for each in own] for own in prices.ranks]
