"""Constants: which ones a device gets, and what they change."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshwright.cluster.catalog import catalog
from meshwright.cluster.spec import Cluster, Link
from meshwright.cluster.topology import topology
from meshwright.cost.collective import all_reduce, boundary_transfer, uncontended_seconds
from meshwright.cost.compute import (
    for_head,
    head_signatures,
    layer_seconds,
    optimizer_seconds,
)
from meshwright.cost.constants import (
    ADDED,
    CONSTANTS,
    DEFAULT_DEVICE,
    DEVICE_NAMES,
    SYSTEM_NAMES,
    Calibration,
    DeviceConstants,
    SystemConstants,
    device_constants,
    implausible,
)
from meshwright.cost.links import overhead_seconds, ring_step_seconds
from meshwright.cost.profile import LinkTimes, Profile
from meshwright.cost.reached_links import reached_links
from meshwright.model.config import NAMED
from meshwright.model.transformer.counted_graph import counted_graph
from meshwright.search.candidate import candidate_of
from meshwright.search.candidate_estimate import candidate_seconds
from meshwright.search.costs import costs_of
from meshwright.simulate.simulator import simulate_plan
from meshwright.techniques.data_parallel.operations import REDUCE_GRAD
from plain_constants import PLAIN, PLAIN_DEVICE, PLAIN_SYSTEM, PLAINLY
from worlds import even_model, even_plan, one_node


def under(calibration: Calibration) -> Profile:
    return Profile(model="even", sequence=1, calibration=calibration)


def test_every_constant_is_described_and_its_default_is_plausible_or_neutral() -> None:
    assert set(CONSTANTS) == {*DEVICE_NAMES, *SYSTEM_NAMES}
    for known in CONSTANTS.values():
        assert 0 <= known.low < known.high
        assert known.unit
        assert known.meaning
        assert known.source


def test_a_type_gets_its_own_constants_else_those_of_its_nearest_relative() -> None:
    known = {
        "A100-80": DeviceConstants(
            matmul_efficiency=0.8, memory_efficiency=0.7, launch_forward=1e-3
        ),
        "T4": DeviceConstants(matmul_efficiency=0.3, launch_forward=4e-3),
    }
    fitted = Calibration(devices=known)
    kinds = {name: entry.type for name, entry in catalog().items()}
    assert device_constants(fitted, kinds["T4"]) is known["T4"]
    assert device_constants(fitted, kinds["A100-40"]) is known["A100-80"]
    far = device_constants(fitted, kinds["B200"])
    assert far.matmul_efficiency is None
    assert far.launch_forward == 1e-3
    assert far.memory_efficiency == 0.7
    assert device_constants(None, kinds["T4"]) == DEFAULT_DEVICE
    assert device_constants(Calibration(), kinds["T4"]) == DEFAULT_DEVICE


def test_implausible_constants_are_named_with_their_range() -> None:
    wrong = Calibration(
        devices={"T4": DeviceConstants(matmul_efficiency=1.2)}, system=SystemConstants(step=9.0)
    )
    fields = [problem.field for problem in implausible(wrong, "file")]
    assert fields == ["devices.T4.matmul_efficiency", "system.step"]
    assert not list(implausible(Calibration(devices={"T4": DEFAULT_DEVICE}), "file"))
    others = replace(DEFAULT_DEVICE, launch_backward=1.0)
    (problem,) = implausible(Calibration(others=others), "file")
    assert problem.field == "others.launch_backward"


def test_an_added_time_may_be_left_out_whatever_its_default() -> None:
    assert not list(implausible(PLAIN, "file"))
    nothing = dict.fromkeys(ADDED & {*SYSTEM_NAMES}, 0.0)
    assert not list(implausible(Calibration(system=SystemConstants(**nothing)), "file"))
    floor = Calibration(others=replace(DEFAULT_DEVICE, launch_forward=0.0))
    (problem,) = implausible(floor, "file")
    assert problem.field == "others.launch_forward"


def _stated(cluster: Cluster) -> Cluster:
    """The cluster with links whose kind is not told."""
    nodes = tuple(
        replace(n, inside=replace(n.inside, kind=None), network=replace(n.network, kind=None))
        for n in cluster.nodes
    )
    return replace(cluster, nodes=nodes)


def test_links_reach_their_share_and_measured_ones_stay_as_measured() -> None:
    cluster = _stated(one_node(2, bandwidth=8e9))
    half = Calibration(system=SystemConstants(inside_efficiency=0.5, network_efficiency=0.25))
    slower = reached_links(cluster, under(half))
    assert slower.nodes[0].inside.bandwidth == 4e9
    assert slower.nodes[0].network.bandwidth == 0.25e9
    measured = replace(under(half), links=LinkTimes(inside=Link(bandwidth=7e9)))
    assert reached_links(cluster, measured).nodes[0].inside.bandwidth == 7e9
    assert reached_links(one_node(2), None) == one_node(2)


def test_ring_steps_and_the_fixed_cost_of_a_step_are_measured_else_fitted() -> None:
    fitted = under(Calibration(system=SystemConstants(ring_step=3e-5, step=2e-3)))
    assert ring_step_seconds(fitted) == 3e-5
    assert ring_step_seconds(replace(fitted, links=LinkTimes(all_reduce_latency=1e-6))) == 1e-6
    assert ring_step_seconds(None) == 0.0
    assert overhead_seconds(replace(fitted, step_overhead_seconds=1e-3)) == pytest.approx(3e-3)


def test_a_boundary_costs_its_fixed_seconds_once_a_transfer() -> None:
    links = topology(one_node(2, bandwidth=1e9))
    moved = boundary_transfer(links, "n:0", "n:1", 1e6, 5e-4)
    assert uncontended_seconds(links, moved) == pytest.approx(1e-3 + 5e-4)
    assert boundary_transfer(links, "n:0", "n:0", 1e6, 5e-4).latency == 0.0


def test_16_bit_gradients_after_the_backward_are_reduced_in_half_the_time_but_exposed() -> None:
    """1 MB at 1 GB/s: 1 ms in fp32. Two layers of 2 ms backward, one bucket for both."""
    model, cluster = even_model(2, parameters=125_000), one_node(2)
    plan = even_plan(model, cluster, data=2)
    plain = simulate_plan(plan, model, cluster, PLAINLY)
    system = replace(PLAIN_SYSTEM, gradient_width=0.5, reduction_delay=1.0)
    half = Calibration(others=PLAIN_DEVICE, system=system)
    late = simulate_plan(plan, model, cluster, under(half))
    for timeline, size in ((plain, 1e-3), (late, 0.5e-3)):
        (began, ended), *_ = [
            (i.start_seconds, i.end_seconds) for i in timeline.intervals if i.op is REDUCE_GRAD
        ]
        assert ended - began == pytest.approx(size)
    assert late.step_seconds == pytest.approx(6e-3 + 0.5e-3, rel=1e-2)


def test_closed_form_and_simulator_agree_on_late_reductions_and_slow_boundaries() -> None:
    model, cluster = even_model(4, parameters=10**6, cut_bytes=1e5), one_node(4)
    plan = even_plan(model, cluster, data=2, stages=2, micro_batches=4)
    system = SystemConstants(
        inside_efficiency=0.5, boundary=2e-4, gradient_width=0.5, reduction_delay=1.0, step=1e-3
    )
    profile = under(Calibration(system=system))
    costs = costs_of(model, cluster, plan.job, profile)
    played = simulate_plan(plan, model, cluster, profile)
    seconds = candidate_seconds(costs, [candidate_of(plan.pipelines[0])], "1f1b")
    assert seconds == pytest.approx(played.step_seconds, rel=0.06)


def test_the_output_projection_has_an_efficiency_of_its_own() -> None:
    model = counted_graph(NAMED["gpt2"], 1024, "bf16")
    assert head_signatures(model) == {model.layers[-1].signature}
    device = catalog()["A100-80"].type
    slow = Calibration(devices={"A100-80": DeviceConstants(head_efficiency=0.5)})
    plain = layer_seconds(model, device, 1, 8)
    found = layer_seconds(model, device, 1, 8, under(slow))
    assert found.forward[-1] > plain.forward[-1]
    assert found.forward[1] == plain.forward[1]
    own, same = for_head(DeviceConstants(matmul_efficiency=0.8, head_efficiency=0.5), device)
    assert (own.matmul_efficiency, same) == (pytest.approx(0.4), device)
    _, slower = for_head(DeviceConstants(head_efficiency=0.5), catalog()["T4"].type)
    whole = catalog()["T4"].type.matmul_shares
    assert whole
    assert slower.matmul_shares
    assert slower.matmul_shares["fp16"].forward == pytest.approx(whole["fp16"].forward / 2)


def test_an_optimizer_that_moves_less_is_faster_in_proportion() -> None:
    device = catalog()["A100-80"].type
    fused = Calibration(devices={"A100-80": DeviceConstants(optimizer_traffic=0.5)})
    whole = optimizer_seconds(device, "adamw", 1e9)
    assert optimizer_seconds(device, "adamw", 1e9, under(fused)) == pytest.approx(whole / 2)
    assert all_reduce(topology(one_node(1)), ["n:0"], 1.0).bytes_by_resource == {}
