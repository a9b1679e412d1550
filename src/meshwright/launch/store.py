"""Runs the store in which the ranks of a run meet, in a process of its own.

It is forked beside the ranks, so that it outlives each of them, and runs in the network namespace
of the first. The store is bound to one address. Its keys begin with a secret that only the run's
own processes know, and no value in it is ever unpickled.
"""

from __future__ import annotations

import json
import secrets
import signal
import socket
import sys
import time

from meshwright.errors import LaunchError, Problem
from meshwright.launch.fork_server import ProcessEvent, SpawnRequest
from meshwright.launch.supervise import STORE, ForkServer
from meshwright.records import record
from meshwright.runtime.failure import report_line
from meshwright.runtime.launch_variables import MASTER_ADDR, MASTER_PORT, TOKEN

START_SECONDS = 60.0


@record
class Rendezvous:
    """Says where the ranks of a run meet, and holds the secret by which they know each other."""

    address: str
    port: int
    token: str

    @property
    def environment(self) -> dict[str, str]:
        """Returns the environment variables that tell a rank how to reach the store."""
        return {MASTER_ADDR: self.address, MASTER_PORT: str(self.port), TOKEN: self.token}


def new_token() -> str:
    """Returns a new random secret."""
    return secrets.token_hex(16)


def open_store(
    server: ForkServer,
    address: str,
    *,
    port: int = 0,
    token: str | None = None,
    namespace: str | None = None,
) -> Rendezvous:
    """Starts a store that listens on `address` alone, on a free port if none is given.

    Raises LaunchError if the address is not one of this machine or the port is taken.
    """
    server.spawn(
        SpawnRequest(
            rank=STORE,
            environment={},
            namespace=namespace,
            module=__name__,
            arguments=(address, str(port)),
            log="",
        )
    )
    said = _first_word(server)
    if "port" not in said:
        raise LaunchError(
            Problem(
                "rendezvous",
                f"{address}:{port}",
                said.get("error", "no answer from the process that keeps the store"),
                "an address of this machine, and a port that is free",
                "correct the node's address in the cluster file, or choose another --port",
            )
        )
    return Rendezvous(address=address, port=int(said["port"]), token=token or new_token())


def _first_word(server: ForkServer) -> dict[str, str]:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        for event in server.events(deadline - time.monotonic()):
            if event.kind == "said":
                return dict(json.loads(event.said))
            return {"error": _ending(event)}
    return {}


def _ending(event: ProcessEvent) -> str:
    return event.said or f"the process that keeps the store {event.kind}: {event.status}"


def main() -> None:
    """Keeps the store until the process is ended."""
    address, port = sys.argv[1], int(sys.argv[2])
    try:
        family, *_, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(where[:2], family=family, backlog=4096)
    except OSError as failure:
        report_line(json.dumps({"error": f"{failure.strerror or failure}"}))
        raise
    port = listener.getsockname()[1]
    # Ranks that connect before PyTorch is imported here wait until it is.
    report_line(json.dumps({"port": port}))
    from torch._C._distributed_c10d import TCPStore

    kept = TCPStore(
        address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    while kept:
        signal.pause()
