"""Detects the GPUs of a machine from several sources; a GPU that cannot be read is always
reported."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from meshwright.cluster import amd, nvidia
from meshwright.cluster.bus import Card, Maker, cards_on, with_names
from meshwright.cluster.host import Host, Seen, Way
from meshwright.cluster.machine import Gpu, is_unified, known_memory
from meshwright.errors import MachineError, Problem
from meshwright.records import Bytes, record

_HIDING = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
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
    ("Insufficient Permissions", "run it as somebody who may open /dev/nvidia*"),
    ("GPU is lost", "reset it (nvidia-smi --gpu-reset) or reboot; dmesg says why"),
    ("determine the device handle", "reset it (nvidia-smi --gpu-reset) or reboot; dmesg says why"),
    ("no answer from", "the driver may hang: dmesg says why; reset it or reboot"),
    ("no slice", "make slices (nvidia-smi mig -cgi ... -C), or turn MIG off (nvidia-smi -mig 0)"),
    ("none of the tools", "describe it by hand, as a [device.NAME] of the cluster file"),
    ("PCI bus", "install its driver; in a container, start it with the GPUs"),
)
"""Mends by the words that occur in an error message."""


@record
class Looked:
    """The GPUs that were found, and what could not be read."""

    gpus: tuple[Gpu, ...] = ()
    notes: tuple[str, ...] = ()
    """Notes for the user: sources that failed or disagree, and cards that were left out."""
    unread: tuple[tuple[str, str], ...] = ()
    """Sources and their messages for each GPU that is present and cannot be read."""


def gpus_of(host: Host, *, partial: bool = False) -> Looked:
    """Return every GPU of a machine; with `partial`, only those that can be read.

    Raises MachineError if a GPU is present, or may be present, and cannot be read.
    """
    cards = cards_on(host)
    torch = host.torch()
    found = [_nvidia(host, torch, cards), _amd(host, torch, cards)]
    if not any(each.gpus for each in found):
        cards = with_names(host, cards)
    found.append(_others(cards, alone=not any(each.gpus or each.unread for each in found)))
    looked = Looked(
        gpus=tuple(gpu for each in found for gpu in each.gpus),
        notes=tuple(note for each in found for note in each.notes),
        unread=tuple(dict.fromkeys(words for each in found for words in each.unread)),
    )
    if looked.unread and not (partial and looked.gpus):
        some = bool(looked.gpus)
        raise MachineError(*(_problem(*words, some=some) for words in looked.unread))
    left_out = tuple(f"LEFT OUT, as asked: {how}: {words}" for how, words in looked.unread)
    return replace(looked, notes=(*looked.notes, *left_out))


def _problem(how: str, words: str, *, some: bool) -> Problem:
    helps = next((help for sign, help in _MENDS if sign in words), f"see what {how} says by hand")
    ways_out = "for the processor's cores alone: meshwright discover --cpus"
    if some:
        ways_out = f"for the GPUs that can be read: meshwright discover --partial; {ways_out}"
    return Problem(how, "", words, "every GPU of this machine, by its name and memory",
                   f"{helps}. Or, {ways_out}")  # fmt: skip


def _nvidia(host: Host, torch: tuple[str, Way] | None, cards: Sequence[Card]) -> Looked:
    told = nvidia.smi(host)
    sees = torch[1] if torch and torch[0] == "cuda" else None
    ways = told[:1]
    if not any(_is_whole(way, host) for way in ways):
        ways += [way for way in (host.nvml(),) if way]
    ways += [sees] if sees else []
    ways += told[1:]
    if not any(_is_whole(way, host) for way in ways):
        ways += [nvidia.tegra(host), nvidia.driver_files(host)]
    return _settled(host, "NVIDIA", ways, sees, cards)


def _amd(host: Host, torch: tuple[str, Way] | None, cards: Sequence[Card]) -> Looked:
    ways = [_without_integrated(way) for way in amd.tools(host)]
    sees = _without_integrated(torch[1]) if torch and torch[0] == "rocm" else None
    ways += [sees] if sees else []
    return _settled(host, "AMD", ways, sees, cards)


def _without_integrated(way: Way) -> Way:
    small = [each for each in way.seen if each.memory and each.memory < _INTEGRATED_BYTES]
    if not small:
        return way
    note = f"passed over: {len(small)} with less than 2 GiB, which are graphics in a processor"
    kept = tuple(each for each in way.seen if each not in small)
    return replace(way, seen=kept, notes=(*way.notes, f"{way.how}: {note}"))


def _others(cards: Sequence[Card], *, alone: bool) -> Looked:
    """Return the cards that no tool here reports: integrated graphics, Intel's cards and those of
    other makers. `alone` is True if no GPU was found."""
    integrated = [card for card in cards if card.is_integrated]
    other = [card for card in cards if card.maker == "other"]
    unread = [card for card in cards if card.maker == "Intel" and not card.is_integrated]
    unread += other if alone else []
    notes = [f"passed over, as part of a processor: {card}" for card in integrated]
    notes += [f"passed over, as no GPU: the accelerator {card}" for card in other]
    words = "a card on the PCI bus that none of the tools asked here tells of"
    return Looked(unread=tuple((str(card), words) for card in unread), notes=tuple(notes))


def _settled(
    host: Host, maker: Maker, ways: Sequence[Way], torch: Way | None, cards: Sequence[Card]
) -> Looked:
    """Return the GPUs from the first source that reports all needed figures of every GPU any source
    reports. If there is none, return what can be read and what cannot."""
    is_told = any(_is_whole(way, host) for way in ways)
    known = cards if is_told else with_names(host, cards)
    on_bus = [card for card in known if card.maker == maker and not card.is_integrated]
    if on_bus and not is_told:
        ways = [*ways, _on_bus(host, maker, on_bus)]
    most = max((len(way.seen) for way in ways), default=0)
    notes = [note for way in ways for note in way.notes]
    troubles = [(way.how, way.trouble) for way in ways if way.trouble]
    if not most and not troubles:
        return Looked(notes=tuple(notes))
    best = next((way for way in ways if _is_whole(way, host) and len(way.seen) == most), None)
    # A source that reports fewer GPUs, one of them lost, may mean a GPU that no other source sees.
    if best is None or any(
        each.trouble for way in ways if len(way.seen) < most for each in way.seen
    ):
        return _in_part(host, ways, notes)
    notes += [f"{words}. {best.how} tells of {most}: these are taken" for _, words in troubles]
    seen, note = _as_torch_sees(host, best, torch)
    notes += [note] if note else []
    if len(on_bus) > most:
        notes.append(
            f"the PCI bus shows {len(on_bus)} cards of {maker}, {best.how} tells of {most}: these "
            "are taken. The others may belong to another container or machine, or have failed"
        )
    return _taken(host, best, seen, notes)


def _taken(host: Host, way: Way, seen: Sequence[Seen], notes: Sequence[str]) -> Looked:
    gpus = _readable(replace(way, seen=tuple(seen)), host)
    untold = [each.name for each in seen if each.memory is None and each.name]
    told = [
        f"{way.how} tells no memory of {name}: "
        + (f"{_UNIFIED_SHARE:.0%} of the host's" if is_unified(name) else "the catalogue's")
        + " is ASSUMED"
        for name in dict.fromkeys(untold)
        if is_unified(name) or known_memory(name)
    ]
    return Looked(gpus=tuple(gpus), notes=(*notes, *told))


def _in_part(host: Host, ways: Sequence[Way], notes: Sequence[str]) -> Looked:
    """Return the GPUs of the most complete source, and a message for everything that it does not
    report."""
    best = max(ways, key=lambda way: (len(_readable(way, host)), len(way.seen)))
    most = max(ways, key=lambda way: len(way.seen))
    told = [(way.how, way.trouble) for way in ways if way.trouble]
    told += [(way.how, each.trouble) for way in ways for each in way.seen if each.trouble]
    told += _unread(best, host)
    if len(best.seen) < len(most.seen):
        told += _unread(most, host)
    unread: list[tuple[str, str]] = []
    for how, words in told:
        if not any(words in known for _, known in unread):
            unread.append((how, words))
    return replace(_taken(host, best, best.seen, notes), unread=tuple(unread))


def _readable(way: Way, host: Host) -> list[Gpu]:
    return [gpu for each in way.seen for gpu in [_gpu(each, host)] if gpu]


def _unread(way: Way, host: Host) -> list[tuple[str, str]]:
    words = []
    for each in way.seen:
        if _gpu(each, host) is None:
            what = each.name or "a GPU whose name is not told either"
            untold = f"no memory of {what}{f': {each.said}' if each.said else ''}"
            words.append((way.how, each.trouble or untold))
    return words


def _is_whole(way: Way, host: Host) -> bool:
    """True if a source reported no failure and all needed figures of every GPU."""
    return bool(way.seen) and not way.trouble and all(_gpu(each, host) for each in way.seen)


def _gpu(seen: Seen, host: Host) -> Gpu | None:
    memory = _memory(seen, host)
    if seen.trouble or seen.name is None or memory is None:
        return None
    return Gpu(
        name=seen.name,
        memory=memory,
        capability=seen.capability,
        slice=seen.slice,
        whole=seen.whole,
        watts=seen.watts,
        usual_watts=seen.usual_watts,
    )


def _memory(seen: Seen, host: Host) -> Bytes | None:
    if seen.memory is not None:
        return seen.memory if _LEAST_BYTES <= seen.memory <= _MOST_BYTES else None
    if seen.name is None:
        return None
    if is_unified(seen.name):
        return int(_UNIFIED_SHARE * host.memory)
    return known_memory(seen.name)


def _on_bus(host: Host, maker: Maker, cards: Sequence[Card]) -> Way:
    if maker == "AMD":
        return amd.driver_files(host, cards)
    how = "the PCI bus"
    seen = []
    for card in cards:
        names = re.findall(r"\[([^][]+)\]", card.name)
        said = f"only the PCI bus shows {card}"
        seen.append(Seen(name=names[-1] if names else str(card), said=said))
    return Way(how=how, seen=tuple(seen))


def _as_torch_sees(host: Host, best: Way, torch: Way | None) -> tuple[Sequence[Seen], str]:
    """Return the GPUs to use if PyTorch sees fewer than the source reports, and a note that says
    why."""
    hiding = [f"{name}={host.environment[name]}" for name in _HIDING if name in host.environment]
    said = f" ({' and '.join(hiding)})" if hiding else ""
    most = len(best.seen)
    if torch is None:
        note = f"{best.how} tells of {most} GPUs, and all are taken, whatever is hidden{said}"
        return best.seen, note if hiding else ""
    count = len(torch.seen)
    if count >= most:
        return best.seen, ""
    differ = f"{best.how} tells of {most} GPUs, PyTorch sees {count}{said}"
    if count and hiding and not any(each.slice for each in best.seen):
        known = {each.uuid: each for each in best.seen if each.uuid}
        taken = [known.get(each.uuid or "", each) for each in torch.seen]
        return taken, f"{differ}: these {count} are taken, since training sees no others"
    each = "; a process sees one slice" if any(each.slice for each in best.seen) else ""
    return best.seen, f"{differ}: all {most} are taken{each}"
