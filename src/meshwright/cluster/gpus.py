"""Detects the GPUs of a machine from several sources; a GPU that cannot be read is always
reported."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from meshwright.cluster import amd, nvidia
from meshwright.cluster.estimate import DriverFigures
from meshwright.cluster.hardware import BY_HAND, Gpu, is_unified, known_memory, not_known
from meshwright.cluster.host import GpuReading, GpuSource, Host
from meshwright.cluster.pci import Maker, PciCard, cards_on, with_names
from meshwright.errors import MachineError, Problem
from meshwright.records import Bytes, record

HIDING = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
"""Environment variables that hide GPUs from PyTorch, or change their order."""
_INTEGRATED_BYTES = 2**31
"""A GPU with less memory (bytes) is the graphics unit of a processor; cards that train have
more."""
_LEAST_BYTES, _MOST_BYTES = 2**24, 2**43
"""Smallest and largest memory of a GPU in bytes; a figure outside was not understood."""
_UNIFIED_SHARE = 0.9
"""Share of the host's memory that a GPU without memory of its own may use; the system keeps the
rest."""

_MENDS = (
    ("version mismatch", "the driver was changed while the old one runs: reboot"),
    ("communicate with the NVIDIA driver", "load the driver (modprobe nvidia), or install it"),
    ("libnvidia-ml", "install the driver's libraries; in a container, start it with the GPUs"),
    ("Insufficient Permissions", "run it as a user who may open /dev/nvidia*"),
    ("GPU is lost", "reset it (nvidia-smi --gpu-reset) or reboot; dmesg says why"),
    ("determine the device handle", "reset it (nvidia-smi --gpu-reset) or reboot; dmesg says why"),
    ("no answer from", "the driver may hang: dmesg says why; reset it or reboot"),
    ("no slice", "make slices (nvidia-smi mig -cgi ... -C), or turn MIG off (nvidia-smi -mig 0)"),
    ("none of the tools", "describe it by hand, as a [device.NAME] of the cluster file"),
    ("not in the catalogue", BY_HAND),
    ("PCI bus", "install its driver; in a container, start it with the GPUs"),
)
"""Mends by the words that occur in an error message."""


@record
class DetectedGpus:
    """Holds the GPUs that were found on a machine, and what could not be read."""

    gpus: tuple[Gpu, ...] = ()
    notes: tuple[str, ...] = ()
    """Notes for the user: sources that failed or disagree, and cards that were left out."""
    unread: tuple[tuple[str, str], ...] = ()
    """Sources and their messages for each GPU that is present and cannot be read."""


def detect_gpus(host: Host, *, partial: bool = False) -> DetectedGpus:
    """Returns every GPU of a machine; with `partial`, only those that can be read.

    Raises MachineError if a GPU is present, or may be present, and cannot be read.
    """
    cards = cards_on(host)
    torch = host.torch()
    found = [_nvidia(host, torch, cards), _amd(host, torch, cards)]
    if not any(each.gpus for each in found):
        cards = with_names(host, cards)
    found.append(_others(cards, alone=not any(each.gpus or each.unread for each in found)))
    told = _told(host, torch)
    gpus = [_with_figures(gpu, told) for each in found for gpu in each.gpus]
    unread = [words for each in found for words in each.unread]
    unread += [("the catalogue", words) for words in map(not_known, gpus) if words]
    looked = DetectedGpus(
        gpus=tuple(gpu for gpu in gpus if not not_known(gpu)),
        notes=tuple(note for each in found for note in each.notes),
        unread=tuple(dict.fromkeys(unread)),
    )
    if looked.unread and not (partial and looked.gpus):
        some = bool(looked.gpus)
        raise MachineError(*(_problem(*words, some=some) for words in looked.unread))
    left_out = tuple(f"LEFT OUT, as asked: {how}: {words}" for how, words in looked.unread)
    return replace(looked, notes=(*looked.notes, *left_out))


def _told(host: Host, torch: tuple[str, GpuSource] | None) -> dict[str, DriverFigures]:
    """Returns what PyTorch and NVML tell of the speed of the GPUs that they see, by name."""
    ways = [torch[1]] if torch else []
    ways += [way for way in (host.nvml(),) if way]
    return {
        each.name: each.figures
        for way in ways
        for each in way.gpus
        if each.name and each.figures != DriverFigures()
    }


def _with_figures(gpu: Gpu, told: Mapping[str, DriverFigures]) -> Gpu:
    """Adds the speed of a GPU that the catalogue does not hold, from a source that tells it."""
    own = gpu.figures if gpu.figures.memory_rate else told.get(gpu.name, gpu.figures)
    return replace(gpu, figures=own)


def _problem(how: str, words: str, *, some: bool) -> Problem:
    helps = next((help for sign, help in _MENDS if sign in words), f"see what {how} says by hand")
    ways_out = "for the processor's cores alone: meshwright discover --cpus"
    if some:
        ways_out = f"for the GPUs that can be read: meshwright discover --partial; {ways_out}"
    return Problem(how, "", words, "every GPU of this machine, by its name and memory",
                   f"{helps}. Or, {ways_out}")  # fmt: skip


def _nvidia(
    host: Host, torch: tuple[str, GpuSource] | None, cards: Sequence[PciCard]
) -> DetectedGpus:
    told = nvidia.nvidia_smi_sources(host)
    sees = torch[1] if torch and torch[0] == "cuda" else None
    ways = told[:1]
    if not any(_is_whole(way, host) for way in ways):
        ways += [way for way in (host.nvml(),) if way]
    ways += [sees] if sees else []
    ways += told[1:]
    if not any(_is_whole(way, host) for way in ways):
        ways += [nvidia.tegra_source(host), nvidia.nvidia_driver_source(host)]
    return _settled(host, "NVIDIA", ways, sees, cards)


def _amd(host: Host, torch: tuple[str, GpuSource] | None, cards: Sequence[PciCard]) -> DetectedGpus:
    ways = [_without_integrated(way) for way in amd.amd_sources(host)]
    sees = _without_integrated(torch[1]) if torch and torch[0] == "rocm" else None
    ways += [sees] if sees else []
    return _settled(host, "AMD", ways, sees, cards)


def _without_integrated(way: GpuSource) -> GpuSource:
    small = [each for each in way.gpus if each.memory and each.memory < _INTEGRATED_BYTES]
    if not small:
        return way
    note = f"passed over: {len(small)} with less than 2 GiB, which are graphics in a processor"
    kept = tuple(each for each in way.gpus if each not in small)
    return replace(way, gpus=kept, notes=(*way.notes, f"{way.name}: {note}"))


def _others(cards: Sequence[PciCard], *, alone: bool) -> DetectedGpus:
    """Returns the cards that no tool here reports: integrated graphics, Intel's cards and those of
    other makers. `alone` is True if no GPU was found."""
    integrated = [card for card in cards if card.is_integrated]
    other = [card for card in cards if card.maker == "other"]
    unread = [card for card in cards if card.maker == "Intel" and not card.is_integrated]
    unread += other if alone else []
    notes = [f"passed over, as part of a processor: {card}" for card in integrated]
    notes += [f"passed over, as no GPU: the accelerator {card}" for card in other]
    words = "a card on the PCI bus that none of the tools asked here tells of"
    return DetectedGpus(unread=tuple((str(card), words) for card in unread), notes=tuple(notes))


def _settled(
    host: Host,
    maker: Maker,
    ways: Sequence[GpuSource],
    torch: GpuSource | None,
    cards: Sequence[PciCard],
) -> DetectedGpus:
    """Returns the GPUs from the first source that reports all needed figures of every GPU that any
    source reports. If there is no such source, returns what can be read and what cannot."""
    is_told = any(_is_whole(way, host) for way in ways)
    known = cards if is_told else with_names(host, cards)
    on_bus = [card for card in known if card.maker == maker and not card.is_integrated]
    if on_bus and not is_told:
        ways = [*ways, _on_bus(host, maker, on_bus)]
    most = max((len(way.gpus) for way in ways), default=0)
    notes = [note for way in ways for note in way.notes]
    troubles = [(way.name, way.trouble) for way in ways if way.trouble]
    if not most and not troubles:
        return DetectedGpus(notes=tuple(notes))
    whole = [way for way in ways if _is_whole(way, host) and len(way.gpus) == most]
    measured = (way for way in whole if all(each.memory for each in way.gpus))
    best = next(measured, next(iter(whole), None))
    # A lost GPU may be one that no other source sees, or one that others list by its name alone.
    if best is None or any(each.trouble for way in ways for each in way.gpus):
        return _in_part(host, ways, notes)
    notes += [f"{words}. {best.name} tells of {most}: these are taken" for _, words in troubles]
    seen, note = _as_torch_sees(host, best, torch)
    notes += [note] if note else []
    if len(on_bus) > most:
        notes.append(
            f"the PCI bus shows {len(on_bus)} cards of {maker}, {best.name} tells of {most}: these "
            "are taken. The others may belong to another container or machine, or have failed"
        )
    return _taken(host, best, seen, notes)


def _taken(
    host: Host, way: GpuSource, seen: Sequence[GpuReading], notes: Sequence[str]
) -> DetectedGpus:
    gpus = _readable(replace(way, gpus=tuple(seen)), host)
    untold = [each.name for each in seen if each.memory is None and each.name]
    told = [
        f"{way.name} tells no memory of {name}: "
        + (f"{_UNIFIED_SHARE:.0%} of the host's" if is_unified(name) else "the catalogue's")
        + " is ASSUMED"
        for name in dict.fromkeys(untold)
        if is_unified(name) or known_memory(name)
    ]
    return DetectedGpus(gpus=tuple(gpus), notes=(*notes, *told))


def _in_part(host: Host, ways: Sequence[GpuSource], notes: Sequence[str]) -> DetectedGpus:
    """Returns the GPUs of the most complete source, and a message for everything that it does not
    report."""
    best = max(ways, key=lambda way: (len(_readable(way, host)), len(way.gpus)))
    best = replace(best, gpus=_as_others_say(best, ways))
    most = max(ways, key=lambda way: len(way.gpus))
    told = [(way.name, way.trouble) for way in ways if way.trouble]
    told += [(way.name, each.trouble) for way in ways for each in way.gpus if each.trouble]
    told += _unread(best, host)
    if len(best.gpus) < len(most.gpus):
        told += _unread(most, host)
    unread: list[tuple[str, str]] = []
    for how, words in told:
        if not any(words in known for _, known in unread):
            unread.append((how, words))
    return replace(_taken(host, best, best.gpus, notes), unread=tuple(unread))


def _as_others_say(best: GpuSource, ways: Sequence[GpuSource]) -> tuple[GpuReading, ...]:
    """Marks the GPUs of a source that another one, which tells of as many, says cannot be used."""
    broken = {
        place: each.trouble
        for way in ways
        if len(way.gpus) == len(best.gpus)
        for place, each in enumerate(way.gpus)
        if each.trouble
    }
    return tuple(
        replace(each, trouble=each.trouble or broken.get(place, ""))
        for place, each in enumerate(best.gpus)
    )


def _readable(way: GpuSource, host: Host) -> list[Gpu]:
    return [gpu for each in way.gpus for gpu in [_gpu(each, host)] if gpu]


def _unread(way: GpuSource, host: Host) -> list[tuple[str, str]]:
    words = []
    for each in way.gpus:
        if _gpu(each, host) is None:
            what = each.name or "a GPU whose name is not told either"
            untold = f"no memory of {what}{f': {each.quoted}' if each.quoted else ''}"
            words.append((way.name, each.trouble or untold))
    return words


def _is_whole(way: GpuSource, host: Host) -> bool:
    """True if a source reported no failure and all needed figures of every GPU."""
    return bool(way.gpus) and not way.trouble and all(_gpu(each, host) for each in way.gpus)


def _gpu(seen: GpuReading, host: Host) -> Gpu | None:
    memory = _memory(seen, host)
    if seen.trouble or seen.name is None or memory is None:
        return None
    return Gpu(
        name=seen.name,
        memory=memory,
        capability=seen.capability,
        slice=seen.slice,
        whole=seen.whole_memory,
        watts=seen.watts,
        usual_watts=seen.usual_watts,
        figures=seen.figures,
    )


def _memory(seen: GpuReading, host: Host) -> Bytes | None:
    if seen.memory is not None:
        return seen.memory if _LEAST_BYTES <= seen.memory <= _MOST_BYTES else None
    if seen.name is None:
        return None
    if is_unified(seen.name):
        return int(_UNIFIED_SHARE * host.memory)
    return known_memory(seen.name)


def _on_bus(host: Host, maker: Maker, cards: Sequence[PciCard]) -> GpuSource:
    if maker == "AMD":
        return amd.amd_driver_source(host, cards)
    how = "the PCI bus"
    seen = []
    for card in cards:
        names = re.findall(r"\[([^][]+)\]", card.name)
        said = f"only the PCI bus shows {card}"
        seen.append(GpuReading(name=names[-1] if names else str(card), quoted=said))
    return GpuSource(name=how, gpus=tuple(seen))


def _as_torch_sees(
    host: Host, best: GpuSource, torch: GpuSource | None
) -> tuple[Sequence[GpuReading], str]:
    """Returns the GPUs to use if PyTorch sees fewer than the source reports, and a note that says
    why."""
    hiding = [f"{name}={host.environment[name]}" for name in HIDING if name in host.environment]
    said = f" ({' and '.join(hiding)})" if hiding else ""
    most = len(best.gpus)
    if torch is None:
        note = f"{best.name} tells of {most} GPUs, and all are taken, whatever is hidden{said}"
        return best.gpus, note if hiding else ""
    count = len(torch.gpus)
    if count >= most:
        return best.gpus, ""
    differ = f"{best.name} tells of {most} GPUs, PyTorch sees {count}{said}"
    if count and hiding and not any(each.slice for each in best.gpus):
        known = {each.uuid: each for each in best.gpus if each.uuid}
        taken = [known.get(each.uuid or "", each) for each in torch.gpus]
        return taken, f"{differ}: these {count} are taken, since training sees no others"
    each = "; a process sees one slice" if any(each.slice for each in best.gpus) else ""
    return best.gpus, f"{differ}: all {most} are taken{each}"
