"""Runs a user's own script as the processes of a plan: `meshwright.launch(plan)`."""

from __future__ import annotations

import os
import sys

from meshwright.errors import LaunchError, Problem
from meshwright.launch.local import Launcher
from meshwright.launch.supervise import describe_exit, exit_status, has_failed
from meshwright.plan.spec import Plan
from meshwright.runtime.launch_variables import RANK


def launch(plan: Plan) -> None:
    """Starts the running script again as the plan's processes on this machine, and exits with their
    status.

    In a process that a launcher has started (ours, torchrun, or srun with its variables set) this
    does nothing: the script goes on as one of the ranks. Raises LaunchError if no script is
    running.
    """
    if RANK in os.environ:
        return
    if hasattr(sys, "ps1") or "ipykernel" in sys.modules:
        wanted = "a script that can be started again, once for each device"
        mend = "write the training into a file, and run it with python"
        raise LaunchError(Problem("launch", "", "an interactive session", wanted, mend))
    with Launcher() as launcher:
        events = launcher.run_command(plan.devices, (sys.executable, *sys.orig_argv[1:]))
    for event in filter(has_failed, events):
        if event.status < 0:
            sys.stderr.write(f"rank {event.rank} {describe_exit(event.status)}\n")
    sys.exit(exit_status(events))
