"""Defines the verbs of the testbed, an emulated cluster, and `verify`, which compares predictions
with measurements."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meshwright.cli.options import ClusterOption, PlanFile, ProfileOption, app, say

if TYPE_CHECKING:
    from meshwright.launch.local import Launcher
    from meshwright.plan.spec import Plan
    from meshwright.profiling.measure_profile import ProfileSettings
    from meshwright.runtime.run_folder import RunSettings
    from meshwright.testbed.launcher import TestbedLauncher
    from meshwright.workflows.session import Session
    from meshwright.workflows.train import RunOutcome

TestbedPath = Annotated[Path, typer.Argument(help="testbed.toml: a cluster and scale factors.")]
BedOption = Annotated[
    Path | None, typer.Option("--testbed", help="Emulate this cluster here (testbed.toml).")
]

testbed = typer.Typer(no_args_is_help=True, help="Emulate a mixed cluster on this machine.")
app.add_typer(testbed, name="testbed")


@testbed.command(context_settings={"ignore_unknown_options": True})
def run(
    bed_file: TestbedPath,
    command: Annotated[list[str], typer.Argument(help="After --: what to run.")],
    dry_run: Annotated[bool, typer.Option(help="Only print every system command.")] = False,
) -> None:
    """Set the emulated cluster up, run a command in it, and take it down.

    A verb of meshwright starts its own processes, one for each device of its plan. Any other
    command is started once for each device of the cluster, with the environment variables of a
    launcher.
    """
    from meshwright.cluster.spec import devices_of
    from meshwright.testbed.launcher import run_command, run_verb, shell_commands
    from meshwright.testbed.lifecycle import preview_testbed, running_testbed
    from meshwright.testbed.spec import load_testbed

    bed = load_testbed(bed_file)
    devices = tuple(device.name for device in devices_of(bed.cluster))
    own = Path(command[0]).name == "meshwright"
    if dry_run:
        drawn, lines = preview_testbed(bed)
        up = drawn.running
        undo = len(drawn.down) + len(drawn.groups)
        inside = [shlex.join(command)] if own else shell_commands(up, devices, command)
        for line in (*lines[: len(lines) - undo], *inside, *lines[len(lines) - undo :]):
            say(line)
        _say_absent(up.absent)
        return
    with running_testbed(bed) as up:
        _say_absent(up.absent)
        status = run_verb(up, command) if own else run_command(up, devices, command)
    raise typer.Exit(status)


@testbed.command()
def status() -> None:
    """Show what this machine can emulate, and which testbeds are set up on it."""
    from meshwright.testbed.capabilities import probe_capabilities
    from meshwright.testbed.cleanup import cleanup_folder, cleanup_records, is_orphaned
    from meshwright.testbed.lifecycle import new_identity

    able = probe_capabilities(f"{new_identity()}-probe")
    say(f"link rates: {able.shaper or 'no'}")
    say(f"link latencies: {'netem' if able.latency else 'no'}")
    quotas = f"cgroup v{able.quotas.version}" if able.quotas else "no"
    say(f"CPU quotas: {quotas}")
    for what, why in able.missing.items():
        say(f"no {what}: {why}")
    for traces in cleanup_records(cleanup_folder()):
        state = "left behind" if is_orphaned(traces) else f"process {traces.owner}"
        say(f"testbed {traces.identity}: {state}")


@testbed.command()
def down() -> None:
    """Remove what killed launchers have left behind, and nothing else."""
    from meshwright.testbed.cleanup import clean_up_orphans, cleanup_folder

    taken = clean_up_orphans(cleanup_folder())
    say(f"took down {', '.join(taken)}" if taken else "nothing was left behind")


def _say_absent(absent: tuple[str, ...]) -> None:
    for each in absent:
        say(f"not emulated: {each}", to_errors=True)


@contextmanager
def launcher_for(bed_file: Path | None) -> Iterator[TestbedLauncher | None]:
    """Yields a launcher on the testbed of `bed_file`, on the testbed in which this command runs, or
    None."""
    from meshwright.testbed.launcher import launcher_on_testbed
    from meshwright.testbed.lifecycle import current_testbed, running_testbed
    from meshwright.testbed.spec import load_testbed

    here = current_testbed()
    if bed_file is not None:
        with running_testbed(load_testbed(bed_file)) as up, launcher_on_testbed(up) as launcher:
            _say_absent(up.absent)
            yield launcher
    elif here is not None:
        with launcher_on_testbed(here) as launcher:
            yield launcher
    else:
        yield None


def profile_testbed(
    launcher: TestbedLauncher, settings: ProfileSettings, folder: Path, *, again: bool
) -> None:
    """Runs `profile` on a testbed: measures into a folder, and prints the links with their
    residuals."""
    from rich.console import Console

    from meshwright.errors import OptionError, Problem
    from meshwright.report.verification import fitted_links_table
    from meshwright.testbed.measurements import profile_on

    if folder.suffix:
        raise OptionError(Problem("--output", "", str(folder), "a folder, without a suffix"))
    found = profile_on(launcher, settings, folder, again=again)
    Console().print(fitted_links_table(found.links))
    say("as measured before: --again measures anew" if found.cached else "measured")
    say(f"plan with --cluster {found.cluster_file} --profile {found.profile_file}")


@contextmanager
def current_launcher(*, warm: bool) -> Iterator[TestbedLauncher | Launcher]:
    """Yields a launcher on the testbed in which this command runs, else on this machine. If `warm`,
    it imports what ranks need while the caller reads its files."""
    from meshwright.launch.local import Launcher

    with launcher_for(None) as bed, Launcher() as own:
        if warm:
            (bed.launcher if bed else own).preload()
        yield bed or own


def train_with_launcher(
    launcher: TestbedLauncher | Launcher,
    session: Session,
    plan: Plan,
    settings: RunSettings,
    folder: Path,
) -> RunOutcome:
    """Runs `train` with a launcher: on its testbed or on this machine."""
    from meshwright.launch.local import Launcher
    from meshwright.testbed.undisturbed_runs import train_on
    from meshwright.workflows.train import train_here

    if isinstance(launcher, Launcher):
        return train_here(session, plan, settings, folder, launcher=launcher)
    found = train_on(launcher, session, plan, settings, folder)
    if found.disturbed:
        share = f"others used {found.foreign_share:.0%} of the processor meanwhile"
        say(f"disturbed: {share}, in the best of {found.attempts} attempts", to_errors=True)
    return found.outcome


@app.command()
def verify(
    plan_file: PlanFile,
    against: Annotated[
        str, typer.Option(help="Rivals to train as well: dp, megatron, amp.")
    ] = "dp,megatron,amp",
    bed_file: BedOption = None,
    cluster: ClusterOption = None,
    profile: ProfileOption = None,
    steps: Annotated[int, typer.Option(min=3, help="Optimizer steps of each strategy.")] = 8,
    output: Annotated[Path, typer.Option("--output", "-o")] = Path("runs/verify"),
) -> None:
    """Train a few steps of a plan and of its rivals, and compare predicted with measured times,
    part by part."""
    from rich.console import Console

    from meshwright import files
    from meshwright.records import checked
    from meshwright.runtime.run_folder import RunSettings
    from meshwright.workflows.session import reopen_plan
    from meshwright.workflows.verify import verify_here

    session, found = reopen_plan(plan_file, cluster=cluster, profile=profile, runtime="meshwright")
    names = tuple(name for name in against.split(",") if name)
    told = {"options.steps": "--steps"}
    settings = checked(RunSettings, told, model=found.plan.model.source, options={"steps": steps})
    files.check_folder(output)
    console = Console(width=None if sys.stdout.isatty() else 160)
    with launcher_for(bed_file) as launcher:
        verify_here(session, found.plan, names, launcher, settings, output, console)
    say(f"wrote {output / 'report.html'}")
