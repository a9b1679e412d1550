"""Counts the accelerators that PyTorch sees on this machine, in a short-lived process.

The launcher itself need not import PyTorch for it, and the process that ranks are forked from must
not be the one that talks to the driver.
"""

from __future__ import annotations

import json

from meshwright.errors import LaunchError, Problem
from meshwright.launch.fork_server import SpawnRequest
from meshwright.launch.supervise import ForkServer, run_to_end
from meshwright.runtime.failure import report_line

RANK = -2
"""Pseudo rank of the process that counts."""


def accelerators(server: ForkServer, timeout_seconds: float) -> int:
    """Returns the number of CUDA devices of this machine. Raises LaunchError if there is no answer,
    or a process is stopped for `timeout_seconds`."""
    request = SpawnRequest(rank=RANK, environment={}, module=__name__, arguments=(), log="")
    for event in run_to_end(server, [request], timeout_seconds=timeout_seconds):
        if event.kind == "said":
            return int(json.loads(event.said))
    raise LaunchError(Problem("this machine", "accelerators", "no answer", "their number"))


def main() -> None:
    """Reports the number of CUDA devices to the launcher."""
    import torch

    report_line(json.dumps(torch.cuda.device_count()))
