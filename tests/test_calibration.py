"""`meshwright calibrate`: proposals that differ, and constants from run folders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from meshwright.cost.constants import Calibration, DeviceConstants, SystemConstants
from meshwright.cost.fit_constants import most_informative
from meshwright.cost.profile import load_profile
from meshwright.errors import ProfileError
from meshwright.plan.files import save_plan
from meshwright.records import dumps
from meshwright.runtime.run_folder import RunSettings, TrainingOptions
from meshwright.simulate.simulator import simulate_plan
from meshwright.workflows.calibrate import (
    base_profile,
    fit_parameters_for,
    profile_from_runs,
    propose_plans,
    run_seconds,
)
from meshwright.workflows.session import Session, error_text, open_session, with_sources

CLUSTER = """
format = 1
name = "two"
[links]
inside = { bandwidth = "100 Gbit/s", latency = "10 us" }
network = { bandwidth = "25 Gbit/s", latency = "50 us" }
[[node]]
name = "n"
count = 2
devices = ["2 x A100-40"]
"""
TRUE = Calibration(
    devices={"A100-40": DeviceConstants(matmul_efficiency=0.5, launch_forward=6e-4)},
    system=SystemConstants(network_efficiency=0.5, step=5e-3),
)


@pytest.fixture
def session(tmp_path: Path) -> Session:
    file = tmp_path / "cluster.toml"
    file.write_text(CLUSTER)
    return open_session(
        model="gpt2",
        cluster=file,
        profile=None,
        global_batch=16,
        sequence=256,
        precision="bf16",
        optimizer="adamw",
    )


def write_runs(session: Session, folder: Path, count: int) -> list[Path]:
    """Run folders whose steps take what the simulator says under TRUE."""
    truth = replace(base_profile(session), calibration=TRUE)
    found = []
    for index, plan in enumerate(propose_plans(session, count)):
        run = folder / f"run-{index}"
        run.mkdir()
        save_plan(with_sources(session, plan), run / "plan.json")
        options = TrainingOptions(steps=6, clip_norm=1.0 if index else 0.0)
        settings = RunSettings(model="gpt2", options=options)
        (run / "run.json").write_text(dumps(settings))
        seconds = simulate_plan(
            plan, session.model, session.cluster, truth, clipped=options.clip_norm > 0
        ).step_seconds
        line = {"loss": 1.0, "gradient_norm": 1.0, "learning_rate": 0.1, "tokens_per_second": 1.0}
        steps = [9.0, 1.0, 1.0, seconds, seconds, seconds]
        text = [
            json.dumps({**line, "step": n, "step_seconds": s, "memory_bytes": 1})
            for n, s in enumerate(steps)
        ]
        (run / "metrics.jsonl").write_text("\n".join(text) + "\n")
        found.append(run)
    return found


def test_proposals_are_different_plans_that_say_different_things(session: Session) -> None:
    plans = propose_plans(session, 5)
    assert len({plan.pipelines for plan in plans}) == 5
    assert propose_plans(session, 5) == plans


@pytest.mark.heavy
def test_constants_from_runs_predict_other_plans(session: Session, tmp_path: Path) -> None:
    runs = write_runs(session, tmp_path, 8)
    found = profile_from_runs(runs[:6])
    truth = replace(base_profile(session), calibration=TRUE)
    errors = {True: [], False: []}
    for plan in propose_plans(session, 8)[6:]:
        real = simulate_plan(plan, session.model, session.cluster, truth).step_seconds
        for fitted in (True, False):
            profile = found if fitted else None
            step = simulate_plan(plan, session.model, session.cluster, profile).step_seconds
            errors[fitted].append(abs(step / real - 1))
    assert np.mean(errors[True]) < 0.05
    assert np.mean(errors[True]) < 0.5 * np.mean(errors[False])
    path = tmp_path / "calibrated.json"
    path.write_text(dumps(found))
    assert load_profile(path) == found
    assert "of the 6 runs" in error_text(replace(session, profile=found), 1.0)
    assert "published runs" in error_text(session, 1.0)
    measured = replace(found, calibration=None)
    assert error_text(replace(session, profile=measured), 1.0) == ""


def test_runs_without_steps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="no such file"):
        run_seconds(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ProfileError, match="0 steps"):
        run_seconds(tmp_path)
    with pytest.raises(ProfileError, match="at least one run folder"):
        profile_from_runs([])


def test_only_links_that_exist_are_fitted(session: Session) -> None:
    names = {knob.name for knob in fit_parameters_for(session.cluster, None)}
    assert "network_efficiency" in names
    alone = replace(session.cluster, nodes=session.cluster.nodes[:1])
    assert "network_efficiency" not in {knob.name for knob in fit_parameters_for(alone, None)}


def test_informative_rows_point_in_different_directions() -> None:
    slopes = np.array([[1.0, 0.0], [0.99, 0.0], [0.0, 0.5], [0.7, 0.0]])
    assert most_informative(slopes, 2) == [0, 2]
    assert sorted(most_informative(slopes, 9)) == [0, 1, 2, 3]
