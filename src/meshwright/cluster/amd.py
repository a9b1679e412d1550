"""Finds AMD's GPUs through amd-smi, rocm-smi and the amdgpu driver."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from meshwright.cluster.bus import Card
from meshwright.cluster.host import Answer, Host, Seen, Way
from meshwright.text import printable

AMD_SMI = ("amd-smi", "static", "--asic", "--vram", "--json")
ROCM_SMI = ("rocm-smi", "--showproductname", "--showmeminfo", "vram", "--json")
_UNITS = {"B": 1, "KB": 2**10, "MB": 2**20, "GB": 2**30}
_NONE = "No JSON data to report"


def tools(host: Host) -> list[Way]:
    """Return what AMD's installed tools report; rocm-smi is asked only if amd-smi fails or does not
    report the memory of every GPU."""
    ways: list[Way] = []
    for command, read in ((AMD_SMI, read_amd_smi), (ROCM_SMI, read_rocm_smi)):
        answer = host.run(command)
        if answer.there:
            way = _way(answer, read(answer.text))
            ways.append(way)
            if way.seen and not way.trouble and all(each.memory for each in way.seen):
                break
    return ways


def _way(answer: Answer, seen: tuple[Seen, ...] | None) -> Way:
    if seen is not None and (seen or answer.status == 0):
        return Way(how=answer.tool, seen=seen, trouble="" if answer.status == 0 else answer.words)
    if _NONE in f"{answer.text}{answer.errors}":
        return Way(how=answer.tool)
    return Way(how=answer.tool, trouble=answer.words)


def _data(text: str) -> Any:
    """Return the JSON in an output that may begin with warnings; None if it contains none."""
    for match in re.finditer(r"^[\[{]", text, re.MULTILINE):
        try:
            return json.loads(text[match.start() :])
        except (ValueError, RecursionError):
            continue
    return None


def read_amd_smi(text: str) -> tuple[Seen, ...] | None:
    """Return the GPUs in the output of `amd-smi static --asic --vram --json`; None if its JSON has
    no known layout."""
    data = _data(text)
    if isinstance(data, dict):
        data = data.get("gpu_data")
    if not isinstance(data, list) or not all(isinstance(each, dict) for each in data):
        return None
    return tuple(_amd_smi_seen(each) for each in data)


def _amd_smi_seen(gpu: Mapping[str, Any]) -> Seen:
    asic, vram = gpu.get("asic"), gpu.get("vram")
    name = asic.get("market_name") if isinstance(asic, dict) else None
    size = vram.get("size") if isinstance(vram, dict) else None
    value = size.get("value") if isinstance(size, dict) else size
    unit = _UNITS.get(str(size.get("unit"))) if isinstance(size, dict) else _UNITS["MB"]
    memory = int(str(value)) * unit if unit and re.fullmatch(r"\d{1,18}", str(value)) else None
    return _seen(name, memory, f"no memory of GPU {gpu.get('gpu', '?')}")


def read_rocm_smi(text: str) -> tuple[Seen, ...] | None:
    """Return the GPUs in the output of `rocm-smi --showproductname --showmeminfo vram --json`; None
    if its JSON has no known layout."""
    data = _data(text)
    if not isinstance(data, dict):
        return None
    cards = {
        key: {name.lower(): value for name, value in card.items()}
        for key, card in data.items()
        if re.fullmatch(r"card\d+", key) and isinstance(card, dict)
    }
    return tuple(_rocm_smi_seen(key, cards[key]) for key in sorted(cards, key=_number))


def _number(card: str) -> int:
    return int(card.removeprefix("card"))


def _rocm_smi_seen(key: str, card: Mapping[str, Any]) -> Seen:
    names = [card.get("card series"), card.get("card model"), card.get("device name")]
    name = next((each for each in names if _is_name(each)), None)
    size = str(card.get("vram total memory (b)", ""))
    memory = int(size) if re.fullmatch(r"\d{1,18}", size) else None
    return _seen(name, memory, f"no memory of {key}")


def _is_name(text: object) -> bool:
    return isinstance(text, str) and bool(re.search(r"[A-Z]", text)) and text != "N/A"


def _seen(name: object, memory: int | None, said: str) -> Seen:
    told = printable(name)[:100] if isinstance(name, str) and _is_name(name) else "AMD GPU"
    told = re.sub("instinct", "Instinct", told, flags=re.IGNORECASE)
    return Seen(name=told, memory=memory or None, said="" if memory else printable(said))


def driver_files(host: Host, cards: Sequence[Card]) -> Way:
    """Return the name and memory that the amdgpu driver reports for each card on the PCI bus."""
    return Way(how="the amdgpu driver", seen=tuple(_from_driver(host, cards)))


def _from_driver(host: Host, cards: Sequence[Card]) -> Iterator[Seen]:
    for card in cards:
        folder = f"/sys/bus/pci/devices/{card.address}"
        size = host.read(f"{folder}/mem_info_vram_total").strip()
        name = host.read(f"{folder}/product_name").strip() or card.name
        memory = int(size) if re.fullmatch(r"\d{1,18}", size) else None
        yield _seen(name, memory, f"no driver of AMD's holds {card}")
