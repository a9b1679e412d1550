"""Finds AMD's GPUs through amd-smi, rocm-smi and the amdgpu driver."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from meshwright.cluster.estimate import DriverFigures
from meshwright.cluster.host import GpuReading, GpuSource, Host, ToolOutput
from meshwright.cluster.pci import PciCard
from meshwright.text import printable

AMD_SMI = ("amd-smi", "static", "--asic", "--vram", "--json")
ROCM_SMI = ("rocm-smi", "--showproductname", "--showmeminfo", "vram", "--json")
_UNITS = {"B": 1, "KB": 2**10, "MB": 2**20, "GB": 2**30}
_NONE = "No JSON data to report"


def amd_sources(host: Host) -> list[GpuSource]:
    """Returns what AMD's installed tools report; rocm-smi is asked only if amd-smi fails or does
    not report the memory of every GPU."""
    ways: list[GpuSource] = []
    for command, read in ((AMD_SMI, read_amd_smi), (ROCM_SMI, read_rocm_smi)):
        answer = host.run(command)
        if answer.installed:
            way = _way(answer, read(answer.text))
            ways.append(way)
            if way.gpus and not way.trouble and all(each.memory for each in way.gpus):
                break
    return ways


def _way(answer: ToolOutput, seen: tuple[GpuReading, ...] | None) -> GpuSource:
    if seen is not None and (seen or answer.status == 0):
        return GpuSource(
            name=answer.tool, gpus=seen, trouble="" if answer.status == 0 else answer.summary
        )
    if _NONE in f"{answer.text}{answer.errors}":
        return GpuSource(name=answer.tool)
    return GpuSource(name=answer.tool, trouble=answer.summary)


def _data(text: str) -> Any:
    """Returns the JSON in an output that may begin with warnings; None if it contains none."""
    for match in re.finditer(r"^[\[{]", text, re.MULTILINE):
        try:
            return json.loads(text[match.start() :])
        except (ValueError, RecursionError):
            continue
    return None


def read_amd_smi(text: str) -> tuple[GpuReading, ...] | None:
    """Returns the GPUs in the output of `amd-smi static --asic --vram --json`; None if its JSON has
    no known layout."""
    data = _data(text)
    if isinstance(data, dict):
        data = data.get("gpu_data")
    if not isinstance(data, list) or not all(isinstance(each, dict) for each in data):
        return None
    return tuple(_amd_smi_seen(each) for each in data)


def _amd_smi_seen(gpu: Mapping[str, Any]) -> GpuReading:
    asic, vram = gpu.get("asic"), gpu.get("vram")
    name = asic.get("market_name") if isinstance(asic, dict) else None
    size = vram.get("size") if isinstance(vram, dict) else None
    value = size.get("value") if isinstance(size, dict) else size
    unit = _UNITS.get(str(size.get("unit"))) if isinstance(size, dict) else _UNITS["MB"]
    memory = int(str(value)) * unit if unit and re.fullmatch(r"\d{1,18}", str(value)) else None
    seen = _seen(name, memory, f"no memory of GPU {gpu.get('gpu', '?')}")
    return replace(seen, figures=_amd_smi_figures(asic, vram))


def _amd_smi_figures(asic: object, vram: object) -> DriverFigures:
    """Returns compute units, generation and memory rate, as newer versions of amd-smi tell them."""
    chip = asic.get("target_graphics_version") if isinstance(asic, dict) else None
    units = asic.get("num_compute_units") if isinstance(asic, dict) else None
    rate = vram.get("max_bandwidth") if isinstance(vram, dict) else None
    value = rate.get("value") if isinstance(rate, dict) and rate.get("unit") == "GB/s" else None
    known = isinstance(chip, str) and re.fullmatch(r"gfx\w{3,8}", chip)
    return DriverFigures(
        multiprocessors=int(str(units)) if re.fullmatch(r"[1-9]\d{0,4}", str(units)) else None,
        memory_rate=float(str(value)) * 1e9 if re.fullmatch(r"[1-9]\d{0,5}", str(value)) else None,
        chip=chip if known else None,
    )


def read_rocm_smi(text: str) -> tuple[GpuReading, ...] | None:
    """Returns the GPUs in the output of `rocm-smi --showproductname --showmeminfo vram --json`;
    None if its JSON has no known layout."""
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


def _rocm_smi_seen(key: str, card: Mapping[str, Any]) -> GpuReading:
    names = [card.get("card series"), card.get("card model"), card.get("device name")]
    name = next((each for each in names if _is_name(each)), None)
    size = str(card.get("vram total memory (b)", ""))
    memory = int(size) if re.fullmatch(r"\d{1,18}", size) else None
    return _seen(name, memory, f"no memory of {key}")


def _is_name(text: object) -> bool:
    return isinstance(text, str) and bool(re.search(r"[A-Z]", text)) and text != "N/A"


def _seen(name: object, memory: int | None, said: str) -> GpuReading:
    told = printable(name)[:100] if isinstance(name, str) and _is_name(name) else "AMD GPU"
    told = re.sub("instinct", "Instinct", told, flags=re.IGNORECASE)
    return GpuReading(name=told, memory=memory or None, quoted="" if memory else printable(said))


def amd_driver_source(host: Host, cards: Sequence[PciCard]) -> GpuSource:
    """Returns the name and memory that the amdgpu driver reports for each card on the PCI bus."""
    return GpuSource(name="the amdgpu driver", gpus=tuple(_from_driver(host, cards)))


def _from_driver(host: Host, cards: Sequence[PciCard]) -> Iterator[GpuReading]:
    for card in cards:
        folder = f"/sys/bus/pci/devices/{card.address}"
        size = host.read(f"{folder}/mem_info_vram_total").strip()
        name = host.read(f"{folder}/product_name").strip() or card.name
        memory = int(size) if re.fullmatch(r"\d{1,18}", size) else None
        yield _seen(name, memory, f"no driver of AMD's holds {card}")
