"""Turns the hardware found in one machine into device types (from GPUs) and links (from wiring and
network)."""

from __future__ import annotations

import re
from dataclasses import replace

from meshwright.cluster.catalog import catalog, type_reported_as
from meshwright.cluster.estimate import DriverFigures, estimated_type, untold
from meshwright.cluster.spec import DeviceType, Islands, Link
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
    """The weakest connection inside these groups."""
    network: BytesPerSecond | None = None
    """Bandwidth of the interface that the default route uses; None if it is not reported."""
    notes: tuple[str, ...] = ()
    """Notes for the user on how the machine was found."""
    cpus: bool = False
    """True if the cluster shall consist of its cores even if it has GPUs."""


_WEAKEST_FIRST = ("SYS", "NODE", "PHB", "PXB", "PIX")


def read_wiring(text: str) -> str | None:
    """Returns the weakest connection between two GPUs in the output of `nvidia-smi topo -m`."""
    return _weakest({cell for row in _wiring_rows(text) for cell in row} - {"X"})


def _wiring_rows(text: str) -> list[list[str]]:
    """Returns the connections of each GPU with every GPU; `X` with itself."""
    rows = [re.sub(r"\x1b\[[0-9;]*m", "", line).split() for line in text.splitlines()]
    gpus = [row for row in rows if row and re.fullmatch(r"GPU\d+", row[0]) and "X" in row]
    return [row[1 : len(gpus) + 1] for row in gpus]


def _weakest(cells: set[str]) -> str | None:
    for weak in _WEAKEST_FIRST:
        if weak in cells:
            return weak
    lanes = [int(match[1]) for cell in cells if (match := re.fullmatch(r"NV(\d+)", cell))]
    return f"NV{min(lanes)}" if lanes else None


def read_islands(text: str, number: int) -> tuple[tuple[tuple[int, ...], ...], str | None]:
    """Returns the groups of GPUs, by index, that NVLink or else PCIe switches connect while others
    are connected through the host, with the weakest connection inside them; no groups if GPUs of
    one would reach each other over a third only, or if the text is not about `number` GPUs.

    The text is the output of `nvidia-smi topo -m`.
    """
    rows = _wiring_rows(text)
    if len(rows) != number:
        return (), None
    for good in (r"NV\d+", r"NV\d+|PIX|PXB"):
        near = [
            tuple(j for j, cell in enumerate(row) if cell == "X" or re.fullmatch(good, cell))
            for row in rows
        ]
        groups = tuple(dict.fromkeys(each for each in near if len(each) > 1))
        apart = all(near[index] == group for group in groups for index in group)
        if groups and apart and len(groups[0]) < len(rows):
            inside = {rows[i][j] for group in groups for i in group for j in group if i != j}
            return groups, _weakest(inside)
    return (), None


def read_default_interface(routes: str) -> str | None:
    """Returns the interface of the default route in the text of `/proc/net/route`."""
    for line in routes.splitlines()[1:]:
        columns = line.split()
        if len(columns) > 7 and columns[1] == columns[7] == "00000000":
            return columns[0]
    return None


def read_speed(text: str) -> BytesPerSecond | None:
    """Parses bytes per second from `/sys/class/net/*/speed`, which is in Mbit/s, or -1 if it is not
    known."""
    speed = text.strip()
    return int(speed) * 1e6 / 8 if re.fullmatch(r"[1-9]\d*", speed) else None


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
    link, way = _link_of(found, found.island_wiring, type_names)
    groups = " and ".join(str(list(group)) for group in found.islands)
    return Islands(groups=found.islands, link=link), (f"islands: {groups}, {way}",)


def _slowest_inside(type_names: tuple[str, ...]) -> Link:
    known = [catalog()[name].inside for name in type_names if name in catalog()]
    return min(known, key=lambda link: link.bandwidth, default=catalog()["T4"].inside)


def _link_of(found: MachineHardware, wiring: str, type_names: tuple[str, ...]) -> tuple[Link, str]:
    """Returns the link that a connection stands for, and its description."""
    if wiring.startswith("NV"):
        blackwell = any((gpu.capability or (0, 0)) >= (10, 0) for gpu in found.gpus)
        lane = _NVLINK5_LANE if blackwell else _NVLINK_LANE
        return Link(bandwidth=int(wiring[2:]) * lane, latency=8e-6), f"NVLink, {wiring}"
    pcie = min(_slowest_inside(type_names).bandwidth, catalog()["A10G"].inside.bandwidth)
    shared = wiring not in ("PIX", "PXB")
    way = "through the host, shared" if shared else "through a switch"
    return Link(bandwidth=pcie, latency=10e-6, shared=shared), f"PCIe {way} ({wiring})"
