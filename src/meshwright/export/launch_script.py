"""Writes the script that starts a tool's processes, each rank on the device that the plan gives
it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from itertools import groupby

from meshwright.cluster.spec import node_of
from meshwright.export.grid import RegularGrid
from meshwright.export.writing import line_comment, shell_default

PORT = 29500


def stage_major(grid: RegularGrid) -> tuple[str, ...]:
    """Returns the devices in rank order if stages are the slowest axis: stage, replica, tensor
    index."""
    return tuple(device for mesh in grid.meshes for device in mesh.members)


def replica_major(grid: RegularGrid) -> tuple[str, ...]:
    """Returns the devices in rank order if replicas are the slowest axis: replica, stage, tensor
    index."""
    return tuple(
        device
        for replica in range(grid.data)
        for mesh in grid.meshes
        for device in mesh.at("data", replica)
    )


def by_node(order: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """Groups the consecutive ranks on one node, as (node, devices)."""
    return [(node, tuple(devices)) for node, devices in groupby(order, key=node_of)]


def is_node_by_node(order: Sequence[str]) -> bool:
    """True if the ranks of every node are consecutive, as torchrun numbers them."""
    nodes = [node for node, _ in by_node(order)]
    return len(nodes) == len(set(nodes))


def visible_devices(devices: Sequence[str]) -> str:
    """Returns the indices of one node's devices for CUDA_VISIBLE_DEVICES, local rank 0 first, as a
    shell word."""
    return shlex.quote(",".join(device.rpartition(":")[2] for device in devices))


def launch_script(order: Sequence[str], command: str, *, environment: str = "") -> str:
    """Returns a script that starts `command` (the arguments of `torchrun` or `python`) on the node
    that it is given; further arguments go to the command.

    If the ranks of a node are not consecutive, torchrun cannot number them so, and the script
    starts every process with its own RANK.
    """
    nodes = list(dict.fromkeys(node_of(device) for device in order))
    lines = [
        "#!/usr/bin/env bash",
        "# Start it on every node, in this folder: bash launch.sh NODE [more arguments]",
        line_comment(
            f"NODE: {shlex.join(nodes)} (names that the others can reach; else set MASTER_ADDR)"
        ),
        "set -euo pipefail",
        f'export MASTER_ADDR="${{MASTER_ADDR:-{shell_default(nodes[0])}}}"',
        f'export MASTER_PORT="${{MASTER_PORT:-{PORT}}}"',
        *([f"export {environment}"] if environment else []),
        'node="${1:?the name of this node}"; shift',
        'case "$node" in',
    ]
    start = _torchrun if is_node_by_node(order) else _processes
    for index, node in enumerate(nodes):
        lines += [
            f"  {shlex.quote(node)})",
            *start(order, node, index, len(nodes), command),
            "    ;;",
        ]
    lines += ['  *) echo "no ranks on $node" >&2; exit 2 ;;', "esac"]
    return "\n".join(lines) + "\n"


def _torchrun(order: Sequence[str], node: str, index: int, nodes: int, command: str) -> list[str]:
    devices = [device for device in order if node_of(device) == node]
    return [
        f"    CUDA_VISIBLE_DEVICES={visible_devices(devices)} torchrun --nnodes={nodes} \\",
        f"      --node-rank={index} --nproc-per-node={len(devices)} \\",
        '      --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" \\',
        f'      {command} "$@"',
    ]


def _processes(
    order: Sequence[str], node: str, _index: int, _nodes: int, command: str
) -> list[str]:
    ranks = [(rank, device) for rank, device in enumerate(order) if node_of(device) == node]
    lines = [
        f"    export CUDA_VISIBLE_DEVICES={visible_devices([device for _, device in ranks])}",
        f"    export WORLD_SIZE={len(order)} LOCAL_WORLD_SIZE={len(ranks)}",
    ]
    lines += [
        f'    RANK={rank} LOCAL_RANK={local} python {command} "$@" &'
        for local, (rank, _) in enumerate(ranks)
    ]
    return [*lines, '    for process in $(jobs -p); do wait "$process"; done']
