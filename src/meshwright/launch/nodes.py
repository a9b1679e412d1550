"""Runs over several machines: a launcher on each node starts the ranks of that node.

They meet in one store, which the launcher of the first rank's node keeps. The store listens on that
node's address alone, at a port that all nodes know. All its keys begin with a secret that is kept
in the run folder, in a file that only its owner can read.
"""

from __future__ import annotations

import os
import shlex
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from meshwright.cluster.spec import Cluster, Endpoint, node_of
from meshwright.errors import LaunchError, Problem
from meshwright.launch.local import Launcher, MetricsLine, ProcessPlacement
from meshwright.launch.lock import lock_folder
from meshwright.launch.store import Rendezvous, new_token
from meshwright.launch.supervise import describe_exit, exit_status, has_failed
from meshwright.plan.files import load_plan
from meshwright.records import dumps, fingerprint, load, record
from meshwright.runtime.launch_variables import TOKEN
from meshwright.runtime.run_folder import PLAN, load_settings

NODES_FILE = "nodes.json"
PORT = 29500


@record
class RunNodes:
    """Lists the machines of a run, and says where its ranks meet; nodes.json in the run folder
    holds it."""

    nodes: dict[str, Endpoint]
    """Endpoints by node name, in the order of their first ranks."""
    port: int
    token: str


def write_nodes(folder: Path, devices: Sequence[str], cluster: Cluster, port: int) -> None:
    """Writes down where the ranks of a prepared run will meet, readable by the owner alone."""
    known = cluster.endpoints or {}
    names = dict.fromkeys(map(node_of, devices))
    nodes = {name: known.get(name, Endpoint()) for name in names}
    path = folder / NODES_FILE
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_text(dumps(RunNodes(nodes=nodes, port=port, token=new_token())))


def launch_commands(devices: Sequence[str], folder: Path) -> list[str]:
    """Returns the command to run on each node; every node must be able to read the run folder."""
    names = dict.fromkeys(map(node_of, devices))
    return [f"meshwright launch {shlex.quote(str(folder))} --node {name}" for name in names]


def launch_node(folder: Path, node: str, tell: Callable[[MetricsLine], None]) -> None:
    """Starts the ranks of one node of a prepared run, and waits for them.

    On the node of the first rank, `tell` gets the metrics. Raises LaunchError if the node has no
    ranks, if its address is not one of this machine, or if the first node's address cannot be
    resolved; also whatever `Launcher.run` raises.
    """
    settings = load_settings(folder, error=LaunchError)
    plan = load_plan(folder / PLAN)
    run = load(folder / NODES_FILE, RunNodes, error=LaunchError)
    rendezvous, place = _meeting(run, node, str(folder))
    first = next(iter(run.nodes))
    with lock_folder(folder, node), Launcher(place) as launcher:
        launcher.run(
            plan.devices,
            folder,
            on_metrics=tell if node == first else lambda _: None,
            timeout_seconds=settings.options.timeout_seconds,
            node=node,
            rendezvous=rendezvous,
        )


def launch_command(
    devices: Sequence[str], cluster: Cluster | None, node: str, command: Sequence[str], port: int
) -> int:
    """Runs a command once for each of a node's devices, as the ranks of one run over all nodes.
    Returns an exit status as a shell does. Raises LaunchError as `launch_node` does."""
    known = (cluster.endpoints if cluster else None) or {}
    names = dict.fromkeys(map(node_of, devices))
    nodes = {name: known.get(name, Endpoint()) for name in names}
    run = RunNodes(nodes=nodes, port=port, token=_shared_token(devices, command))
    rendezvous, place = _meeting(run, node, "the devices")
    with Launcher(place) as launcher:
        events = launcher.run_command(devices, command, node=node, rendezvous=rendezvous)
    for event in filter(has_failed, events):
        sys.stderr.write(f"rank {event.rank} {describe_exit(event.status)}\n")
    return exit_status(events)


def _shared_token(devices: Sequence[str], command: Sequence[str]) -> str:
    """Returns the user's secret, the same on all nodes, or else a fingerprint that keeps runs
    apart."""
    return os.environ.get(TOKEN) or fingerprint([[*devices], [*command]])


def _meeting(
    run: RunNodes, node: str, source: str
) -> tuple[Rendezvous, Callable[[str], ProcessPlacement]]:
    """Returns where all ranks of a run meet, and the function that places the ranks of one node."""
    if node not in run.nodes:
        wanted = f"a node of the run: {', '.join(run.nodes)}"
        raise LaunchError(Problem(source, "--node", repr(node), wanted))
    first = next(iter(run.nodes))
    address = address_of(first, run.nodes[first])
    interface = interface_of(node, run.nodes[node])

    def place(device: str) -> ProcessPlacement:
        own = node_of(device)
        return ProcessPlacement(
            node=own, address=address, interface=interface if own == node else None
        )

    return Rendezvous(address=address, port=run.port, token=run.token), place


def address_of(node: str, endpoint: Endpoint) -> str:
    """Returns the address of a node in the network that training uses. Raises LaunchError if its
    name cannot be resolved here."""
    name = endpoint.address or node
    try:
        return str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as failure:
        raise LaunchError(
            Problem(
                f"node {node}",
                "address",
                f"{name!r}: {failure.strerror or failure}",
                "a host name or an IP address that the other nodes reach",
                'write it into the cluster file: [[node]] address = "10.0.0.5"',
            )
        ) from None


def interface_of(node: str, endpoint: Endpoint) -> str:
    """Returns the network interface of this machine that a node's ranks use: the one that the
    cluster file names, else the one with the node's address. Raises LaunchError if this machine has
    no such interface."""
    there = {
        name: [each.address.partition("%")[0] for each in addresses]
        for name, addresses in psutil.net_if_addrs().items()
    }
    if endpoint.interface is not None and endpoint.interface in there:
        return endpoint.interface
    address = "" if endpoint.interface is not None else address_of(node, endpoint)
    for name, addresses in there.items():
        if address in addresses:
            return str(name)
    known = "; ".join(f"{name} {' '.join(addresses)}" for name, addresses in there.items())
    raise LaunchError(
        Problem(
            f"node {node}",
            "interface" if endpoint.interface is not None else "address",
            endpoint.interface or address,
            f"one that this machine has: {known}",
            "start it on the node itself, or correct [[node]] address in the cluster file",
        )
    )
