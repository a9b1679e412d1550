"""Gradients are summed in buckets of a usual size, whose bytes are worked out here by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshwright.model.spec import Layer, LayerGraph, Tied
from meshwright.plan.ranks import stage_placements
from meshwright.plan.spec import Pipeline, Stage
from meshwright.techniques.data_parallel.buckets import gradient_buckets, usual_bucket_bytes
from worlds import divided, even_model, even_plan, one_node

MIB = 2**20
FP32 = even_plan(even_model(1), one_node(1)).job
FP64 = replace(FP32, precision="fp64")


@pytest.mark.parametrize(
    ("parameters", "job", "size"),
    [
        (1000, FP32, MIB),
        (8 * MIB, FP32, 2 * MIB),
        (8 * MIB, FP64, 4 * MIB),
        (8 * MIB, replace(FP32, precision="bf16"), 2 * MIB),
        (1000 * MIB, FP32, 25 * MIB),
    ],
)
def test_a_bucket_is_a_sixteenth_of_the_model_within_limits(parameters, job, size) -> None:
    assert usual_bucket_bytes(even_model(1, parameters=parameters), job) == size


def bytes_by_ranks(model: LayerGraph, *stages: Stage, least: int) -> list[tuple]:
    """Layers or name of every bucket, with ranks and bytes of its sums, for two rows each."""
    devices = [device for stage in stages for ranks in stage.devices for device in ranks]
    plan = replace(
        even_plan(model, one_node(1)),
        devices=tuple(dict.fromkeys(devices)),
        pipelines=(Pipeline(micro_batches=1, rows=2, stages=stages),),
    )
    found = gradient_buckets(model, plan.job, stage_placements(plan), least)
    return [(b.layers or b.tied, [(each.ranks, each.bytes) for each in b.sums]) for b in found]


def parted(*layers: tuple[int, int]) -> LayerGraph:
    """Layers with these numbers of whole parameters, and of those that tensor ranks divide."""
    model = even_model(len(layers))
    made: list[Layer] = [
        divided(replace(layer, parameters=whole + split), parameters=split, units=4)
        for layer, (whole, split) in zip(model.layers, layers, strict=True)
    ]
    return replace(model, layers=tuple(made))


def test_layers_fill_a_bucket_from_the_last_to_the_first() -> None:
    """40, 40, 80, 40 bytes: two layers make up the least size of 80, and one of them alone."""
    both = Stage(layers=(0, 4), devices=(("n:0",), ("n:1",)))
    model = parted((10, 0), (10, 0), (20, 0), (10, 0))
    found = bytes_by_ranks(model, both, least=80)
    assert found == [((2, 4), [((0, 1), 120)]), ((0, 2), [((0, 1), 80)])]


def test_a_cut_ends_a_bucket_and_who_is_alone_sums_nothing() -> None:
    wide = Stage(layers=(0, 2), devices=(("n:0",), ("n:1",)))
    alone = Stage(layers=(2, 3), devices=(("n:2",),))
    found = bytes_by_ranks(parted((1, 0), (2, 0), (3, 0)), wide, alone, least=10**9)
    assert found == [((0, 2), [((0, 1), 12)])]


def test_tensor_ranks_sum_their_share_and_what_all_of_them_hold() -> None:
    stage = Stage(layers=(0, 1), devices=(("n:0", "n:1"), ("n:2", "n:3")))
    found = bytes_by_ranks(parted((3, 10)), stage, least=1)
    assert found == [((0, 1), [((0, 2), 12 + 20), ((1, 3), 12 + 20)])]


def test_unlike_widths_sum_each_common_part_and_the_undivided_over_all() -> None:
    stage = Stage(layers=(0, 1), devices=(("n:0", "n:1"), ("n:2",)))
    found = bytes_by_ranks(parted((3, 11)), stage, least=1)
    assert found == [((0, 1), [((0, 1, 2), 12), ((0, 2), 22), ((1, 2), 22)])]
    (none_whole,) = bytes_by_ranks(parted((0, 11)), stage, least=1)
    assert [ranks for ranks, _ in none_whole[1]] == [(0, 2), (1, 2)]


@pytest.mark.parametrize(("axes", "size"), [((), 28), (("tensor",), 14)])
def test_a_tied_parameter_is_summed_with_its_first_layer(axes: tuple[str, ...], size: int) -> None:
    model = parted((1, 0), (1, 0))
    model = replace(model, tied=(Tied(name="table", layers=(0, 1), parameters=7, divided=axes),))
    first, last = (
        Stage(layers=(s, s + 1), devices=((f"n:{2 * s}", f"n:{2 * s + 1}"),)) for s in (0, 1)
    )
    found = bytes_by_ranks(model, first, last, least=1)
    assert found == [("table", [((0, 2), size), ((1, 3), size)])]
