"""Names the environment variables by which a launcher informs the processes that it starts."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import psutil

RANK, WORLD_SIZE, LOCAL_RANK = "RANK", "WORLD_SIZE", "LOCAL_RANK"
LOCAL_WORLD_SIZE = "LOCAL_WORLD_SIZE"
MASTER_ADDR, MASTER_PORT = "MASTER_ADDR", "MASTER_PORT"
REQUIRED = (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT)
"""Variables that every launcher sets: torchrun, srun with a wrapper, and our own."""

TOKEN = "MESHWRIGHT_TOKEN"
"""Secret of the run, with which its keys in the store begin; only our own launcher sets it."""
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""The network interface on which the backends of torch.distributed connect and listen."""
REPORT = "MESHWRIGHT_REPORT_FD"
"""File descriptor of the pipe in which a process may send lines to its launcher."""

FOR_PLAIN_TORCH = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
"""Variables that make scripts which call torch.distributed.init_process_group themselves use the
launcher's store, instead of opening one on every interface."""

LOOPBACK = "127.0.0.1"
"""Address at which the ranks of a run on one machine meet."""


def interface_variables(interface: str | None, environ: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables that restrict torch.distributed to one network interface (None: the
    loopback), except those that the user has set."""
    chosen = interface or _loopback_interface()
    return {variable: chosen for variable in INTERFACES if variable not in environ}


def _loopback_interface() -> str:
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == LOOPBACK for each in addresses):
            return str(name)
    return "lo0" if sys.platform == "darwin" else "lo"
