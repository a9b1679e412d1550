"""Describes the machine that this process runs on as a cluster of one node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from meshwright.cluster.catalog import catalog, type_reported_as
from meshwright.cluster.files import dump_cluster
from meshwright.cluster.gpus import HIDING, detect_gpus
from meshwright.cluster.hardware import (
    MachineHardware,
    device_type_of,
    islands_in,
    links_inside,
)
from meshwright.cluster.host import Host, this_host
from meshwright.cluster.networks import USUAL_NETWORK, read_network
from meshwright.cluster.spec import Cluster, DeviceType, Node, Site
from meshwright.cluster.wiring import read_islands, read_mesh, read_wiring
from meshwright.text import printable

_HOST_SHARE = 0.9
"""Share of the host's memory that training processes may use; the system keeps the rest."""


def discover(*, cpus: bool = False) -> Cluster:
    """Returns a cluster of this machine's GPUs, or of its cores as processes of type `cpu` if it
    has none or if `cpus` is set. Raises MachineError if a GPU cannot be read."""
    return hardware_cluster(read_hardware(cpus=cpus))[0]


def discover_toml(found: MachineHardware | None = None) -> str:
    """Returns the text of a cluster file for this machine (or for `found`), with comments on the
    figures that were not measured."""
    cluster, notes = hardware_cluster(found or read_hardware())
    head = ("Found on this machine. Figures are nominal: `meshwright profile` measures.", *notes)
    return "".join(f"# {printable(line)}\n" for line in head) + "\n" + dump_cluster(cluster)


def hardware_cluster(found: MachineHardware) -> tuple[Cluster, tuple[str, ...]]:
    """Returns the cluster that describes a found machine, and notes for its user on where the
    figures come from."""
    types, notes = _types(found)
    names = tuple(kind.name for kind in types)
    islands = None
    if found.gpus:
        known = (type_reported_as(gpu.name) for gpu in found.gpus)
        type_names = tuple(name for name in known if name)
        inside, origin = links_inside(found, type_names)
        islands, origins = islands_in(found, type_names)
        notes += [origin, *origins] if len(types) > 1 else []
    else:
        inside = catalog()["cpu"].inside
        notes.append(
            "The cores, as asked: one process for each; GPUs were not looked for."
            if found.cpus
            else "No GPU was found: one process per core."
        )
    network = found.network or USUAL_NETWORK
    if not found.network:
        notes.append("network: this machine does not tell its speed; 10 Gbit/s is ASSUMED.")
    node = Node(
        name=found.name,
        site="main",
        devices=names,
        inside=inside,
        network=network,
        islands=islands,
    )
    cluster = Cluster(
        name=found.name,
        types={kind.name: kind for kind in sorted(types, key=lambda kind: kind.name)},
        nodes=(node,),
        sites=(Site(name="main"),),
    )
    return cluster, tuple(dict.fromkeys((*found.notes, *notes)))


def _types(found: MachineHardware) -> tuple[list[DeviceType], list[str]]:
    if found.gpus:
        typed = [device_type_of(gpu) for gpu in found.gpus]
        return number_equal_names([kind for kind, _ in typed]), [note for _, note in typed if note]
    cpu = catalog()["cpu"].type
    memory = int(_HOST_SHARE * found.memory) // found.cores >> 20 << 20
    note = f"memory: {_HOST_SHARE:.0%} of the host's, divided by its {found.cores} cores"
    kind = replace(cpu, memory=memory, source=f"{note}. {cpu.source}")
    return [kind] * found.cores, []


def number_equal_names(kinds: Sequence[DeviceType]) -> list[DeviceType]:
    """Numbers the types that have one name but unlike figures: the second becomes
    `RTX-3080-10GiB-2`."""
    own: dict[tuple[str, str], str] = {}
    apart = []
    for kind in kinds:
        key = (kind.name, repr(kind))
        if key not in own:
            taken = {*own.values()}
            names = (kind.name, *(f"{kind.name}-{number}" for number in range(2, len(kinds) + 2)))
            own[key] = next(name for name in names if name not in taken)
        apart.append(replace(kind, name=own[key]))
    return apart


def read_hardware(
    host: Host | None = None, *, cpus: bool = False, partial: bool = False
) -> MachineHardware:
    """Asks the machine for its GPUs (not if `cpus` is set), cores, memory and network speed. With
    `partial`, GPUs that cannot be read are left out; without it, they raise MachineError."""
    asked = host or this_host()
    network, on_networks = read_network(asked)
    found = MachineHardware(
        name=asked.name,
        cores=asked.cores,
        memory=asked.memory,
        network=network,
        notes=on_networks,
        cpus=cpus,
    )
    if cpus:
        return found
    looked = detect_gpus(asked, partial=partial)
    found = replace(found, gpus=looked.gpus, notes=(*looked.notes, *on_networks))
    if len(looked.gpus) < 2:
        return found
    text = asked.run(("nvidia-smi", "topo", "-m")).text
    islands, island_wiring = read_islands(text, len(looked.gpus))
    lanes = read_mesh(text, len(looked.gpus))
    if islands and any(name in asked.environment for name in HIDING):
        note = "islands: NOT TOLD, since the environment may order the GPUs otherwise"
        islands, island_wiring = (), None
        found = replace(found, notes=(*found.notes, note))
    return replace(
        found,
        wiring=read_wiring(text),
        islands=islands,
        island_wiring=island_wiring,
        mesh_lanes=lanes,
    )
