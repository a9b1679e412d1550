"""Connects the processes of a run, listening on no more addresses than necessary.

Processes that our own launcher has started meet in the store that it hosts: a TCPStore that is
bound to one address (the loopback if all are on one machine) and whose keys begin with a secret of
the run. Processes that were started otherwise meet at MASTER_ADDR, the only address on which the
first rank listens, if it can. Nothing read from a store is unpickled, here or in torch.distributed.
Under torchrun this is not possible: its agent hosts a store on every interface and unpickles what
it reads there, so a warning is given.
"""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

# Its functions keep the default group that stands when it is first imported as a default argument.
# torch.optim imports it, so a run's group would never be freed, and the group's threads, still
# there when the interpreter ends, can abort the process.
import torch.distributed.nn
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from meshwright.errors import LaunchError, Problem, TrainingError
from meshwright.runtime.launch_variables import (
    LOCAL_WORLD_SIZE,
    LOOPBACK,
    MASTER_ADDR,
    MASTER_PORT,
    TOKEN,
    WORLD_SIZE,
    interface_variables,
)

TORCHRUN = (
    "torchrun keeps a store that listens on every interface of this machine and unpickles what it "
    "finds there: whoever reaches its port runs code as you (see SECURITY.md). `meshwright train`, "
    "`meshwright launch` and `meshwright.launch(plan)` start processes without that"
)


class PeerLost(TrainingError):  # noqa: N818 - named for what happened
    """Is raised on a rank that works well when it finds that another one has gone."""


def join_run(
    rank: int,
    size: int,
    device: torch.device,
    timeout: timedelta,
    environ: Mapping[str, str] = os.environ,
) -> None:
    """Waits for all other ranks and makes them torch.distributed's default group.

    On GPUs gloo is available beside NCCL, for data on the host: timelines, names, barriers. Raises
    LaunchError if the address cannot be reached, PeerLost with the missing ranks after `timeout`.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    _choose_interface(environ)
    try:
        store = _store(rank, size, timeout, environ)
        _meet(store, rank, size, timeout.total_seconds())
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    except (RuntimeError, ValueError) as failure:
        address = f"{environ[MASTER_ADDR]}:{environ[MASTER_PORT]}"
        found = f"{address}, where {size} processes did not meet: {failure}"
        wanted = "an address that every process reaches, and all processes started"
        raise LaunchError(
            Problem("environment", f"{MASTER_ADDR}, {MASTER_PORT}", found, wanted)
        ) from failure


def _store(rank: int, size: int, timeout: timedelta, environ: Mapping[str, str]) -> Store:
    address, port = environ[MASTER_ADDR], int(environ[MASTER_PORT])
    if TOKEN in environ:
        return PrefixStore(environ[TOKEN], TCPStore(address, port, timeout=timeout))
    if environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        if rank == 0:
            warnings.warn(TORCHRUN, stacklevel=2)
        attempt = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return PrefixStore(f"meshwright/{attempt}", TCPStore(address, port, timeout=timeout))
    if rank:
        return TCPStore(address, port, size, timeout=timeout)
    listener = _listener(address, port)
    return TCPStore(
        address,
        port,
        size,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=None if listener is None else listener.detach(),
    )


def _listener(address: str, port: int) -> socket.socket | None:
    """Opens a socket that listens on one address. Returns None if the address is not this
    machine's, as behind network address translation: the store must then listen on all."""
    with suppress(OSError):
        family, kind, protocol, _, where = socket.getaddrinfo(
            address, port, type=socket.SOCK_STREAM
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen()
        return listener
    return None


def _meet(store: Store, rank: int, size: int, seconds: float) -> None:
    """Waits until all ranks have arrived. Raises PeerLost, naming those that have not."""
    store.set(f"here/{rank}", "yes")
    if store.add("here", 1) == size:
        store.set("complete", "yes")
    try:
        store.wait(["complete"])
    except RuntimeError as failure:
        absent = [other for other in range(size) if not store.check([f"here/{other}"])]
        who = f"rank{'s' * (len(absent) > 1)} {', '.join(map(str, absent))}"
        raise PeerLost(
            Problem(
                who,
                "start-up",
                f"not here when rank {rank} had waited for {seconds:g} s",
                "every rank to start and to meet the others",
                "look into the logs of the absent ranks, or start those of the other nodes",
            )
        ) from failure


def _choose_interface(environ: Mapping[str, str]) -> None:
    """Restricts gloo and NCCL to the loopback if all ranks are on this machine, whoever started
    them. What the user or a launcher has set is kept."""
    together = environ.get(LOCAL_WORLD_SIZE, "") == environ[WORLD_SIZE]
    if together or environ[MASTER_ADDR] in (LOOPBACK, "localhost", "::1"):
        os.environ.update(interface_variables(None, os.environ))
