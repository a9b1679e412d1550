"""`meshwright calibrate --runs`: constants with which runs were made up are found back, and layouts
worth a run are those that tell something new."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from recorded_cases import PLAIN, write_cells

from commands import meshwright, refused
from meshwright.cost.constants import Calibration, DeviceConstants, SystemConstants
from meshwright.cost.fit_constants import most_informative
from meshwright.cost.profile import Profile, load_profile
from meshwright.errors import ProfileError
from meshwright.recorded.files import read_runs, runs_text
from meshwright.recorded.fit import (
    fit_runs,
    median_error,
    memory_errors,
    parameters_told,
    propose_runs,
)
from meshwright.recorded.price import (
    machines_of,
    predicted_bytes,
    predicted_seconds,
    prepare,
)
from meshwright.recorded.spec import RecordedRun
from meshwright.workflows.calibrate_recorded import fit_runs_file, fit_sentences

MACHINES = machines_of()
TRUE = Calibration(
    devices={"V100-32": DeviceConstants(matmul_efficiency=0.5)},
    system=SystemConstants(inside_efficiency=0.4),
)
SMALL = PLAIN | {"model": "small", "family": "gpt2", "layers": "4", "width": "4096", "heads": "32"}
SMALL |= {"vocabulary": "8192", "memory": "", "sequence": "512"}
LAYOUTS = [(8, 1, 1, 1), (8, 1, 1, 4), (1, 8, 1, 4), (2, 4, 1, 8), (2, 2, 2, 2), (1, 2, 4, 8)]


def made_up(folder: Path, layouts=LAYOUTS, constants=TRUE, **cells: str) -> Path:
    """A runs file whose steps take what the prices say under these constants."""
    rows = []
    for data, tensor, stages, rows_each in layouts:
        own = {"data": data, "tensor": tensor, "stages": stages, "rows": rows_each}
        name = {"run": f"{data}-{tensor}-{stages}-{rows_each}"}
        rows.append(SMALL | {key: str(value) for key, value in own.items()} | name | cells)
    path = write_cells(folder / "runs.csv", rows)
    found = []
    for run in read_runs(path):
        profile = Profile(model=run.model, sequence=run.sequence, calibration=constants)
        found.append(replace(run, step=predicted_seconds(prepare(run, MACHINES), profile)))
    path.write_text(runs_text(found), encoding="utf-8")
    return path


def prepared(path: Path):
    return tuple(prepare(run, MACHINES) for run in read_runs(path))


@pytest.mark.slow
@pytest.mark.heavy
def test_constants_of_made_up_runs_are_found_back(tmp_path: Path) -> None:
    fit = fit_runs(prepared(made_up(tmp_path)), source="made up")
    found = fit.profile.calibration
    assert found
    assert found.devices["V100-32"].matmul_efficiency == pytest.approx(0.5, rel=0.04)
    assert found.system.inside_efficiency == pytest.approx(0.4, rel=0.12)
    assert found.devices["V100-32"].launch_forward == pytest.approx(2e-4, rel=0.1)
    assert median_error(fit.default, fit.measured) > 0.15
    assert median_error(fit.fitted, fit.measured) < 0.01
    assert median_error(fit.left_out, fit.measured) < 0.04
    assert found.error
    assert found.error.runs == len(LAYOUTS)
    assert found.error.low <= 1 <= found.error.high
    names = {parameter.name for parameter in fit.parameters}
    assert "network_efficiency" not in names
    assert "shard_exposure" not in names


@pytest.mark.slow
@pytest.mark.heavy
def test_fitted_constants_predict_other_layouts(tmp_path: Path) -> None:
    """Many constants at once are not told apart by six runs; the steps that follow from them are
    right all the same."""
    true = Calibration(
        devices={"V100-32": DeviceConstants(matmul_efficiency=0.5, memory_efficiency=0.6)},
        system=SystemConstants(inside_efficiency=0.4, ring_step=5e-5),
    )
    fit = fit_runs(prepared(made_up(tmp_path, constants=true)), source="made up")
    others = [(4, 1, 2, 2), (1, 4, 2, 4), (4, 2, 1, 2), (2, 1, 4, 4)]
    unseen = prepared(made_up(tmp_path, others, true))
    for run in unseen:
        assert predicted_seconds(run, fit.profile) == pytest.approx(run.run.step, rel=0.05)
        assert predicted_seconds(run) < 0.85 * run.run.step


@pytest.mark.slow
@pytest.mark.heavy
def test_host_bound_runs_are_recognised(tmp_path: Path) -> None:
    """Host times below those of the device change nothing, so a fit that begins there sees no
    slope; steps of an eager framework with tiny rows are host times alone."""
    slow = Calibration(
        devices={"V100-32": DeviceConstants(launch_forward=3e-3, launch_backward=4e-3)}
    )
    layouts = [(8, 1, 1, 1), (8, 1, 1, 2), (8, 1, 1, 4), (4, 1, 2, 1)]
    small = {"width": "512", "heads": "8"}
    fit = fit_runs(prepared(made_up(tmp_path, layouts, slow, **small)), source="made up")
    found = fit.profile.calibration
    assert found
    own = found.devices["V100-32"]
    assert own.launch_forward + own.launch_backward == pytest.approx(7e-3, rel=0.1)
    assert median_error(fit.fitted, fit.measured) < 0.02


def test_constants_are_fitted_that_the_runs_tell_of(tmp_path: Path) -> None:
    alone = {"devices": "1", "data": "1", "tensor": "1", "stages": "1", "global_batch": "4"}
    ready = prepared(write_cells(tmp_path / "one.csv", [SMALL | alone]))
    names = {parameter.name for parameter in parameters_told(ready)}
    assert {"matmul_efficiency", "launch_forward"} <= names
    assert not names & {"inside_efficiency", "network_efficiency", "ring_step", "boundary"}


def test_runs_that_cannot_be_fitted_are_refused(tmp_path: Path) -> None:
    rows = [SMALL, SMALL | {"run": "b", "framework": "fsdp"}]
    with pytest.raises(ProfileError, match="one framework"):
        fit_runs(prepared(write_cells(tmp_path / "two.csv", rows)), source="two.csv")
    rows = [SMALL | {"step": "", "memory": "4 GiB"}]
    with pytest.raises(ProfileError, match="at least one run with a step"):
        fit_runs(prepared(write_cells(tmp_path / "none.csv", rows)), source="none.csv")


@pytest.mark.heavy
def test_a_profile_is_of_one_model(tmp_path: Path) -> None:
    path = made_up(tmp_path, LAYOUTS[:2])
    rows = list(read_runs(path))
    rows[1] = replace(rows[1], model="other")
    path.write_text(runs_text(rows), encoding="utf-8")
    with pytest.raises(ProfileError, match="--model and --sequence"):
        fit_runs_file(path)
    fit, _, _ = fit_runs_file(path, model="gpt2", sequence=256)
    assert (fit.profile.model, fit.profile.sequence) == ("gpt2", 256)


@pytest.mark.heavy
def test_proposals_were_not_run_fit_and_are_read_back(tmp_path: Path) -> None:
    path = made_up(tmp_path, LAYOUTS[:3])
    fit = fit_runs(prepared(path), source="made up")
    proposed = propose_runs(fit, MACHINES, 4)
    assert proposed == propose_runs(fit, MACHINES, 4)
    layouts = {(run.data, run.tensor, run.stages, run.rows) for run in proposed}
    assert len(layouts) == 4
    assert not layouts & set(LAYOUTS[:3])
    for run in proposed:
        assert predicted_bytes(prepare(run, MACHINES)) < MACHINES["V100-32"].type.memory
        assert run.step is None
    measured = [replace(run, step=1.0) for run in proposed]
    path.write_text(runs_text(measured), encoding="utf-8")
    assert read_runs(path) == tuple(measured)


def test_what_is_known_is_not_asked_again() -> None:
    slopes = np.array([[1.0, 0.0], [0.0, 0.5]])
    assert most_informative(slopes, 1) == [0]
    assert most_informative(slopes, 1, known=np.array([[2.0, 0.0]])) == [1]


def test_memory_is_compared_in_the_file_s_own_units(tmp_path: Path) -> None:
    (run,) = read_runs(write_cells(tmp_path / "a.csv", [SMALL | {"memory": "4 GiB"}]))
    ready = prepare(run, MACHINES)
    exact = replace(ready, run=replace(run, memory=round(predicted_bytes(ready) / 2)))
    assert memory_errors([exact]) == pytest.approx([1.0])
    assert len(memory_errors([replace(ready, run=replace(run, memory=None))])) == 0


@pytest.mark.heavy
def test_the_command_writes_a_profile_that_plans_read(tmp_path: Path) -> None:
    made_up(tmp_path, LAYOUTS[:3])
    line = "calibrate --runs runs.csv --model gpt2 --sequence 512 --propose 2 -o fitted.json"
    done = meshwright(*line.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "3 runs of pytorch tell of" in done.stdout.replace("\n", " ")
    assert "left out" in done.stdout
    fitted = load_profile(tmp_path / "fitted.json")
    assert fitted.calibration
    assert fitted.calibration.error
    assert len(read_runs_unmeasured(tmp_path / "fitted.next.csv")) == 2
    (tmp_path / "cluster.toml").write_text(
        'format = 1\nname = "c"\n[[node]]\nname = "n"\ndevices = ["2 x V100-32"]\n'
    )
    plan = "plan --model gpt2 --cluster cluster.toml --global-batch 8 --sequence 512"
    done = meshwright(
        *f"{plan} --precision fp16 --profile fitted.json -o plan.json".split(), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


def read_runs_unmeasured(path: Path) -> list[RecordedRun]:
    """The layouts of a file of proposals, which a user has filled in."""
    lines = path.read_text(encoding="utf-8").splitlines()
    place = lines[0].split(",").index("step")
    filled = [line.split(",") for line in lines[1:]]
    for cells in filled:
        cells[place] = "1 s"
    path.write_text("\n".join([lines[0], *(",".join(cells) for cells in filled)]) + "\n")
    return list(read_runs(path))


@pytest.mark.heavy
def test_mistakes_on_the_command_line_are_named(tmp_path: Path) -> None:
    write_cells(tmp_path / "runs.csv", [SMALL | {"devices": "4"}])
    refused("calibrate --runs runs.csv -o o.json", ("runs.csv:2: devices",), cwd=tmp_path)
    refused(
        "calibrate run --runs runs.csv -o o.json", ("--runs", "a runs file alone"), cwd=tmp_path
    )
    refused("calibrate --runs none.csv -o o.json", ("none.csv",), cwd=tmp_path)
    assert not (tmp_path / "o.json").exists()


@pytest.mark.heavy
def test_what_is_said_of_a_fit_holds_its_figures(tmp_path: Path) -> None:
    ready = prepared(made_up(tmp_path, LAYOUTS[:3], memory="3 GiB"))
    fit = fit_runs(ready, source="made up")
    said = list(fit_sentences(fit, ready))
    assert f"{median_error(fit.default, fit.measured):.1%} without a fit" in said[1]
    assert f"{median_error(fit.left_out, fit.measured):.1%} left out" in said[1]
    assert said[-1].startswith("memory of 3 runs")
