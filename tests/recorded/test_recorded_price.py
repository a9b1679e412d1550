"""Predictions of recorded runs: the layout is the one that was run, and the prices are the
planner's."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorded_cases import read_cells

from meshwright.cluster.files import load_cluster
from meshwright.cost.constants import Calibration, SystemConstants
from meshwright.cost.memory import device_memory, framework_bytes, total_bytes
from meshwright.cost.profile import Profile
from meshwright.cost.runtimes import as_run_by
from meshwright.model.spec import num_parameters
from meshwright.recorded.price import (
    machines_of,
    predicted_bytes,
    predicted_seconds,
    prepare,
    runtime_of,
    stage_bounds,
)
from meshwright.simulate.simulator import simulate_plan

MACHINES = machines_of()


@given(st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_cuts_are_as_even_as_can_be(blocks: int, parts: int, of_blocks: bool) -> None:
    layers = blocks + 2
    if parts > (blocks if of_blocks else layers):
        return
    bounds = stage_bounds(layers, parts, blocks=of_blocks)
    sizes = [b - a for a, b in pairwise(bounds)]
    assert (bounds[0], bounds[-1], len(sizes)) == (0, layers, parts)
    if of_blocks:
        sizes[0] -= 1
        sizes[-1] -= 1
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1
    assert sizes == sorted(sizes, reverse=True)


def test_ranks_stand_as_launchers_place_them(tmp_path: Path) -> None:
    plan = prepare(read_cells(tmp_path), MACHINES).plan
    first, second = plan.pipelines[0].stages
    assert first.devices == (("n0:0", "n0:1"), ("n0:2", "n0:3"))
    assert second.devices == (("n0:4", "n0:5"), ("n0:6", "n0:7"))
    assert (first.layers, second.layers) == ((0, 7), (7, 14))
    assert (plan.pipelines[0].micro_batches, plan.pipelines[0].rows) == (8, 4)


def test_virtual_stages_return_to_the_same_devices(tmp_path: Path) -> None:
    plan = prepare(read_cells(tmp_path, chunks="3"), MACHINES).plan
    stages = plan.pipelines[0].stages
    assert plan.schedule == "interleaved-1f1b"
    assert [stage.devices for stage in stages[:2]] * 3 == [stage.devices for stage in stages]
    assert [stage.layers for stage in stages][:2] == [(0, 3), (3, 5)]


def test_the_step_is_what_the_simulator_says(tmp_path: Path) -> None:
    ready = prepare(read_cells(tmp_path, recompute="full", sharding="optimizer"), MACHINES)
    played = simulate_plan(ready.plan, ready.model, ready.cluster).step_seconds
    assert predicted_seconds(ready) == pytest.approx(played, rel=1e-9)


def test_repeated_forwards_and_unfused_attention_cost_what_they_must(tmp_path: Path) -> None:
    plain, again, unfused = (
        prepare(read_cells(tmp_path, **cells), MACHINES)
        for cells in ({}, {"recompute": "full"}, {"attention": "unfused"})
    )
    assert 1.15 < predicted_seconds(again) / predicted_seconds(plain) < 1.4
    assert predicted_bytes(again) < predicted_bytes(plain) < predicted_bytes(unfused)
    assert predicted_seconds(plain) < predicted_seconds(unfused)
    selective = prepare(read_cells(tmp_path, attention="unfused", recompute="selective"), MACHINES)
    assert predicted_bytes(selective) == predicted_bytes(plain)
    assert predicted_seconds(selective) == predicted_seconds(unfused)


def test_memory_is_of_the_kind_that_was_measured(tmp_path: Path) -> None:
    kinds = [
        predicted_bytes(prepare(read_cells(tmp_path, memory_kind=kind), MACHINES))
        for kind in ("allocated", "reserved", "device")
    ]
    assert kinds == sorted(kinds)
    ready = prepare(read_cells(tmp_path), MACHINES)
    every = device_memory(ready.plan, ready.model, ready.cluster)
    assert kinds[2] == max(map(total_bytes, every))
    assert kinds[2] - kinds[0] == framework_bytes(MACHINES["V100-32"].type)


def sharded(folder: Path, devices: int, sharding: str, **cells: str):
    layout = {"devices": str(devices), "data": str(devices), "tensor": "1", "stages": "1"}
    more = {"network": "100 Gbit/s", "global_batch": str(2 * devices), "memory_kind": "allocated"}
    return prepare(read_cells(folder, **layout, **more, sharding=sharding, **cells), MACHINES)


def test_sharded_states_leave_activations_and_two_gathered_layers(tmp_path: Path) -> None:
    """By hand: of 16 bytes a parameter each device holds its part; two gathered layers and a
    gradient in 16 bits are of the largest layer, the tied embedding."""
    many, few = sharded(tmp_path, 64, "full"), sharded(tmp_path, 8, "full")
    states = 16 * num_parameters(many.model)
    difference = predicted_bytes(few) - predicted_bytes(many)
    assert difference == pytest.approx(states / 8 - states / 64, rel=1e-9)
    gathered = predicted_bytes(sharded(tmp_path, 8, "gradients")) - predicted_bytes(few)
    largest = max(layer.parameters for layer in many.model.layers)
    assert gathered == pytest.approx(2 * (num_parameters(many.model) - 2 * largest), rel=1e-9)


def test_copies_of_each_node_gather_inside_and_sum_outside(tmp_path: Path) -> None:
    alone = sharded(tmp_path, 8, "full"), sharded(tmp_path, 8, "hybrid")
    assert predicted_seconds(alone[0]) == predicted_seconds(alone[1])
    slow = {"devices_per_node": "8", "rows": "1"}
    several = sharded(tmp_path, 32, "hybrid", **slow)
    assert predicted_bytes(several) < predicted_bytes(sharded(tmp_path, 8, "hybrid"))
    assert predicted_seconds(several) < predicted_seconds(sharded(tmp_path, 32, "full", **slow))
    wide = replace(several, cluster=_with_network(several.cluster, 1000.0))
    assert predicted_seconds(wide) < predicted_seconds(several)


def _with_network(cluster, factor: float):
    nodes = tuple(
        replace(node, network=replace(node.network, bandwidth=node.network.bandwidth * factor))
        for node in cluster.nodes
    )
    return replace(cluster, nodes=nodes)


def test_links_of_a_cluster_file_are_used(tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text(
        'format = 1\nname = "c"\n[links]\ninside = { bandwidth = "8 Gbit/s", latency = "9 us" }\n'
        'network = { bandwidth = "16 Gbit/s", latency = "70 us" }\n'
        '[[node]]\nname = "n"\ncount = 2\ndevices = ["4 x V100-32"]\n'
    )
    machines = machines_of(load_cluster(file))
    run = read_cells(tmp_path, devices_per_node="4", network="32 Gbit/s")
    node = prepare(run, machines).cluster.nodes[0]
    assert (node.inside.bandwidth, node.inside.latency) == (1e9, 9e-6)
    assert (node.network.bandwidth, node.network.latency) == (4e9, 70e-6)
    assert predicted_seconds(prepare(run, machines)) > predicted_seconds(prepare(run, MACHINES))


def test_a_run_is_priced_as_its_framework_runs_it(tmp_path: Path) -> None:
    seconds = {}
    for framework in ("megatron", "deepspeed", "own-loop", "meshwright"):
        ready = prepare(read_cells(tmp_path, framework=framework), MACHINES)
        seconds[framework] = predicted_seconds(ready)
        runtime = runtime_of(ready.run)
        assert runtime == ("meshwright" if framework == "own-loop" else framework)
        profile = as_run_by(runtime, None, ready.model)
        played = simulate_plan(ready.plan, ready.model, ready.cluster, profile).step_seconds
        assert seconds[framework] == pytest.approx(played, rel=1e-9)
    assert seconds["own-loop"] == seconds["meshwright"]
    assert len(set(seconds.values())) == 3


def test_fitted_constants_take_the_place_of_the_framework_s(tmp_path: Path) -> None:
    ready = prepare(read_cells(tmp_path), MACHINES)
    own = Calibration(system=SystemConstants(step=1.0))
    profile = Profile(model=ready.model.name, sequence=1024, calibration=own)
    assert predicted_seconds(ready, profile) > 1.0
