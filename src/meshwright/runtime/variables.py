"""What a launcher tells the processes that it starts, as environment variables."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import psutil

RANK, WORLD_SIZE, LOCAL_RANK = "RANK", "WORLD_SIZE", "LOCAL_RANK"
LOCAL_WORLD_SIZE = "LOCAL_WORLD_SIZE"
MASTER_ADDR, MASTER_PORT = "MASTER_ADDR", "MASTER_PORT"
REQUIRED = (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT)
"""Those that every launcher sets: torchrun, srun with a wrapper, and our own."""

TOKEN = "MESHWRIGHT_TOKEN"
"""A secret of the run, with which its keys in the store begin. Only our own launcher sets it."""
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""The network interface over which the backends of torch.distributed talk to others, and listen."""
REPORT = "MESHWRIGHT_REPORT_FD"
"""The pipe in which a process may say a line to its launcher."""

FOR_PLAIN_TORCH = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
"""Scripts that call torch.distributed.init_process_group themselves then look for the launcher's
store, in place of opening one on every interface."""

LOOPBACK = "127.0.0.1"
"""Where the ranks of a run on one machine meet."""


def kept_to(interface: str | None, environ: Mapping[str, str]) -> dict[str, str]:
    """What keeps torch.distributed to one network interface (None: to the loopback), as far as the
    user has not chosen one."""
    chosen = interface or _loopback_interface()
    return {variable: chosen for variable in INTERFACES if variable not in environ}


def _loopback_interface() -> str:
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == LOOPBACK for each in addresses):
            return str(name)
    return "lo0" if sys.platform == "darwin" else "lo"
