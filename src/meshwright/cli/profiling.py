"""Defines the verbs that measure: profile, calibrate.

Heavy imports are inside the functions.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meshwright.cli.emulating import BedOption, launcher_for, profile_testbed
from meshwright.cli.options import (
    MeasuredTimes,
    ModelOption,
    PrecisionChoice,
    SequenceOption,
    app,
    check_outputs,
    say,
)

if TYPE_CHECKING:
    from meshwright.profiling.measure_profile import ProfileSettings
    from meshwright.workflows.session import Session


@app.command()
def profile(
    model: ModelOption,
    sequence: SequenceOption = 1024,
    rows: Annotated[str, typer.Option(help="Micro-batch sizes to measure.")] = "1,2,4",
    tensor: Annotated[str, typer.Option(help="Tensor widths to measure.")] = "1",
    precision: PrecisionChoice = PrecisionChoice.FP32,
    cluster: Annotated[
        Path | None,
        typer.Option(
            help="Which device each rank is, under `meshwright launch`; else: this device."
        ),
    ] = None,
    processes: Annotated[
        int, typer.Option(help="Measure with this many processes here, links between them too.")
    ] = 1,
    bed_file: BedOption = None,
    again: Annotated[
        bool, typer.Option(help="Measure even if nothing has changed since the last time.")
    ] = False,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File; with --testbed, folder.")
    ] = Path("profile.json"),
) -> None:
    """Measure layer times on this device, and links between ranks; `plan` reads the result.

    On a testbed every class of links is measured. The output is then a folder with profile.json,
    links.json and a cluster.toml that has the measured links.
    """
    from meshwright.records import checked_value
    from meshwright.workflows.profile_model import Processes

    checked_value(Processes, processes, "--processes")
    sizes = {"rows": _numbers(rows, "--rows"), "tensor": _numbers(tensor, "--tensor")}
    settings = _profile_settings(model, sequence, sizes, precision, cluster, output)
    with launcher_for(bed_file) as launcher:
        if launcher is not None:
            profile_testbed(launcher, settings, output, again=again)
        else:
            _profile_here(settings, processes, output, again=again)


def _profile_settings(
    model: str,
    sequence: int,
    sizes: dict[str, tuple[int, ...]],
    precision: PrecisionChoice,
    cluster: Path | None,
    output: Path,
) -> ProfileSettings:
    """Checks what the options of `profile` have set; `sizes` holds those that can be given several
    times."""
    from meshwright.profiling.measure_profile import ProfileSettings
    from meshwright.records import checked

    return checked(
        ProfileSettings,
        {name: f"--{name}" for name in ("model", "sequence", "rows", "tensor", "output")},
        model=model,
        sequence=sequence,
        precision=precision.value,
        cluster=str(cluster) if cluster else None,
        output=str(output),
        **sizes,
    )


def _profile_here(settings: ProfileSettings, processes: int, output: Path, *, again: bool) -> None:
    """Measures on this machine, and says whether anything had to be measured."""
    from meshwright import files
    from meshwright.workflows.profile_model import profile_here

    files.check_output(output, kept=True)
    _, known = profile_here(settings, processes, again=again)
    if os.environ.get("RANK", "0") == "0":
        done = f"{output} holds these measurements already; --again measures anew"
        say(done if known else f"wrote {output}")


def _numbers(text: str, option: str) -> tuple[int, ...]:
    from meshwright.errors import OptionError, Problem

    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch("[0-9]{1,18}", part) for part in parts):
        raise OptionError(Problem(option, "", repr(text), "numbers such as 1,2,4"))
    return tuple(map(int, parts))


RunFolders = Annotated[
    list[Path] | None, typer.Argument(help="Run folders, as `meshwright train` writes them.")
]
RunsOption = Annotated[
    Path | None,
    typer.Option(
        "--runs", help="Runs of other tools: a table with the columns that docs/profile.md lists."
    ),
]
CalibrationOutput = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="Profile to write (default: calibrated.json), or folder of plans (calibration).",
    ),
]


@app.command()
def calibrate(
    runs: RunFolders = None,
    recorded: RunsOption = None,
    propose: Annotated[
        int,
        typer.Option(
            help="Write this number of plans that are worth a short run, and stop; with --runs, "
            "fit and write this number of layouts."
        ),
    ] = 0,
    model: Annotated[
        str,
        typer.Option("--model", help="To propose: as for `plan`. With --runs: whose profile."),
    ] = "",
    cluster: Annotated[Path | None, typer.Option(help="Cluster file.")] = None,
    global_batch: Annotated[int, typer.Option(help="To propose: rows per step.")] = 8,
    sequence: Annotated[int, typer.Option(help="To propose: tokens per row.")] = 1024,
    precision: Annotated[PrecisionChoice | None, typer.Option(help="As for `plan`.")] = None,
    profile: MeasuredTimes = None,
    output: CalibrationOutput = None,
) -> None:
    """Fit the cost model to runs on this cluster, or to runs of other tools; `plan --profile` then
    uses the fitted constants."""
    from meshwright import files
    from meshwright.errors import OptionError, Problem
    from meshwright.records import checked_value
    from meshwright.workflows.calibrate import Proposals
    from meshwright.workflows.session import open_session

    checked_value(Proposals, propose, "--propose")
    if recorded is not None:
        if runs:
            found, wanted = "run folders as well", "a runs file alone"
            raise OptionError(Problem("--runs", "", found, wanted, "calibrate them apart"))
        target = output or Path("calibrated.json")
        _calibrate_recorded(recorded, cluster, (model, sequence), propose, target)
        return
    if not propose:
        _calibrate(runs or [], cluster, output or Path("calibrated.json"))
        return
    folder = output or Path("calibration")
    if not model or cluster is None:
        wanted = "--model and --cluster as well, to know what to propose for"
        raise OptionError(Problem("--propose", "", "nothing else", wanted))
    files.check_folder(folder)
    session = open_session(
        model=model,
        cluster=cluster,
        profile=profile,
        global_batch=global_batch,
        sequence=sequence,
        precision=precision.value if precision else None,
        optimizer="adamw",
    )
    _propose(session, propose, folder)


def _propose(session: Session, count: int, folder: Path) -> None:
    """Writes plans that are worth a short run, and prints the command for each."""
    from meshwright.plan.files import save_plan
    from meshwright.text import file_name
    from meshwright.workflows.calibrate import propose_plans
    from meshwright.workflows.session import with_sources

    for index, proposed in enumerate(propose_plans(session, count)):
        path = folder / f"{index}-{file_name(proposed.name)}.json"
        save_plan(with_sources(session, proposed), path)
        run = folder / f"run-{index}"
        say(shlex.join(["meshwright", "train", str(path), "--steps", "12", "-o", str(run)]))
    say(f"then: meshwright calibrate {shlex.quote(str(folder))}/run-* -o calibrated.json")


def _calibrate(runs: list[Path], cluster: Path | None, output: Path) -> None:
    from meshwright import files
    from meshwright.records import dumps
    from meshwright.workflows.calibrate import profile_from_runs

    check_outputs(output)
    found = profile_from_runs(runs, cluster)
    files.write_text(output, dumps(found), durable=True)
    fitted = found.calibration
    if fitted and fitted.error:
        low, high = fitted.error.low, fitted.error.high
        say(f"left out, four of five runs took {low:.2f} to {high:.2f} of the predicted")
    say(f"wrote {output}")


def _calibrate_recorded(
    path: Path, cluster: Path | None, planned: tuple[str, int], propose: int, output: Path
) -> None:
    """Fits constants to a runs file, says how good they are, and writes the profile and the layouts
    that are worth a run."""
    from meshwright import files
    from meshwright.recorded.files import runs_text
    from meshwright.recorded.fit import propose_runs
    from meshwright.records import dumps
    from meshwright.workflows.calibrate_recorded import fit_runs_file, fit_sentences

    next_runs = output.with_suffix(".next.csv")
    check_outputs(output, *([next_runs] if propose else []))
    fit, machines, runs = fit_runs_file(path, cluster, *planned)
    files.write_text(output, dumps(fit.profile), durable=True)
    for sentence in fit_sentences(fit, runs):
        say(sentence)
    say(f"wrote {output}")
    if propose:
        proposed = propose_runs(fit, machines, propose)
        files.write_text(next_runs, runs_text(proposed))
        say(f"wrote {next_runs}: {len(proposed)} layouts; fill in what you measure, add it to")
        say(f"{path}, and calibrate again")
