"""Virtual devices: tensors and gradients of the right shapes, after the time of the table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from beds import JOB, NOTHING, bed, pipeline_plan
from torch import nn

from meshwright.cost.priced_plan import PricedPlan
from meshwright.cost.profile import Profile
from meshwright.emulation.virtual_device import BackwardState, VirtualLayer, VirtualOptimizer
from meshwright.emulation.virtual_times import virtual_times
from meshwright.errors import LaunchError, MeshwrightError
from meshwright.model.load import load_model
from meshwright.plan.files import save_plan
from meshwright.records import dumps
from meshwright.runtime import worker
from meshwright.runtime.run_folder import RunSettings, TrainingOptions
from meshwright.testbed.launcher import launcher_on_testbed
from meshwright.testbed.lifecycle import design_testbed
from meshwright.testbed.undisturbed_runs import train_on
from meshwright.workflows.session import Session, priced, with_prediction


class Twice(nn.Module):
    """A layer with a parameter, an output with a gradient and one without."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.linear(x), torch.arange(x.shape[0])


def test_a_layer_spends_its_time_both_ways_and_gives_every_gradient() -> None:
    spent: list[float] = []
    module = Twice()
    layer = VirtualLayer(module, 0.25, 0.5, spent.append, BackwardState())
    x = torch.randn(2, 3, requires_grad=True)
    y, numbers = layer(x)
    assert (y.shape, y.requires_grad) == ((2, 5), True)
    assert (numbers.dtype, numbers.requires_grad) == (torch.int64, False)
    assert spent == [0.25]
    y.backward(torch.ones_like(y))
    assert spent == [0.25, 0.5]
    assert x.grad is not None
    for parameter in module.parameters():
        assert parameter.grad is not None
        assert parameter.grad.shape == parameter.shape


def test_another_number_of_rows_gets_its_own_shapes() -> None:
    layer = VirtualLayer(Twice(), 0.0, 0.0, lambda _: None, BackwardState())
    assert [layer(torch.randn(rows, 3))[0].shape[0] for rows in (2, 7, 2)] == [2, 7, 2]


def test_an_optimizer_step_takes_its_time_and_moves_nothing() -> None:
    spent: list[float] = []
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    optimizer = VirtualOptimizer([weight], 0.125, spent.append)
    optimizer.step()
    assert spent == [0.125]
    assert torch.equal(weight, torch.ones(3))


def test_the_table_is_the_cost_models() -> None:
    model = load_model("gpt-tiny", 16, "fp32")
    plan = pipeline_plan(((("a:0",),), (("b:0",),)), (0, 5, 10))
    fast, slow = virtual_times(PricedPlan(plan, model, bed().cluster)).ranks
    assert len(fast.forward) == len(model.layers)
    assert all(4 * f == pytest.approx(s) or f <= s for f, s in zip(
        fast.forward, slow.forward, strict=True))  # fmt: skip
    measured = Profile(model="gpt-tiny", sequence=16)
    assert virtual_times(PricedPlan(plan, model, bed().cluster, measured)).ranks == (fast, slow)


def test_sums_inside_layers_need_their_arithmetic() -> None:
    model = load_model("gpt-tiny", 16, "fp32")
    plan = pipeline_plan(((("a:0", "a:1"),),), (0, 10))
    with pytest.raises(LaunchError, match="share a layer"):
        virtual_times(PricedPlan(plan, model, bed().cluster))


@pytest.mark.slow
def test_a_pipeline_of_virtual_devices_lasts_as_long_as_predicted(tmp_path: Path) -> None:
    """On the loopback, which every machine permits. Instructions sleep at least their time, so that
    the step cannot be shorter than the busiest rank's."""
    virtual = bed(compute_scale=0.2)
    up = design_testbed(virtual, NOTHING, "mw-none").running
    model = load_model("gpt-tiny", 16, "fp32")
    session = Session(
        model=model,
        cluster=virtual.cluster,
        job=JOB,
        profile=None,
        model_source="gpt-tiny",
        cluster_source="",
        profile_source="",
        warnings=(),
    )
    plan = with_prediction(priced(session, pipeline_plan(((("a:0",),), (("b:0",),)), (0, 7, 10))))
    with launcher_on_testbed(up) as launcher:
        settings = RunSettings(model="gpt-tiny", options=TrainingOptions(steps=4))
        run = train_on(launcher, session, plan, settings, tmp_path)
    assert plan.prediction is not None
    compute = plan.prediction.parts["compute"]
    assert len(run.outcome.metrics) == 4
    assert run.outcome.step_seconds > 0.99 * compute
    assert run.outcome.timeline is not None
    assert set(run.outcome.losses) == {0.0}


def test_an_emulated_device_does_not_run_at_full_speed_by_mistake(tmp_path: Path) -> None:
    settings = RunSettings(model="gpt-tiny", shares={"a:0": 0.5})
    (tmp_path / "run.json").write_text(dumps(settings))
    save_plan(pipeline_plan(((("a:0",),), (("b:0",),)), (0, 7, 10)), tmp_path / "plan.json")
    with pytest.raises(LaunchError, match=r"shares.a:0: found 0.5; wanted a rank that a testbed"):
        worker.run_worker(tmp_path)


@pytest.mark.slow
def test_a_rank_that_fails_says_why(tmp_path: Path) -> None:
    up = design_testbed(bed(), NOTHING, "mw-none").running
    with (
        launcher_on_testbed(up) as launcher,
        pytest.raises(MeshwrightError, match=r"run\.json.*no such file"),
    ):
        launcher.launcher.run(("a:0", "b:0"), tmp_path, module="meshwright.testbed.emulated_worker")


def test_a_command_ends_with_the_status_of_the_process_that_failed() -> None:
    up = design_testbed(bed(), NOTHING, "mw-none").running
    with launcher_on_testbed(up) as launcher:
        events = launcher.launcher.run_command(("a:0", "b:0"), ["sh", "-c", "exit $RANK"])
        assert {event.rank: event.status for event in events} == {0: 0, 1: 1}
        (event,) = launcher.launcher.run_command(("a:0",), ["sh", "-c", "kill -9 $$"])
        assert event.status == -9
