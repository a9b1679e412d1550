"""Memory in constant time equals memory counted layer by layer, and what the simulator sees."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.cluster.spec import DeviceType
from meshwright.cost import out_of_memory
from meshwright.cost.constants import FRAGMENTATION, FRAMEWORK_BYTES
from meshwright.cost.gradient_copies import copied_gradient_bytes
from meshwright.cost.memory import (
    device_memory,
    memory_table,
    stage_memory,
    stage_memory_bytes,
    total_bytes,
    usable_bytes,
)
from meshwright.cost.out_of_memory import memory_problems
from meshwright.cost.weights import bytes_per_parameter, stage_parameters
from meshwright.model.spec import Division, Layer, LayerGraph, Moment, Tensor, Tied, tensors_across
from meshwright.plan.spec import Job, Pipeline, Plan, Stage
from meshwright.simulate.simulator import simulate_plan
from strategies import AXES, models_and_plans
from worlds import DEVICE, chain, divided, even_model, even_plan, one_node, plan_by_hand

JOB = Job(global_batch=8, sequence=8, precision="bf16")


@st.composite
def graphs(draw: st.DrawFn) -> LayerGraph:
    """Layers of every kind, skip connections, gradient-free tensors and tied parameters."""
    count = draw(st.integers(1, 7))
    amount = st.integers(0, 50)
    moment = st.builds(
        Moment, fixed=amount, split_fixed=amount, row=st.integers(-50, 50), split_row=amount
    )
    layers = []
    for index in range(count):
        parameters, saved = draw(amount), draw(amount)
        layers.append(
            Layer(
                name=f"l{index}",
                signature=f"s{index}",
                forward_flops=1.0,
                backward_flops=2.0,
                traffic_bytes=1.0,
                parameters=parameters,
                saved_bytes=saved,
                workspace_bytes=draw(amount),
                fixed_saved_bytes=draw(amount),
                cast_parameters=draw(st.integers(0, parameters)),
                moments=tuple(draw(st.lists(moment, max_size=2))),
                parallel=(
                    Division(
                        axis="tensor",
                        moments=tuple(draw(st.lists(moment, max_size=2))),
                        units=draw(st.sampled_from([0, 4])),
                        parameters=draw(st.integers(0, parameters)),
                        saved_bytes=draw(st.integers(0, saved)),
                    ),
                ),
            )
        )
    tensors = tuple(
        Tensor(
            name=f"t{index}",
            bytes=draw(amount),
            producer=index,
            consumers=(draw(st.integers(index + 1, count - 1)),),
            gradient=draw(st.booleans()),
            kept=draw(st.booleans()),
        )
        for index in range(count - 1)
    )
    users = st.lists(st.integers(0, count - 1), min_size=1, max_size=3, unique=True).map(sorted)
    tied = tuple(
        Tied(name=f"w{index}", layers=tuple(draw(users)), parameters=7, divided=draw(AXES))
        for index in range(draw(st.integers(0, 2)))
    )
    return LayerGraph(
        name="g",
        sequence=8,
        precision="bf16",
        layers=tuple(layers),
        tensors=tensors,
        tied=tied,
    )


def counted(model: LayerGraph, layers: tuple[int, int], tensor: int, rows: int, held: int) -> float:
    """The same by looking at every layer, tensor and moment."""
    first, last = layers
    own = model.layers[first:last]

    divisions = [x.along("tensor") for x in own]

    def share(whole: float, split: float) -> float:
        return whole - split * (1 - 1 / tensor)

    tied = [t for t in model.tied if any(first <= n < last for n in t.layers)]
    parameters = sum(share(x.parameters, d.parameters) for x, d in zip(own, divisions, strict=True))
    parameters += sum(t.parameters / (tensor if t.divided else 1) for t in tied)
    casts = sum(x.cast_parameters - min(x.cast_parameters, d.parameters) * (1 - 1 / tensor)
                for x, d in zip(own, divisions, strict=True))  # fmt: skip
    casts += sum(t.parameters / (tensor if t.divided else 1) for t in tied)
    kept = [share(x.saved_bytes, d.saved_bytes) * rows + x.fixed_saved_bytes
            for x, d in zip(own, divisions, strict=True)]  # fmt: skip
    peaks = []
    for n, (layer, along) in enumerate(zip(own, divisions, strict=True)):
        moments = along.moments if tensor > 1 and along.moments else layer.moments
        split = along.saved_bytes / layer.saved_bytes if layer.saved_bytes else 0.0
        row = layer.workspace_bytes * (1 - split), layer.workspace_bytes * split
        moments = moments or (Moment(row=row[0], split_row=row[1]),)
        bytes_ = [
            m.fixed + m.split_fixed / tensor + rows * (m.row + m.split_row / tensor)
            for m in moments
        ]
        peaks.append(sum(kept[: n + 1]) + max(0, *bytes_))
    worst = max(peaks)
    for t in tied:
        users = [n - first for n in t.layers if first <= n < last]
        waiting = 4 * t.parameters / (tensor if t.divided else 1)
        if len(users) > 1:
            end = min(last, t.layers[-1]) - first
            worst = max(worst, max(peaks[:end]) + waiting)
            worst = max(worst, peaks[users[0]] + 2 * waiting)
    before, after = (tensors_across(model, cut) for cut in layers)
    boundary = sum(t.bytes for t in before if not t.kept) + sum(t.bytes for t in after)
    gradients = [sum(t.bytes for t in cut if t.gradient) for cut in (before, after)]
    transfers = sum(t.bytes for t in before) + gradients[1] + gradients[0]
    activations = (sum(kept) + boundary * rows) * held
    return 16 * parameters + 2 * casts + activations + transfers * rows + worst - sum(kept)


@given(graphs(), st.data(), st.sampled_from([1, 2, 4]), st.integers(1, 4), st.integers(1, 5))
def test_any_stage_equals_its_layers_counted_one_by_one(
    model: LayerGraph, data: st.DataObject, tensor: int, rows: int, held: int
) -> None:
    first = data.draw(st.integers(0, len(model.layers) - 1))
    last = data.draw(st.integers(first + 1, len(model.layers)))
    table = memory_table(model, JOB)
    found = stage_memory_bytes(table, (first, last), tensor, rows, held)
    assert found == pytest.approx(counted(model, (first, last), tensor, rows, held))


@given(graphs())
def test_many_stages_at_once_equal_each_alone(model: LayerGraph) -> None:
    table = memory_table(model, JOB)
    ends = np.arange(1, len(model.layers) + 1)
    together = stage_memory_bytes(table, (np.zeros_like(ends), ends), 2, 3, ends)
    alone = [stage_memory_bytes(table, (0, int(end)), 2, 3, int(end)) for end in ends]
    assert together.tolist() == pytest.approx(alone)


@pytest.mark.parametrize(
    ("precision", "optimizer", "total"),
    [("fp32", "adamw", 16), ("bf16", "adamw", 18), ("fp16", "sgd", 10), ("fp64", "adamw", 32)],
)
def test_states_take_what_the_training_recipe_says(
    precision: str, optimizer: str, total: int
) -> None:
    unit = bytes_per_parameter(precision, optimizer)  # type: ignore[arg-type]
    assert unit.weights + unit.gradients + unit.optimizer + unit.casts == total


@given(models_and_plans())
def test_prediction_equals_the_simulated_high_water_mark(case: tuple[LayerGraph, Plan]) -> None:
    model, plan = case
    cluster = one_node(len(plan.devices))
    timeline = simulate_plan(plan, model, cluster)
    for rank, memory in enumerate(device_memory(plan, model, cluster)):
        peak = max(point.bytes for point in timeline.memory if point.rank == rank)
        assert memory.device == plan.devices[rank]
        assert total_bytes(memory) == pytest.approx(peak, abs=4)


def test_narrow_replicas_copy_the_gradients_that_wide_ones_divide() -> None:
    """16 MB of gradients, all divided by the other replica, where next to nothing else is held."""
    model = chain([1e-6])
    big = divided(replace(model.layers[0], parameters=4_000_000), parameters=4_000_000)
    model = replace(model, layers=(big,))

    def buffers(devices: tuple[tuple[str, ...], ...]) -> list[int]:
        stage = Stage(layers=(0, 1), devices=devices, rows=(1,) * len(devices))
        pipeline = Pipeline(micro_batches=1, rows=len(devices), stages=(stage,))
        plan = plan_by_hand(pipeline, sequence=model.sequence)
        return [m.buffers for m in device_memory(plan, model, one_node(len(plan.devices)))]

    alike, (wide, _, narrow) = buffers((("n:0",), ("n:1",))), buffers((("n:0", "n:1"), ("n:2",)))
    assert narrow - alike[0] == pytest.approx(16e6, rel=1e-3)
    assert wide < narrow - 15e6


@pytest.mark.parametrize("data", [2, 16, 64])
def test_replicas_that_are_alike_are_weighed_once(data: int, monkeypatch) -> None:
    """What the weighing of a plan takes grows with its stages, not with stages times devices."""
    asked = []
    monkeypatch.setattr(
        "meshwright.cost.memory.copied_gradient_bytes",
        lambda *args: asked.append(args) or copied_gradient_bytes(*args),
    )
    model, cluster = even_model(4), one_node(data * 2)
    plan = even_plan(model, cluster, data=data, stages=2)
    assert len(device_memory(plan, model, cluster)) == 2 * data
    assert len(asked) == 2


def test_a_gpu_keeps_room_for_its_context_and_for_the_allocator() -> None:
    holes = round(FRAGMENTATION["gpu"] * DEVICE.memory)
    assert usable_bytes(DEVICE) == DEVICE.memory - FRAMEWORK_BYTES["gpu"] - holes
    context, workspace, communicators = 512 << 20, 32 << 20, 4 * (96 << 20)
    assert FRAMEWORK_BYTES["gpu"] == context + workspace + communicators
    cpu = replace(DEVICE, processor="cpu")
    assert usable_bytes(cpu) == DEVICE.memory - FRAMEWORK_BYTES["cpu"]


def with_room(tensors: int) -> DeviceType:
    """A gpu on which tensors may take this many bytes."""
    return replace(
        DEVICE, memory=round((FRAMEWORK_BYTES["gpu"] + tensors) / (1 - FRAGMENTATION["gpu"]))
    )


def test_what_does_not_fit_is_said_with_size_and_remedy() -> None:
    """Four layers of 1 MB saved a row, eight rows: 32 MB on a device that has 21 MB."""
    roomy = one_node(2)
    small = with_room(21 * 10**6)
    cluster = replace(roomy, types={"g": small})
    model = even_model(4)
    layers = tuple(replace(layer, saved_bytes=1e6) for layer in model.layers)
    model = replace(model, layers=layers)
    plan = even_plan(model, cluster)
    wide = replace(plan, pipelines=(replace(plan.pipelines[0], rows=8),))
    assert memory_problems(plan, model, cluster) == ()
    assert memory_problems(wide, model, roomy) == ()
    (problem,) = memory_problems(wide, model, cluster)
    assert problem.field == "pipelines[0].stages[0]"
    assert "n:0" in problem.found
    assert "10.49 MiB too much" in problem.found
    assert "2 of its 4 layers" in problem.mend
    assert "5 of its 8 rows" in problem.mend
    assert "tensor width" not in problem.mend


def test_only_a_legal_tensor_width_is_advised() -> None:
    """Twelve heads: with three ranks it fits, with two it does not."""
    small = with_room(12 * 10**6)
    cluster = replace(one_node(1), types={"g": small})
    model = even_model(4)
    layers = tuple(
        divided(replace(x, saved_bytes=8e6), saved_bytes=8e6, units=12) for x in model.layers
    )
    model = replace(model, layers=layers)
    (problem,) = memory_problems(even_plan(model, cluster), model, cluster)
    assert "tensor width 3" in problem.mend


def test_tied_parameters_are_held_by_each_stage_that_uses_them() -> None:
    model = even_model(4, parameters=10)
    shared = replace(model, tied=(Tied(name="w", layers=(0, 3), parameters=100),))
    table = memory_table(shared, JOB)
    held = [float(stage_parameters(table.weights, (s, s + 1), 1)) for s in range(4)]
    assert held == [110.0, 10.0, 10.0, 110.0]
    assert stage_memory(table, (0, 4), 1, 1, 1).parameters == 140 * 4


def test_many_overfull_devices_are_reported_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices are listed once, and what helps is asked once for each stage, not for each device."""
    asked: Counter[str] = Counter()

    def counted(name: str) -> Callable[..., object]:
        made = getattr(out_of_memory, name)
        return lambda *given, **named: asked.update([name]) or made(*given, **named)

    for name in ("devices_of", "_what_helps"):
        monkeypatch.setattr(out_of_memory, name, counted(name))
    where = replace(one_node(8), types={"g": with_room(10**6)})
    model = even_model(2, parameters=1_000_000)
    problems = memory_problems(even_plan(model, where, data=4, stages=2), model, where)
    assert len(problems) == 8
    assert asked == {"devices_of": 1, "_what_helps": 2}
