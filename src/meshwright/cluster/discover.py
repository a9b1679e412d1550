"""The machine that this runs on, as a cluster of one node."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil

from meshwright.cluster.catalog import catalog
from meshwright.cluster.files import dump_cluster
from meshwright.cluster.machine import (
    Found,
    Gpu,
    inside_of,
    read_default_interface,
    read_gpus,
    read_speed,
    read_wiring,
    type_of,
)
from meshwright.cluster.spec import Cluster, DeviceType, Link, Node, Site
from meshwright.records import BytesPerSecond

_USUAL_NETWORK = Link(bandwidth=1.25e9, latency=50e-6)
"""10 Gbit/s Ethernet with TCP, where the machine does not tell."""

_HOST_SHARE = 0.9
"""Of the host's memory for training processes; the system keeps the rest."""


def discover() -> Cluster:
    """The GPUs of this machine, else its cores as processes of type `cpu`."""
    return describe(look())[0]


def discover_toml() -> str:
    """The text of a cluster file for this machine, with comments on what was not measured."""
    cluster, notes = describe(look())
    head = ("Found on this machine. Figures are nominal: `meshwright profile` measures.", *notes)
    return "".join(f"# {line}\n" for line in head) + "\n" + dump_cluster(cluster)


def describe(found: Found) -> tuple[Cluster, tuple[str, ...]]:
    """The cluster that a found machine is, and what its user should know about the figures."""
    types, notes = _types(found)
    names = tuple(kind.name for kind in types)
    if found.gpus:
        inside, origin = inside_of(found, names)
        notes += [origin] if len(types) > 1 else []
    else:
        inside = catalog()["cpu"].inside
        notes.append("No GPU was found: one process per core.")
    network = _USUAL_NETWORK
    if found.network:
        network = replace(network, bandwidth=found.network)
    else:
        notes.append("network: this machine does not tell its speed; 10 Gbit/s is ASSUMED.")
    node = Node(name=found.name, site="main", devices=names, inside=inside, network=network)
    cluster = Cluster(
        name=found.name,
        types={kind.name: kind for kind in sorted(types, key=lambda kind: kind.name)},
        nodes=(node,),
        sites=(Site(name="main"),),
    )
    return cluster, tuple(dict.fromkeys(notes))


def _types(found: Found) -> tuple[list[DeviceType], list[str]]:
    if found.gpus:
        typed = [type_of(gpu) for gpu in found.gpus]
        return [kind for kind, _ in typed], [note for _, note in typed if note]
    cpu = catalog()["cpu"].type
    memory = int(_HOST_SHARE * found.memory) // found.cores >> 20 << 20
    note = f"memory: {_HOST_SHARE:.0%} of the host's, divided by its {found.cores} cores"
    kind = replace(cpu, memory=memory, source=f"{note}. {cpu.source}")
    return [kind] * found.cores, []


def look() -> Found:
    """Ask the machine: PyTorch, else nvidia-smi, for its GPUs; the kernel for the rest."""
    gpus = _torch_gpus() or read_gpus(
        _output("nvidia-smi", "--query-gpu=name,memory.total,compute_cap", _CSV)
    )
    cores: int = psutil.cpu_count(logical=False) or 1
    if sys.platform == "linux":
        cores = min(cores, len(os.sched_getaffinity(0)))
    return Found(
        name=re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname().partition(".")[0]).strip("-_")
        or "machine",
        gpus=gpus,
        cores=cores,
        memory=_host_memory(),
        wiring=read_wiring(_output("nvidia-smi", "topo", "-m")) if len(gpus) > 1 else None,
        network=_network_speed(),
    )


_CSV = "--format=csv,noheader,nounits"


def _torch_gpus() -> tuple[Gpu, ...]:
    try:
        import torch
    except ImportError:
        return ()
    if not torch.cuda.is_available():
        return ()
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    # On ROCm major and minor count AMD's generations, not CUDA's.
    is_cuda = torch.version.cuda is not None
    return tuple(
        Gpu(
            name=each.name,
            memory=each.total_memory,
            capability=(each.major, each.minor) if is_cuda else None,
        )
        for each in found
    )


def _output(*command: str) -> str:
    """What a tool prints; nothing where it is not installed or fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout if done.returncode == 0 else ""


def _host_memory() -> int:
    """Bytes of memory, or of the control group's limit where that is less."""
    limits: list[int] = [psutil.virtual_memory().total]
    for place in ("memory.max", "memory/memory.limit_in_bytes"):
        text = _file(Path("/sys/fs/cgroup") / place)
        limits += [int(text)] if text.strip().isdigit() else []
    return min(limits)


def _network_speed() -> BytesPerSecond | None:
    interface = read_default_interface(_file(Path("/proc/net/route")))
    return read_speed(_file(Path("/sys/class/net") / interface / "speed")) if interface else None


def _file(path: Path) -> str:
    """A file of the kernel's; nothing where this machine has none or will not tell."""
    try:
        return path.read_text()
    except OSError:
        return ""
