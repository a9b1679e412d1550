"""Hosts of many kinds, by the recorded answers of their tools: every GPU that is there is in the
file, or an error says which could not be read."""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatchcase
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from meshwright import units
from meshwright.cluster.catalog import catalog
from meshwright.cluster.discover import discover_toml, hardware_cluster, read_hardware
from meshwright.cluster.files import cluster_from
from meshwright.cluster.host import GpuReading, GpuSource, Host, ToolOutput
from meshwright.errors import MachineError
from meshwright.text import forbidden_character

MACHINES = Path(__file__).parents[2] / "examples" / "machines"
FOLDERS = sorted(path.name for path in MACHINES.iterdir() if path.is_dir())


def table(folder: Path, name: str) -> dict[str, Any]:
    return tomllib.loads((folder / name).read_text(encoding="utf-8"))


def answer_in(path: Path) -> tuple[str, ToolOutput]:
    """A command, with `*` for any arguments, and what is answered to it."""
    first, *lines, last = path.read_text(encoding="utf-8").splitlines(keepends=True)
    command, status = first.removeprefix("$ ").strip(), last.removeprefix("exit status ").strip()
    hung = status == "none in time"
    tool = command.split()[0]
    return command, ToolOutput(
        tool=tool, text="".join(lines), status=None if hung else int(status), timed_out=hung
    )


def seen_in(row: dict[str, Any]) -> GpuReading:
    capability = tuple(row["capability"]) if "capability" in row else None
    memory = units.parse_bytes(row["memory"])
    return GpuReading(name=row["name"], memory=memory, capability=capability, uuid=row.get("uuid"))


def way_in(how: str, told: dict[str, Any]) -> GpuSource:
    note = (f"{how} sees no GPU: {told['warning']}",) if "warning" in told else ()
    return GpuSource(name=how, gpus=tuple(map(seen_in, told.get("gpus", []))), notes=note)


def recorded(folder: Path) -> Host:
    """The host that a folder holds the answers of."""
    given = table(folder, "host.toml")
    answers = dict(answer_in(path) for path in sorted(folder.glob("*.txt")))
    files: dict[str, str] = given.get("files", {})

    def run(command: tuple[str, ...]) -> ToolOutput:
        line = " ".join(command)
        for pattern, answer in answers.items():
            if fnmatchcase(line, pattern):
                return answer
        is_there = any(pattern.split()[0] == command[0] for pattern in answers)
        assert not is_there, f"no answer to {line} is recorded"
        return ToolOutput(tool=command[0], installed=False, status=None)

    def names(place: str) -> tuple[str, ...]:
        inside = (path.removeprefix(f"{place}/") for path in files if path.startswith(f"{place}/"))
        return tuple(sorted({path.partition("/")[0] for path in inside}))

    torch, nvml = given.get("torch"), given.get("nvml")
    return Host(
        run=run,
        read=lambda place: files.get(place, ""),
        names=names,
        torch=lambda: (torch["built"], way_in("PyTorch", torch)) if torch else None,
        nvml=lambda: way_in("NVML", nvml) if nvml else None,
        environment=given.get("environment", {}),
        name="host",
        cores=given["cores"],
        memory=units.parse_bytes(given["memory"]),
    )


def counted(devices: tuple[str, ...]) -> list[str]:
    return [f"{len([*run])} x {kind}" for kind, run in groupby(devices)]


@pytest.mark.parametrize("name", FOLDERS)
def test_every_gpu_is_in_the_file_or_named_in_the_error(name: str) -> None:
    folder = MACHINES / name
    expected, host = table(folder, "expected.toml"), recorded(folder)
    if "error" in expected:
        with pytest.raises(MachineError) as caught:
            read_hardware(host)
        for words in expected["error"]:
            assert words in str(caught.value)
        assert not forbidden_character(str(caught.value), lines=True)
        return
    found = read_hardware(host)
    cluster, notes = hardware_cluster(found)
    assert counted(cluster.nodes[0].devices) == expected["devices"]
    for kind, memory in expected.get("memory", {}).items():
        assert cluster.types[kind].memory == units.parse_bytes(memory), kind
    for words in expected.get("notes", []):
        assert any(words in note for note in notes), (words, notes)
    for shown, told in re.findall(r"shows (\d+) cards .* tells of (\d+)", "\n".join(notes)):
        assert int(shown) > int(told), "a note only where the bus shows more"
    assert cluster_from(tomllib.loads(discover_toml(found)), source=name) == cluster


@pytest.mark.parametrize("name", FOLDERS)
def test_what_cannot_be_read_is_left_out_only_when_that_is_asked_for(name: str) -> None:
    folder = MACHINES / name
    expected, host = table(folder, "expected.toml"), recorded(folder)
    if "error" not in expected:
        assert read_hardware(host, partial=True) == read_hardware(host)
    elif "partial" in expected:
        found = read_hardware(host, partial=True)
        assert counted(hardware_cluster(found)[0].nodes[0].devices) == expected["partial"]
        assert any(note.startswith("LEFT OUT") for note in found.notes)
    else:
        with pytest.raises(MachineError):
            read_hardware(host, partial=True)


@pytest.mark.parametrize("name", FOLDERS)
def test_the_cores_are_to_be_had_on_every_host(name: str) -> None:
    host = recorded(MACHINES / name)
    cluster, notes = hardware_cluster(read_hardware(host, cpus=True))
    assert cluster.nodes[0].devices == ("cpu",) * host.cores
    assert "The cores, as asked: one process for each; GPUs were not looked for." in notes


def test_hosts_that_say_nothing_of_gpus_are_the_only_ones_without() -> None:
    """No tool that fails, and no card that no tool reads, is taken for processors."""
    for name in FOLDERS:
        devices = table(MACHINES / name, "expected.toml").get("devices", [])
        assert name.startswith("cpu-") == any(each.endswith("x cpu") for each in devices), name


def test_a_slice_has_its_share_of_the_figures() -> None:
    cluster, _ = hardware_cluster(read_hardware(recorded(MACHINES / "mig-a100-unequal-slices")))
    whole, part = catalog()["A100-40"].type, cluster.types["A100-40-3g.20gb"]
    assert part.peak["bf16"] == pytest.approx(whole.peak["bf16"] * 3 / 7)
    assert part.memory_bandwidth == whole.memory_bandwidth / 2
    assert cluster.types["A100-40-1g.5gb"].memory_bandwidth == whole.memory_bandwidth / 8
    assert cluster.nodes[0].inside.shared
