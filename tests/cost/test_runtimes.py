"""The systems that may run a plan: which constants are theirs, and where they count."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.cli.options import RuntimeChoice
from meshwright.cost.constants import Calibration, SystemConstants, implausible
from meshwright.cost.pricing import price_program
from meshwright.cost.profile import LayerTime, Profile
from meshwright.cost.runtimes import RUNTIMES, UNMEASURED, as_run_by
from meshwright.cost.weights import bytes_per_parameter
from meshwright.export.tools import RUNTIME_OF, TOOLS
from meshwright.plan.spec import Plan, RuntimeName
from meshwright.program.compile import compile_plan
from meshwright.program.operations import Op
from meshwright.search.costs import costs_of, group_times
from meshwright.simulate.simulator import simulate_plan
from worlds import even_model, even_plan, one_node

MODEL = even_model(2)
OTHERS = sorted({*get_args(RuntimeName)} - {"meshwright"})


def run_by(runtime: RuntimeName, plan: Plan) -> Plan:
    return replace(plan, job=replace(plan.job, runtime=runtime))


def test_every_system_that_can_be_named_is_described() -> None:
    names = {*get_args(RuntimeName)}
    assert {*RUNTIMES} == names == {choice.value for choice in RuntimeChoice}
    assert {*RUNTIME_OF} == {*TOOLS}
    assert {*RUNTIME_OF.values()} == names - {"meshwright"}
    assert all(known.source for known in RUNTIMES.values())
    assert UNMEASURED.low < 1 < UNMEASURED.high


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_its_constants_are_plausible(runtime: RuntimeName) -> None:
    known = RUNTIMES[runtime]
    described = Calibration(others=known.device, system=known.system)
    assert not list(implausible(described, runtime))


def test_what_was_calibrated_is_kept() -> None:
    fitted = Profile(model="even", sequence=1, calibration=Calibration())
    for runtime in RUNTIMES:
        assert as_run_by(runtime, fitted, MODEL) is fitted


def test_our_own_runtime_has_the_defaults() -> None:
    assert as_run_by("meshwright", None, MODEL) is None
    measured = Profile(model="even", sequence=1)
    assert as_run_by("meshwright", measured, MODEL) is measured


@pytest.mark.parametrize("runtime", OTHERS)
def test_what_was_measured_is_kept_beside_the_constants(runtime: RuntimeName) -> None:
    entry = LayerTime(
        device="g",
        signature="s",
        precision="fp32",
        tensor=1,
        rows=1,
        forward_seconds=5e-3,
        backward_seconds=9e-3,
    )
    measured = Profile(model="even", sequence=1, layers=(entry,), step_overhead_seconds=0.5)
    found = as_run_by(runtime, measured, MODEL)
    assert found is not None
    assert found.calibration is not None
    assert found.calibration.system == RUNTIMES[runtime].system
    assert replace(found, calibration=None) == measured
    alone = as_run_by(runtime, None, MODEL)
    assert alone is not None
    assert alone.calibration == found.calibration


def test_search_and_prices_take_the_same_constants() -> None:
    """Two layers of 1 ms, 0.3 ms of kernels each that are ramped up, 0.3 ms of an instruction."""
    cluster = one_node(1)
    plan = run_by("megatron", even_plan(MODEL, cluster))
    costs = costs_of(MODEL, cluster, plan.job)
    forward, backward = (each.sum() for each in group_times(costs, ("n:0",), 1)[:2])
    assert forward == pytest.approx(2.6e-3)
    assert backward == pytest.approx(5.2e-3)
    assert costs.system == RUNTIMES["megatron"].system
    program = compile_plan(plan, MODEL)
    found = price_program(program, plan, MODEL, cluster)
    seconds = {i.op: p.seconds for i, p in zip(program.ranks[0], found.ranks[0], strict=True)}
    assert seconds[Op.FORWARD] == pytest.approx(forward + 3e-4)
    assert seconds[Op.BACKWARD] == pytest.approx(backward + 3e-4)
    assert found.overhead_seconds == RUNTIMES["megatron"].system.step
    shared = price_program(program, plan, MODEL, cluster, costs.profile, times=costs.times)
    assert shared == found


def test_constants_that_were_calibrated_count_whoever_runs_the_plan() -> None:
    cluster = one_node(2)
    plan = even_plan(MODEL, cluster, stages=2)
    fitted = Profile(
        model="even", sequence=1, calibration=Calibration(system=SystemConstants(step=1e-2))
    )
    ours = simulate_plan(plan, MODEL, cluster, fitted)
    for runtime in OTHERS:
        there = run_by(runtime, plan)
        assert simulate_plan(there, MODEL, cluster, fitted).step_seconds == ours.step_seconds
        assert simulate_plan(there, MODEL, cluster).step_seconds != ours.step_seconds


@given(
    stages=st.integers(1, 4),
    micro_batches=st.integers(1, 6),
    schedule=st.sampled_from(["1f1b", "gpipe"]),
    cut_bytes=st.sampled_from([1.0, 1e5, 1e6]),
)
def test_where_no_gradients_are_summed_megatron_is_never_the_faster(
    stages: int, micro_batches: int, schedule: str, cut_bytes: float
) -> None:
    model, cluster = even_model(stages, cut_bytes=cut_bytes), one_node(stages)
    plan = even_plan(model, cluster, stages=stages, micro_batches=micro_batches, schedule=schedule)
    ours, theirs = (
        simulate_plan(run_by(runtime, plan), model, cluster).step_seconds
        for runtime in ("meshwright", "megatron")
    )
    assert theirs > ours


@pytest.mark.parametrize(
    ("runtime", "wanted"),
    [
        ("meshwright", (4.0, 4.0, 8.0, 2.0)),
        ("fsdp", (4.0, 4.0, 8.0, 2.0)),
        ("megatron", (2.0, 4.0, 12.0, 0.0)),
        ("deepspeed", (2.0, 2.0, 12.0, 0.0)),
    ],
)
def test_master_weights_are_where_a_runtime_keeps_them(
    runtime: RuntimeName, wanted: tuple[float, ...]
) -> None:
    short, long = (bytes_per_parameter(p, "adamw", runtime) for p in ("bf16", "fp32"))
    assert (short.weights, short.gradients, short.optimizer, short.casts) == wanted
    assert (long.weights, long.gradients, long.optimizer, long.casts) == (4.0, 4.0, 8.0, 0.0)
