"""Placements use every device once and keep nodes and kinds together."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from meshwright.cluster.spec import devices_of, node_of
from meshwright.search.placement import default_placement, placements
from meshwright.search.space import Grid, divisors
from worlds import cluster

SPEED = {"fast": 2.0, "slow": 1.0}


@st.composite
def worlds(draw):
    per_node = draw(st.sampled_from([1, 2, 4]))
    kinds = st.sampled_from(["fast", "slow"])
    nodes = draw(
        st.lists(st.tuples(*[kinds] * per_node), min_size=1, max_size=4)
        if draw(st.booleans())
        else st.lists(kinds.map(lambda kind: (kind,) * per_node), min_size=1, max_size=4)
    )
    tensor = draw(st.sampled_from(divisors(per_node)))
    units = per_node * len(nodes) // tensor
    data = draw(st.sampled_from(divisors(units)))
    return devices_of(cluster(*nodes)), Grid(data=data, tensor=tensor, stages=units // data)


@given(worlds())
def test_every_placement_uses_every_device_once_and_no_tensor_group_leaves_its_node(world):
    devices, grid = world
    for place in placements(devices, grid, SPEED):
        assert len(place.stages) == len(place.types) == grid.stages
        assert {len(stage) for stage in place.stages} == {grid.data}
        units = [unit for stage in place.stages for unit in stage]
        assert all(len(unit) == grid.tensor for unit in units)
        assert all(len({node_of(name) for name in unit}) == 1 for unit in units)
        assert Counter(name for unit in units for name in unit) == Counter(
            device.name for device in devices
        )


@given(worlds())
def test_placements_are_few_and_all_different(world):
    devices, grid = world
    found = placements(devices, grid, SPEED)
    assert 1 <= len(found) <= 7
    assert len({place.stages for place in found}) == len(found)
    assert found[0] == default_placement(devices, grid)


def test_the_default_is_rank_order():
    devices = devices_of(cluster(("fast", "slow"), ("fast", "slow")))
    place = default_placement(devices, Grid(data=2, tensor=1, stages=2))
    assert place.stages == ((("a:0",), ("a:1",)), (("b:0",), ("b:1",)))


def test_fast_devices_can_be_gathered_into_stages_of_their_own():
    devices = devices_of(cluster(("fast", "slow"), ("fast", "slow")))
    found = placements(devices, Grid(data=2, tensor=1, stages=2), SPEED)
    assert (("fast",), ("slow",)) in {place.types for place in found}
    assert (("slow",), ("fast",)) in {place.types for place in found}


def test_stages_inside_nodes_put_replicas_on_different_nodes():
    devices = devices_of(cluster(("fast",) * 2, ("fast",) * 2))
    found = {p.name: p for p in placements(devices, Grid(data=2, tensor=1, stages=2), SPEED)}
    place = found["in order, stages inside nodes"]
    assert place.stages == ((("a:0",), ("b:0",)), (("a:1",), ("b:1",)))


def test_stages_inside_nodes_do_not_mix_speeds_where_numbers_allow():
    nodes = [("slow",) * 2, ("slow",) * 2, ("fast",) * 2, ("fast",) * 2]
    found = placements(devices_of(cluster(*nodes)), Grid(data=2, tensor=1, stages=4), SPEED)
    inside = [p for p in found if p.name.endswith("stages inside nodes")]
    assert inside
    assert all(len(kinds) == 1 for place in inside for kinds in place.types)
