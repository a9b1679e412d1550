"""Finds NVIDIA's GPUs through nvidia-smi and the kernel's driver."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from meshwright.cluster.host import GpuReading, GpuSource, Host, ToolOutput
from meshwright.records import Bytes, record
from meshwright.text import printable, shown

SMI = "nvidia-smi"
_CSV = "--format=csv,noheader,nounits"
_FIELDS = ("name,memory.total,compute_cap", "name,memory.total")
"""Columns to ask for; drivers up to about 470 do not know compute_cap and refuse the whole query,
so the second list is shorter."""
_MORE_FIELDS = (
    "uuid,power.limit,power.default_limit,mig.mode.current",
    "uuid,power.limit,power.default_limit",
)
_UNKNOWN_FIELD = "not a valid field"

_NOT_TOLD = re.compile(r"\[.*\]|N/A|Not Supported|ERR!|Unknown Error")
_LINE = re.compile(
    rf"\s*(?P<name>.+?),\s*(?P<memory>\d+(?: MiB)?|{_NOT_TOLD.pattern})"
    rf"(?:,\s*(?P<capability>\d+\.\d+|{_NOT_TOLD.pattern}))?\s*"
)
_LOST = re.compile(r"Unable to determine the device handle", re.IGNORECASE)
_BROKEN = ("GPU is lost", "requires reset")
_WARNING = re.compile(r"\s*WARNING:", re.IGNORECASE)
_LISTED = re.compile(r"GPU (\d+): (.+?) \((?:UUID|S/N): ([^)]*)\)\s*")
_SLICE = re.compile(r"\s+MIG (\S+)\s+Device\s+(\d+): \(UUID: ([^)]*)\)\s*")
_SLICE_MEMORY = re.compile(r"\|\s*(\d+)\s+\d+\s+\d+\s+(\d+)\s*\|\s*\d+MiB\s*/\s*(\d+)MiB")
_UUID = re.compile(r"(?:GPU-)?[0-9A-Fa-f-]{36}")
"""A GPU's UUID; on a Jetson it has no prefix."""
_NONE = "No devices were found"
_FINE = (0, 14)
"""Exit statuses after which the output is complete; 14 warns of a damaged infoROM."""


@record
class ListedGpu:
    """Holds what `nvidia-smi -L` prints of one GPU."""

    name: str | None = None
    uuid: str | None = None
    slices: tuple[tuple[str, int, str], ...] = ()
    """MIG profile, number and UUID of each slice."""
    trouble: str = ""


def nvidia_smi_sources(host: Host) -> list[GpuSource]:
    """Returns the GPUs and slices that nvidia-smi reports: first by the full query, then by shorter
    ones if it refuses, then the GPUs that it only lists. Empty if nvidia-smi is not installed."""
    way = GpuSource(name=SMI)
    for fields in _FIELDS:
        answer = host.run((SMI, f"--query-gpu={fields}", _CSV))
        if not answer.installed:
            return []
        asked = read_gpus(answer)
        way = asked if len(asked.gpus) >= len(way.gpus) else way
        if _UNKNOWN_FIELD not in f"{answer.text}{answer.errors}":
            break
    if answer.timed_out or not (way.gpus or way.trouble):
        return [way]
    answer = host.run((SMI, "-L"))
    gpus, strange = read_list(answer.text)
    if way.gpus:
        way = _with_more(way, host)
    if not gpus and way.trouble:
        return [way]
    if not gpus:
        said = f" answered what is not understood: {_words(strange[0])}" if strange else ""
        note = f"slices (MIG) were not looked for: {SMI} -L{said or ' told of no GPU'}"
        return [replace(way, notes=(*way.notes, note))]
    memories = read_slice_memory(host.run((SMI,)).text) if any(g.slices for g in gpus) else {}
    names = [GpuReading(name=each.name, uuid=each.uuid, trouble=each.trouble) for each in gpus]
    listed = GpuSource(name=f"{SMI} -L", gpus=_sliced(names, gpus, memories))
    if len(gpus) != len(way.gpus):
        return [way, _one_by_one(host, gpus), listed]
    is_whole = all(each.name and each.memory for each in way.gpus)
    if way.trouble and is_whole and not strange and answer.status in _FINE:
        way = replace(way, trouble="", notes=(*way.notes, way.trouble))
    way = replace(way, gpus=_sliced(way.gpus, gpus, memories))
    return [way] if is_whole and not way.trouble else [way, listed]


def read_gpus(answer: ToolOutput) -> GpuSource:
    """Parses the GPUs in an answer to `nvidia-smi --query-gpu=name,memory.total,compute_cap
    --format=csv,noheader,nounits`, or to a query for fewer columns.

    A line that is neither a GPU nor the statement that there is none counts as trouble, so that an
    unknown message is never taken for a machine without GPUs.
    """
    seen, notes, strange = [], [], []
    lines = [line for line in answer.text.splitlines() if line.strip() and line[:6] != "name, "]
    for line in lines:
        match = _LINE.fullmatch(line)
        if match:
            seen.append(_seen(match, line))
        elif _LOST.search(line):
            seen.append(GpuReading(trouble=_words(line)))
        elif _WARNING.match(line):
            notes.append(f"{SMI}: {_words(line)}")
        elif _NONE not in line:
            strange.append(line)
    is_none = lines and not seen and not strange
    failed = answer.status not in _FINE and not is_none
    trouble = answer.summary if failed or not lines else ""
    if strange and not trouble:
        trouble = f"{SMI} answered a line that is not understood: {_words(strange[0])}"
    return GpuSource(name=SMI, gpus=tuple(seen), trouble=trouble, notes=tuple(notes))


def _words(line: str) -> str:
    return shown(" ".join(line.split()), 160)


def _seen(match: re.Match[str], line: str) -> GpuReading:
    memory, capability = match["memory"], match["capability"] or ""
    major, _, minor = capability.partition(".")
    is_told = memory[0] in "123456789"
    broken = any(sign in line for sign in _BROKEN)
    return GpuReading(
        trouble=_words(line) if broken else "",
        name=None if _NOT_TOLD.fullmatch(match["name"]) else printable(match["name"])[:100],
        memory=int(memory.split()[0]) * 2**20 if is_told else None,
        capability=(int(major), int(minor)) if minor.isdigit() else None,
        quoted="" if is_told else _words(line),
    )


def read_list(text: str) -> tuple[tuple[ListedGpu, ...], tuple[str, ...]]:
    """Parses the GPUs and their slices in the output of `nvidia-smi -L`, and the lines that are
    neither."""
    gpus: list[ListedGpu] = []
    unread = []
    for line in text.splitlines():
        if match := _LISTED.fullmatch(line):
            gpus.append(ListedGpu(name=printable(match[2])[:100], uuid=match[3]))
        elif (match := _SLICE.fullmatch(line)) and gpus:
            one = (printable(match[1])[:40], int(match[2]), match[3])
            gpus[-1] = replace(gpus[-1], slices=(*gpus[-1].slices, one))
        elif _LOST.search(line):
            gpus.append(ListedGpu(trouble=_words(line)))
        elif line.strip() and not _WARNING.match(line) and _NONE not in line:
            unread.append(line)
    return tuple(gpus), tuple(unread)


def _with_more(way: GpuSource, host: Host) -> GpuSource:
    """Adds the power limit of each GPU, and marks those that are in MIG mode but have no slice."""
    for fields in _MORE_FIELDS:
        answer = host.run((SMI, f"--query-gpu={fields}", _CSV))
        rows = [[cell.strip() for cell in line.split(",")] for line in answer.text.splitlines()]
        rows = [
            row for row in rows if len(row) == fields.count(",") + 1 and _UUID.fullmatch(row[0])
        ]
        if rows or _UNKNOWN_FIELD not in f"{answer.text}{answer.errors}":
            break
    if len(rows) == len(way.gpus):
        seen = [_with_row(each, row) for each, row in zip(way.gpus, rows, strict=True)]
        return replace(way, gpus=tuple(seen))
    note = f"{SMI} did not tell the limits of power: each GPU is taken to have its whole"
    return replace(way, notes=(*way.notes, note))


def _with_row(seen: GpuReading, row: Sequence[str]) -> GpuReading:
    watts, usual = (
        float(cell) if re.fullmatch(r"\d+(\.\d+)?", cell) else None for cell in row[1:3]
    )
    trouble = seen.trouble
    if row[3:] == ["Enabled"]:
        trouble = "MIG is on, and there is no slice to use"
    return replace(seen, uuid=row[0], watts=watts, usual_watts=usual, trouble=trouble)


def _one_by_one(host: Host, gpus: Sequence[ListedGpu]) -> GpuSource:
    """Queries each listed GPU on its own: one lost GPU makes a query for all of them fail."""
    seen = []
    for index, each in enumerate(gpus):
        told: tuple[GpuReading, ...] = ()
        for fields in _FIELDS if not each.trouble else ():
            asked = read_gpus(host.run((SMI, "-i", str(index), f"--query-gpu={fields}", _CSV)))
            if len(asked.gpus) == 1 and not asked.trouble:
                told = asked.gpus
                break
        own = told[0] if told else GpuReading(name=each.name)
        seen.append(replace(own, uuid=each.uuid, trouble=each.trouble or own.trouble))
    return GpuSource(name=f"{SMI} -i", gpus=_sliced(seen, gpus, {}))


def _sliced(
    wholes: Sequence[GpuReading],
    gpus: Sequence[ListedGpu],
    memories: Mapping[tuple[int, int], Bytes],
) -> tuple[GpuReading, ...]:
    """Replaces each GPU that is divided by its slices."""
    seen: list[GpuReading] = []
    for index, (whole, listed) in enumerate(zip(wholes, gpus, strict=True)):
        if not listed.slices:
            seen.append(whole)
        for profile, number, uuid in listed.slices:
            memory = memories.get((index, number)) or nominal_memory(profile)
            trouble = "" if memory else f"{SMI} names a slice that is not understood: {profile}"
            # Power is shared by all slices, and limits none of them alone.
            one = replace(
                whole, slice=profile, memory=memory, whole_memory=whole.memory, watts=None
            )
            seen.append(replace(one, uuid=uuid, trouble=trouble))
    return tuple(seen)


def read_slice_memory(text: str) -> dict[tuple[int, int], Bytes]:
    """Parses the bytes of each slice, keyed by GPU and slice number, in the table that `nvidia-smi`
    prints."""
    found = _SLICE_MEMORY.findall(text)
    return {(int(gpu), int(number)): int(mib) * 2**20 for gpu, number, mib in found}


def nominal_memory(profile: str) -> Bytes | None:
    """Returns the bytes of a slice from its profile, less the twentieth that the driver may keep:
    `1g.5gb` has 4.75 GiB."""
    match = re.search(r"(\d+)gb", profile)
    return int(match[1]) * 2**30 * 19 // 20 if match else None


def nvidia_driver_source(host: Host) -> GpuSource:
    """Returns the GPUs that the kernel's driver lists by name in /proc/driver/nvidia."""
    folder = "/proc/driver/nvidia/gpus"
    seen = []
    for place in host.names(folder):
        match = re.search(r"^Model:\s*(.+?)\s*$", host.read(f"{folder}/{place}/information"), re.M)
        name = printable(match[1])[:100] if match and "Unknown" not in match[1] else None
        seen.append(GpuReading(name=name, quoted="" if name else f"{folder}/{place}"))
    return GpuSource(name=folder, gpus=tuple(seen))


_TEGRA = "/proc/device-tree/"


def tegra_source(host: Host) -> GpuSource:
    """Returns the GPU of a Jetson, which is on no PCI bus; boards before JetPack 6 have no
    nvidia-smi."""
    if "nvidia,tegra" not in host.read(f"{_TEGRA}compatible"):
        return GpuSource(name=_TEGRA)
    name = host.read(f"{_TEGRA}model").strip("\0 \n") or "NVIDIA Jetson"
    return GpuSource(name=f"{_TEGRA}model", gpus=(GpuReading(name=printable(name)[:100]),))
