"""Frozen weights are held and read, and cost nothing else."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from adapters import Tuned, tokens
from meshwright.cost.compute import FROZEN_BYTES, WEIGHT_BYTES, layer_seconds, optimizer_seconds
from meshwright.cost.memory import (
    deferred_bytes,
    device_memory,
    framework_bytes,
    memory_table,
    memory_tables,
    stage_memory,
    total_bytes,
)
from meshwright.cost.weights import cast_bytes, weight_table
from meshwright.model.spec import (
    LayerGraph,
    num_frozen_parameters,
    num_parameters,
    structure_fingerprint,
)
from meshwright.model.trace import trace
from meshwright.plan.ranks import stage_placements
from meshwright.plan.spec import Job, Plan
from meshwright.program.compile import compile_plan
from meshwright.program.operations import Op
from meshwright.search.options import OPTION_NAMES
from meshwright.search.planner import find_plan
from meshwright.simulate.simulator import simulate_plan
from meshwright.techniques.backward_split.price import backward_shares
from meshwright.techniques.data_parallel.operations import REDUCE_GRAD
from plain_constants import PLAINLY
from soaks import portion
from strategies import models_and_plans
from worlds import DEVICE, chain, even_model, even_plan, freeze, one_node

WIDTH, HIDDEN, RANK, LAYERS, VOCABULARY, LENGTH = 16, 24, 3, 4, 33, 8


@cache
def adapted(precision: str, **others: bool) -> LayerGraph:
    """Four blocks, the last two with adapters."""
    with torch.device("meta"):
        model = Tuned(vocabulary=VOCABULARY, layers=LAYERS, adapted=(2, 3), rank=RANK, **others)
    return trace(model, tokens(2, LENGTH), precision, LENGTH)  # type: ignore[arg-type]


def test_a_trace_shows_trained_and_frozen_numbers_apart() -> None:
    graph = adapted("fp32")
    maps, norm = 2 * WIDTH * HIDDEN + WIDTH + HIDDEN, 2 * WIDTH
    low = 2 * RANK * (WIDTH + HIDDEN)
    table, head = VOCABULARY * WIDTH, VOCABULARY * WIDTH + norm
    assert [x.parameters for x in graph.layers] == [0, 0, 0, low, low, 0]
    assert [x.frozen_parameters for x in graph.layers] == [table, *(maps + norm,) * 4, head]
    assert [x.cast_frozen for x in graph.layers] == [0, *(maps,) * 4, table]
    assert graph.layers[3].along("tensor").parameters == RANK * 2 * HIDDEN
    assert graph.layers[3].along("tensor").frozen_parameters == 2 * WIDTH * HIDDEN + HIDDEN
    assert (num_parameters(graph), num_frozen_parameters(graph)) == (
        2 * low,
        table + 4 * (maps + norm) + head,
    )


def test_nothing_flows_back_to_where_nothing_is_trained() -> None:
    graph = adapted("fp32")
    assert [x.has_backward for x in graph.layers] == [False, False, False, True, True, True]
    assert [t.gradient for t in graph.tensors] == [False, False, False, True, True]
    assert [x.backward_flops for x in graph.layers[:3]] == [0.0, 0.0, 0.0]
    assert [x.saved_bytes for x in graph.layers[1:3]] == [0.0, 0.0]


def test_backward_flops_are_gradients_of_inputs_and_of_what_is_trained() -> None:
    """Of the second adapted block, to whose input a gradient comes, and of the frozen head."""
    block, head = adapted("fp32").layers[4:]
    base, low = 2 * LENGTH * 2 * WIDTH * HIDDEN, 2 * LENGTH * 2 * RANK * (WIDTH + HIDDEN)
    assert block.forward_flops == base + low
    assert block.backward_flops == base + 2 * low
    assert head.backward_flops == head.forward_flops


def test_the_first_adapted_block_sums_nothing_back_over_tensor_ranks_for_its_frozen_maps() -> None:
    before, first, second, _ = (x.along("tensor") for x in adapted("fp32").layers[2:])
    stream = LENGTH * WIDTH * 4.0
    assert before.backward_all_reduce_bytes == ()
    assert len(before.forward_all_reduce_bytes) == 1
    assert first.backward_all_reduce_bytes == (LENGTH * RANK * 4.0,)
    assert second.backward_all_reduce_bytes == (stream, LENGTH * RANK * 4.0)


@pytest.mark.parametrize(("precision", "width"), [("fp32", 4), ("fp64", 8), ("bf16", 4)])
def test_a_stage_holds_weights_without_gradient_and_state(precision: str, width: int) -> None:
    graph = adapted(precision)
    job = Job(global_batch=2, sequence=LENGTH, precision=precision)  # type: ignore[arg-type]
    table = memory_table(graph, job)
    whole = stage_memory(table, (0, len(graph.layers)), 1, 1, 1)
    assert whole.parameters == width * (num_parameters(graph) + num_frozen_parameters(graph))
    assert whole.gradients == width * num_parameters(graph)
    assert whole.optimizer == 2 * width * num_parameters(graph)
    first = stage_memory(table, (0, 3), 1, 1, 1)
    assert (first.gradients, first.optimizer) == (0, 0)
    casts = sum(x.cast_parameters + x.cast_frozen for x in graph.layers)
    low = 2.0 if precision == "bf16" else 0.0
    assert cast_bytes(weight_table(graph, job), (0, len(graph.layers)), 1) == low * casts


def test_a_plan_for_adapters_holds_the_whole_model_in_fp16() -> None:
    """64.6 million numbers, of which 0.34 million are trained: 246 MiB of weights, not 1.3 MiB;
    with casts of all that products read."""
    with torch.device("meta"):
        model = Tuned(vocabulary=8000, width=768, hidden=3072, layers=11, adapted=range(11), rank=4)
    graph = trace(model, tokens(2, 64), "fp16", 64)
    kind = replace(DEVICE, peak={"fp16": 1e14})
    cluster = replace(one_node(1), types={"g": kind})
    job = Job(global_batch=4, sequence=64, precision="fp16")
    (held,) = find_plan(graph, cluster, job, forbidden=OPTION_NAMES).prediction.memory  # type: ignore[union-attr]
    numbers = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert held.parameters == 4 * numbers
    assert held.gradients == 4 * trained
    assert held.optimizer == 8 * trained
    tables, norms = 8000 * 768, 12 * 2 * 768
    assert held.buffers - framework_bytes(kind) > 2 * (numbers - tables - norms)
    assert 240 < held.parameters / 2**20 < 280


def test_tensor_ranks_divide_frozen_weights_as_trained_ones() -> None:
    graph = adapted("bf16")
    job = Job(global_batch=2, sequence=LENGTH, precision="bf16")
    layer = graph.layers[1]
    own = layer.frozen_parameters - layer.along("tensor").frozen_parameters / 2
    assert stage_memory(memory_table(graph, job), (1, 2), 2, 1, 1).parameters == 4 * own
    cast = layer.cast_frozen - min(layer.cast_frozen, layer.along("tensor").frozen_parameters) / 2
    assert cast_bytes(weight_table(graph, job), (1, 2), 2) == 2 * cast


def test_a_frozen_table_is_held_by_each_stage_that_reads_it_and_summed_by_none() -> None:
    graph = adapted("bf16", tied=True)
    (tied,) = graph.tied
    assert (tied.parameters, tied.frozen_parameters) == (0, VOCABULARY * WIDTH)
    assert tied.divided == ("tensor",)
    table = weight_table(graph, Job(global_batch=2, sequence=LENGTH, precision="bf16"))
    last = len(graph.layers)
    assert cast_bytes(table, (0, 1), 1) == 0
    assert cast_bytes(table, (last - 1, last), 2) == 2 * VOCABULARY * WIDTH / 2
    plan = even_plan(graph, one_node(4), data=2, stages=2)
    program = compile_plan(plan, graph)
    assert not any(i.tied for own in program.ranks for i in own)


class Buffered(nn.Module):
    """A table of positions that is no parameter, and a quantized matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.inner.register_buffer("positions", torch.zeros(10, 4))
        self.inner.register_buffer("order", torch.zeros(3, dtype=torch.long))
        whole = torch.zeros(100, dtype=torch.int8)
        self.inner.register_parameter("quantized", nn.Parameter(whole, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).mean()


@pytest.mark.parametrize(("precision", "width"), [("fp32", 4), ("fp64", 8)])
def test_buffers_and_whole_numbers_are_held_as_they_are(precision: str, width: int) -> None:
    graph = trace(Buffered(), (torch.zeros(2, 4),), precision, 1)  # type: ignore[arg-type]
    (layer,) = graph.layers
    assert layer.constant_bytes == 40 * width + 3 * 8 + 100
    assert (layer.parameters, layer.frozen_parameters) == (20, 0)
    job = Job(global_batch=2, sequence=1, precision=precision)  # type: ignore[arg-type]
    held = stage_memory(memory_table(graph, job), (0, 1), 1, 1, 1).parameters
    assert held == 20 * width + layer.constant_bytes


def test_only_what_is_frozen_changes_a_fingerprint() -> None:
    model = chain([1.0, 1.0], tied=True)
    same = replace(model, layers=tuple(replace(x, constant_bytes=8.0) for x in model.layers))
    assert structure_fingerprint(same) == structure_fingerprint(model)
    assert structure_fingerprint(freeze(model, (0,))) != structure_fingerprint(model)
    assert structure_fingerprint(freeze(model, (), tied=True)) != structure_fingerprint(model)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_a_frozen_weight_moves_less_than_a_trained_one(precision: str) -> None:
    pairs = zip(FROZEN_BYTES[precision], WEIGHT_BYTES[precision], strict=True)  # type: ignore[index]
    assert all(frozen <= trained for frozen, trained in pairs)


def test_frozen_layers_have_no_second_half_of_a_backward_and_idle_ones_no_backward() -> None:
    model = freeze(even_model(3, parameters=10), (0, 2))
    seconds = layer_seconds(model, DEVICE, 1, 1, PLAINLY)
    assert seconds.backward.tolist() == pytest.approx([0.0, 2e-3, 1e-3])
    shares = backward_shares(model, DEVICE, 1, 1, PLAINLY)
    assert shares[1].tolist() == pytest.approx([1.11 / 2, 1.11 / 2])
    assert shares[2].tolist() == [1.0, 0.0]


def test_of_an_adapted_layer_the_second_half_is_what_is_trained() -> None:
    graph = adapted("fp32")
    shares = backward_shares(graph, DEVICE, 1, 1)
    block = graph.layers[4]
    low = 2 * LENGTH * 2 * RANK * (WIDTH + HIDDEN)
    assert shares[4].sum() == pytest.approx(1.11)
    # DEVICE moves 10**18 bytes a second: what the weights move is next to nothing.
    assert shares[4, 1] == pytest.approx(1.11 * low / block.backward_flops, rel=1e-4)
    assert shares[5].tolist() == [1.0, 0.0]


def test_who_trains_nothing_sums_nothing_and_has_no_optimizer() -> None:
    """Four layers in two stages of two replicas, the first stage frozen."""
    model, cluster = freeze(even_model(4, parameters=1000), (0, 1)), one_node(4)
    plan = even_plan(model, cluster, data=2, stages=2, micro_batches=2)
    program = compile_plan(plan, model)
    for rank, own in enumerate(program.ranks):
        ops = {i.op for i in own}
        assert (REDUCE_GRAD in ops) is (rank >= 2)
        assert not ops & {Op.SEND_B, Op.RECV_B}
    assert optimizer_seconds(DEVICE, "adamw", 0) == 0.0
    memory = device_memory(plan, model, cluster)
    assert [m.gradients for m in memory] == [0, 0, 8000, 8000]
    assert [m.parameters for m in memory] == [8000] * 4


@given(models_and_plans(), st.data())
def test_no_plan_takes_more_memory_when_layers_are_frozen(
    case: tuple[LayerGraph, Plan], data: st.DataObject
) -> None:
    model, plan = case
    cluster = one_node(len(plan.devices))
    frozen = freeze(model, data.draw(st.sets(st.integers(0, len(model.layers) - 1))),
                    tied=data.draw(st.booleans()))  # fmt: skip
    pairs = zip(*(device_memory(plan, each, cluster) for each in (frozen, model)), strict=True)
    for less, more in pairs:
        assert total_bytes(less) <= total_bytes(more)
        assert less.parameters == more.parameters


@settings(max_examples=portion(60))
@given(models_and_plans(), st.data())
def test_prediction_with_frozen_layers_equals_the_simulated_high_water_mark(
    case: tuple[LayerGraph, Plan], data: st.DataObject
) -> None:
    model, plan = case
    cluster = one_node(len(plan.devices))
    model = freeze(model, data.draw(st.sets(st.integers(0, len(model.layers) - 1))))
    timeline = simulate_plan(plan, model, cluster)
    for rank, memory in enumerate(device_memory(plan, model, cluster)):
        peak = max(point.bytes for point in timeline.memory if point.rank == rank)
        assert total_bytes(memory) == pytest.approx(peak, abs=4)


def test_what_waits_for_gradients_of_weights_grows_with_the_rows_and_is_of_trained_layers() -> None:
    model, cluster = even_model(4, parameters=10), one_node(1)
    plan = even_plan(model, cluster)
    (stage,) = stage_placements(plan)
    still = replace(model.layers[0], parameters=0, frozen_parameters=10)
    trained, partly = (
        [deferred_bytes(memory_tables(each, plan.job), stage, 1, rows) for rows in (1, 4)]
        for each in (model, replace(model, layers=(still, *model.layers[1:])))
    )
    assert trained[1] == 4 * trained[0]
    assert partly[1] == 4 * partly[0]
    assert trained[0] - partly[0] == 1000.0, "what the frozen layer saves of a row"
