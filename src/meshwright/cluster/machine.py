"""What the tools of a machine say about it: their text in, records out."""

from __future__ import annotations

import re

from meshwright.cluster.catalog import catalog, type_reported_as
from meshwright.cluster.spec import DeviceType, Link
from meshwright.records import Bytes, BytesPerSecond, record

RESERVED_BYTES = 2**30
"""CUDA context, NCCL buffers and the allocator's rounding: the catalogue takes off the same."""

# Per direction: NVLink 2 to 4 have 25 GB/s a lane, NVLink 5 (Blackwell) 50 (NVIDIA datasheets).
_NVLINK_LANE: BytesPerSecond = 25e9
_NVLINK5_LANE: BytesPerSecond = 50e9

_BY_CAPABILITY = (
    ((12, 0), "RTX4090"),
    ((10, 0), "B200"),
    ((9, 0), "H100"),
    ((8, 9), "L4"),
    ((8, 6), "A10G"),
    ((8, 0), "A100-40"),
    ((7, 5), "T4"),
)
"""A catalogued relative for each NVIDIA generation, by least compute capability."""


@record
class Gpu:
    """One GPU as its driver reports it."""

    name: str
    memory: Bytes
    """Bytes in all."""
    capability: tuple[int, int] | None = None
    """CUDA compute capability."""


@record
class Found:
    """One machine as it was found."""

    name: str
    gpus: tuple[Gpu, ...] = ()
    cores: int = 1
    memory: Bytes = 0
    """Host memory in bytes."""
    wiring: str | None = None
    """The weakest connection between two GPUs in the words of `nvidia-smi topo`: NV12, PIX, SYS."""
    network: BytesPerSecond | None = None
    """Of the interface that the default route uses; None: not told."""


def read_gpus(text: str) -> tuple[Gpu, ...]:
    """GPUs in the output of `nvidia-smi --query-gpu=name,memory.total,compute_cap
    --format=csv,noheader,nounits`. Lines that say otherwise ("No devices were found") hold none.
    """
    gpus = []
    for line in text.splitlines():
        match = re.fullmatch(r"\s*(.+?),\s*(\d+)\s*(?:,\s*(\d+)\.(\d+)\s*)?", line)
        if match:
            capability = (int(match[3]), int(match[4])) if match[3] else None
            gpus.append(Gpu(name=match[1], memory=int(match[2]) * 2**20, capability=capability))
    return tuple(gpus)


_WEAKEST_FIRST = ("SYS", "NODE", "PHB", "PXB", "PIX")


def read_wiring(text: str) -> str | None:
    """The weakest connection between two GPUs in the output of `nvidia-smi topo -m`."""
    rows = [re.sub(r"\x1b\[[0-9;]*m", "", line).split() for line in text.splitlines()]
    gpus = [row for row in rows if row and re.fullmatch(r"GPU\d+", row[0]) and "X" in row]
    cells = {cell for row in gpus for cell in row[1 : len(gpus) + 1]} - {"X"}
    for weak in _WEAKEST_FIRST:
        if weak in cells:
            return weak
    lanes = [int(match[1]) for cell in cells if (match := re.fullmatch(r"NV(\d+)", cell))]
    return f"NV{min(lanes)}" if lanes else None


def read_default_interface(routes: str) -> str | None:
    """The interface of the default route in the text of `/proc/net/route`."""
    for line in routes.splitlines()[1:]:
        columns = line.split()
        if len(columns) > 7 and columns[1] == columns[7] == "00000000":
            return columns[0]
    return None


def read_speed(text: str) -> BytesPerSecond | None:
    """Bytes per second from `/sys/class/net/*/speed` (Mbit/s; -1 where it is not known)."""
    speed = text.strip()
    return int(speed) * 1e6 / 8 if re.fullmatch(r"[1-9]\d*", speed) else None


def type_of(gpu: Gpu) -> tuple[DeviceType, str]:
    """The type of a GPU, and what must be said about it (empty if its figures are known).

    A GPU that the catalogue does not know becomes a new type with the figures of a
    relative of its generation, marked as guessed; only its memory is its own.
    """
    known = type_reported_as(gpu.name)
    usable = max(gpu.memory - RESERVED_BYTES, gpu.memory // 2)
    if known:
        kind = catalog()[known].type
        if usable >= 0.9 * kind.memory:
            return kind, ""
        note = f"{gpu.name} reports {gpu.memory / 2**30:.4g} GiB: less than a whole {known}"
        return _like(kind, f"{known}-part", usable, note), note
    relative = next(
        (name for least, name in _BY_CAPABILITY if least <= (gpu.capability or (0, 0))), "T4"
    )
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", gpu.name).strip("-._") or "unknown"
    note = f"{gpu.name} is not in the catalogue: all but its memory is GUESSED to be as {relative}"
    return _like(catalog()[relative].type, name, usable, note), note


def _like(kind: DeviceType, name: str, memory: Bytes, source: str) -> DeviceType:
    return DeviceType(
        name=name,
        memory=memory,
        memory_bandwidth=kind.memory_bandwidth,
        peak=kind.peak,
        matmul_efficiency=kind.matmul_efficiency,
        attention_efficiency=kind.attention_efficiency,
        memory_efficiency=kind.memory_efficiency,
        source=f"{source}. Profile to know.",
    )


def inside_of(found: Found, type_names: tuple[str, ...]) -> tuple[Link, str]:
    """The link between the GPUs of a machine, and where it is from."""
    known = [catalog()[name].inside for name in type_names if name in catalog()]
    slowest = min(known, key=lambda link: link.bandwidth, default=catalog()["T4"].inside)
    if found.wiring is None:
        return slowest, "inside: as the catalogue has it for this type, not asked of the machine"
    if found.wiring.startswith("NV"):
        blackwell = any((gpu.capability or (0, 0)) >= (10, 0) for gpu in found.gpus)
        lane = _NVLINK5_LANE if blackwell else _NVLINK_LANE
        bandwidth = int(found.wiring[2:]) * lane
        return Link(bandwidth=bandwidth, latency=8e-6), f"inside: NVLink, {found.wiring}"
    pcie = min(slowest.bandwidth, catalog()["A10G"].inside.bandwidth)
    shared = found.wiring not in ("PIX", "PXB")
    way = "through the host, shared" if shared else "through a switch"
    link = Link(bandwidth=pcie, latency=10e-6, shared=shared)
    return link, f"inside: PCIe {way} ({found.wiring})"
