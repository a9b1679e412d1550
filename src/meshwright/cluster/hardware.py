"""Turns the hardware found in one machine into device types (from GPUs) and links (from wiring and
network)."""

from __future__ import annotations

import re
from dataclasses import replace

from meshwright.cluster.catalog import catalog, type_reported_as
from meshwright.cluster.estimate import DriverFigures, estimated_type, untold
from meshwright.cluster.spec import DeviceType, Islands, Link, LinkKind
from meshwright.errors import MachineError, Problem
from meshwright.records import Bytes, BytesPerSecond, record
from meshwright.text import printable

RESERVED_BYTES = 2**30
"""Bytes kept for the CUDA context, NCCL buffers and the allocator's rounding; the catalogue's
memory figures leave out the same."""

# Bandwidth of one lane per direction: 25 GB/s for NVLink 2 to 4, 50 GB/s for NVLink 5 (Blackwell;
# NVIDIA datasheets).
_NVLINK_LANE: BytesPerSecond = 25e9
_NVLINK5_LANE: BytesPerSecond = 50e9

_LEAST, _MOST = 0.97, 1.05
"""Range of a card's memory relative to the catalogue's; a card outside is another model of the same
name."""
_FULL_POWER = 0.95
"""Share of a card's default power limit below which it becomes a device type of its own."""
_SLICE = re.compile(r"(?:(\d+)c\.)?(\d+)g\.(\d+)gb")
_UNIFIED = re.compile(r"nvgpu|Tegra|Jetson|\bOrin\b|\bXavier\b|\bThor\b|\bGB10\b")
_VIRTUAL = re.compile(r"-\d+[ABCQ]$")


BY_HAND = (
    "write its datasheet into a cluster file, as [device.NAME] with memory, memory_bandwidth and "
    "peak; or install PyTorch or nvidia-ml-py here, which tell what an estimate needs"
)


@record
class Gpu:
    """Describes one GPU as its driver reports it, or one slice of a GPU."""

    name: str
    memory: Bytes
    """Total memory in bytes, before anything is reserved."""
    capability: tuple[int, int] | None = None
    """CUDA compute capability."""
    slice: str | None = None
    """MIG profile of a slice, `3g.20gb`."""
    whole: Bytes | None = None
    """Total memory of the whole GPU in bytes, for a slice, if it is reported."""
    watts: float | None = None
    """Power limit in watts, if it is reported."""
    usual_watts: float | None = None
    """Default power limit in watts."""
    figures: DriverFigures = DriverFigures()
    """What its driver tells of its speed."""


@record
class MachineHardware:
    """Describes the hardware of one machine as it was found."""

    name: str
    gpus: tuple[Gpu, ...] = ()
    cores: int = 1
    memory: Bytes = 0
    """Host memory in bytes."""
    wiring: str | None = None
    """The weakest connection between two GPUs, in the terms of `nvidia-smi topo`: NV12, PIX,
    SYS."""
    islands: tuple[tuple[int, ...], ...] = ()
    """Indices of the GPUs of each group that is connected better than by `wiring`."""
    island_wiring: str | None = None
    """The weakest connection inside these groups; in a mesh, the word NVLink."""
    mesh_lanes: int | None = None
    """NVLinks of each GPU, where rings over NVLinks alone pass all GPUs though not every two are
    neighbours; None elsewhere."""
    network: Link | None = None
    """Network that training uses; None if no speed is reported."""
    notes: tuple[str, ...] = ()
    """Notes for the user on how the machine was found."""
    cpus: bool = False
    """True if the cluster shall consist of its cores even if it has GPUs."""


def is_unified(name: str) -> bool:
    """True if a GPU of this name shares the memory of its host."""
    return bool(_UNIFIED.search(name))


def not_known(gpu: Gpu) -> str:
    """Says what is missing for the device type of a GPU; empty if the catalogue holds it, or its
    driver tells enough for an estimate."""
    if type_reported_as(gpu.name) is not None:
        return ""
    missing = untold(gpu.name, gpu.capability, gpu.figures)
    what = ", ".join(missing)
    if not missing:
        return ""
    return (
        f"{printable(gpu.name) or 'a GPU without a name'} ({gpu.memory / 2**30:.4g} GiB) is not in "
        f"the catalogue, and for an estimate its driver tells too little: no {what}"
    )


def known_memory(name: str) -> Bytes | None:
    """Returns the total bytes of a GPU whose name is in the catalogue; None for others."""
    known = type_reported_as(name)
    return catalog()[known].type.memory + RESERVED_BYTES if known else None


def mig_profile_in(name: str) -> str | None:
    """Returns the MIG profile in a name that CUDA reports: `3g.20gb` in `NVIDIA A100-SXM4-40GB MIG
    3g.20gb`."""
    _, mig, profile = name.partition(" MIG ")
    return profile.strip() if mig and _SLICE.match(profile.strip()) else None


def device_type_of(gpu: Gpu) -> tuple[DeviceType, str]:
    """Returns the device type of a GPU, and a note on figures that are not known (empty if all
    are).

    A GPU that the catalogue does not contain becomes a new type with figures that are estimated
    from what its driver tells. Slices, cards with unusual memory and cards with a lowered power
    limit become types of their own, with names that say so. Raises MachineError for a GPU of which
    too little is told.
    """
    gpu = replace(gpu, name=printable(gpu.name))
    profile = gpu.slice or mig_profile_in(gpu.name)
    usable = max(gpu.memory - RESERVED_BYTES, gpu.memory // 2)
    whole = max((gpu.whole or 0) - RESERVED_BYTES, usable)
    known = type_reported_as(gpu.name, None if profile and not gpu.whole else whole)
    name, notes = known or _stem(gpu.name), []
    if known is not None:
        base = catalog()[known].type
    elif missing := not_known(gpu):
        wanted = "figures of its datasheet"
        raise MachineError(Problem(gpu.name, "memory_bandwidth, peak", missing, wanted, BY_HAND))
    else:
        watts = gpu.usual_watts or gpu.watts
        base, how = estimated_type(name, gpu.name, usable, gpu.capability, gpu.figures, watts)
        notes.append(f"{gpu.name} is not in the catalogue: its figures are {how}")
    if profile:
        base, note = _slice(base, gpu, profile)
        name, notes = f"{name}-{_clean(profile)}", [*notes, note]
    elif known is None or not _LEAST <= usable / base.memory <= _MOST:
        size = f"{gpu.memory / 2**30:.0f}GiB"
        name = name if re.search(r"\d ?GB\b", gpu.name) and not known else f"{name}-{size}"
        notes += [f"{gpu.name} reports {gpu.memory / 2**30:.4g} GiB: not as the {known} of the "
                  "catalogue"] if known else []  # fmt: skip
    if _VIRTUAL.search(gpu.name):
        notes.append(f"{gpu.name} is virtual: other machines may use its chip at the same time")
    if gpu.watts and gpu.usual_watts and gpu.watts < _FULL_POWER * gpu.usual_watts:
        name = f"{name}-{gpu.watts:.0f}W"
        notes.append(
            f"{gpu.name} is held to {gpu.watts:.0f} W of {gpu.usual_watts:.0f} W: its peak is not "
            "what the datasheet has"
        )
    if not notes:
        return base, ""
    note = "; ".join(notes)
    return replace(base, name=name, memory=usable, source=f"{note}. Profile to know."), note


def _clean(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")


def _stem(name: str) -> str:
    """Removes maker and brand from a driver's name: `NVIDIA GeForce RTX 3080` becomes
    `RTX-3080`."""
    short = re.sub(r"^(NVIDIA|AMD|Intel)\b", "", name.partition(" MIG ")[0]).strip()
    return _clean(re.sub(r"^(GeForce|Tesla)\b", "", short).strip()) or "unknown"


def _slice(kind: DeviceType, gpu: Gpu, profile: str) -> tuple[DeviceType, str]:
    """Scales a whole GPU's figures to a slice: compute comes in 7 parts (4 on an A30), and memory
    in 8 parts (NVIDIA MIG user guide)."""
    match = _SLICE.match(profile)
    parts = 4 if re.search(r"\bA30\b", gpu.name) else 7
    part = int(match[1] or match[2]) if match else parts
    share = min(part / parts, 1.0)
    whole = gpu.whole or kind.memory + RESERVED_BYTES
    eighths = round(8 * int(match[3]) * 2**30 / whole) if match else 8
    sliced = replace(
        kind,
        peak={precision: peak * share for precision, peak in kind.peak.items()},
        memory_bandwidth=kind.memory_bandwidth * min(max(eighths, 1), 8) / 8,
    )
    return sliced, f"{gpu.name}: a slice, {profile}, with {part}/{parts} of the peak"


def links_inside(found: MachineHardware, type_names: tuple[str, ...]) -> tuple[Link, str]:
    """Returns the link between the GPUs of a machine, and a note on where its figures come from."""
    if any(gpu.slice or mig_profile_in(gpu.name) for gpu in found.gpus):
        link = Link(bandwidth=catalog()["T4"].inside.bandwidth, latency=10e-6, shared=True)
        return link, "inside: slices (MIG) reach each other through the host alone, over PCIe"
    if found.wiring is None:
        link = _slowest_inside(type_names)
        return link, "inside: as the catalogue has it for this type, not asked of the machine"
    if found.mesh_lanes:
        link = _nvlinks(found, found.mesh_lanes)
        way = f"{found.mesh_lanes} of each GPU, to some of the others: rings pass neighbours alone"
        return link, f"inside: NVLink, {way}"
    link, way = _link_of(found, found.wiring, type_names)
    return link, f"inside: {way}"


def islands_in(
    found: MachineHardware, type_names: tuple[str, ...]
) -> tuple[Islands | None, tuple[str, ...]]:
    """Returns the groups of GPUs of a machine that are connected better than the rest, and notes on
    where they come from."""
    sliced = any(gpu.slice or mig_profile_in(gpu.name) for gpu in found.gpus)
    if found.island_wiring is None or sliced:
        return None, ()
    if found.mesh_lanes:
        link, way = _nvlinks(found, found.mesh_lanes), "every two of which are neighbours"
    else:
        link, way = _link_of(found, found.island_wiring, type_names, island=True)
    groups = " and ".join(str(list(group)) for group in found.islands)
    return Islands(groups=found.islands, link=link), (f"islands: {groups}, {way}",)


def _slowest_inside(type_names: tuple[str, ...]) -> Link:
    known = [catalog()[name].inside for name in type_names if name in catalog()]
    return min(known, key=lambda link: link.bandwidth, default=catalog()["T4"].inside)


def _nvlinks(found: MachineHardware, lanes: int) -> Link:
    blackwell = any((gpu.capability or (0, 0)) >= (10, 0) for gpu in found.gpus)
    return Link(bandwidth=lanes * (_NVLINK5_LANE if blackwell else _NVLINK_LANE), latency=8e-6)


def _link_of(
    found: MachineHardware, wiring: str, type_names: tuple[str, ...], *, island: bool = False
) -> tuple[Link, str]:
    """Returns the link that a connection stands for, and its description."""
    if wiring.startswith("NV"):
        return _nvlinks(found, int(wiring[2:])), f"NVLink, {wiring}"
    pcie = min(_slowest_inside(type_names).bandwidth, catalog()["A10G"].inside.bandwidth)
    kind: LinkKind | None = "pcie" if island else None
    if wiring in ("PIX", "PXB"):
        link = Link(bandwidth=pcie, latency=10e-6, kind=kind)
        return link, f"PCIe through a switch ({wiring})"
    if island:
        # A message goes into the memory of the host and out of it.
        half = Link(bandwidth=pcie / 2, latency=10e-6, kind=kind)
        return half, f"PCIe through one socket ({wiring})"
    link = Link(bandwidth=pcie, latency=10e-6, shared=True)
    return link, f"PCIe through the host, shared ({wiring})"
