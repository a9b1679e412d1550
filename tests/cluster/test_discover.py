"""What machines say about themselves, and the cluster files that come of it."""

import json
import tomllib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.cluster.amd import read_amd_smi, read_rocm_smi
from meshwright.cluster.catalog import catalog
from meshwright.cluster.discover import (
    discover,
    discover_toml,
    hardware_cluster,
    number_equal_names,
)
from meshwright.cluster.estimate import DriverFigures, estimated_type
from meshwright.cluster.files import cluster_from
from meshwright.cluster.hardware import Gpu, MachineHardware, device_type_of, links_inside
from meshwright.cluster.host import GpuReading, GpuSource, ToolOutput, memory_rate
from meshwright.cluster.networks import USUAL_NETWORK, read_default_interface, read_speed
from meshwright.cluster.nvidia import read_gpus
from meshwright.cluster.pci import PciCard, read_lspci
from meshwright.cluster.spec import Link
from meshwright.cluster.wiring import read_wiring
from meshwright.errors import MachineError
from meshwright.text import forbidden_character

GIB = 2**30

DGX = """\
\x1b[4m\tGPU0\tGPU1\tGPU2\tGPU3\tNIC0\tNIC1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV12\tNV12\tNV12\tPXB\tSYS\t0-31\t0\t\tN/A
GPU1\tNV12\t X \tNV12\tNV12\tPXB\tSYS\t0-31\t0\t\tN/A
GPU2\tNV12\tNV12\t X \tNV12\tSYS\tPXB\t32-63\t1\t\tN/A
GPU3\tNV12\tNV12\tNV12\t X \tSYS\tPXB\t32-63\t1\t\tN/A
NIC0\tPXB\tPXB\tSYS\tSYS\t X \tSYS
NIC1\tSYS\tSYS\tPXB\tPXB\tSYS\t X

Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes
  PIX  = Connection traversing at most a single PCIe bridge
  NV#  = Connection traversing a bonded set of # NVLinks
"""

V100 = """\
\tGPU0\tGPU1\tGPU2\tGPU3\tCPU Affinity\tNUMA Affinity
GPU0\t X \tNV1\tNV2\tNV2\t0-31\t\tN/A
GPU1\tNV1\t X \tNV2\tNV1\t0-31\t\tN/A
GPU2\tNV2\tNV2\t X \tNV1\t0-31\t\tN/A
GPU3\tNV2\tNV1\tNV1\t X \t0-31\t\tN/A
"""


def pcie(kind: str) -> str:
    return f"\tGPU0\tGPU1\tCPU Affinity\nGPU0\t X \t{kind}\t0-15\nGPU1\t{kind}\t X \t0-15\n"


@pytest.mark.parametrize(
    ("text", "wiring"),
    [
        (DGX, "NV12"),
        (V100, "NV1"),
        (pcie("PHB"), "PHB"),
        (pcie("PIX"), "PIX"),
        ("\tGPU0\tCPU Affinity\nGPU0\t X \t0-15\n", None),
        ("", None),
    ],
)
def test_the_weakest_connection_between_gpus_is_read(text, wiring):
    assert read_wiring(text) == wiring


def smi(text: str, status: int | None = 0) -> ToolOutput:
    return ToolOutput(tool="nvidia-smi", text=text, status=status)


def test_gpus_are_read_from_query_output():
    text = "NVIDIA A100-SXM4-40GB, 40960, 8.0\nTesla T4, 15360, 7.5\nold driver, 16160\n"
    assert read_gpus(smi(text)) == GpuSource(
        name="nvidia-smi",
        gpus=(
            GpuReading(name="NVIDIA A100-SXM4-40GB", memory=40 * GIB, capability=(8, 0)),
            GpuReading(name="Tesla T4", memory=15 * GIB, capability=(7, 5)),
            GpuReading(name="old driver", memory=16160 * 2**20, capability=None),
        ),
    )
    for status in (0, 6):
        assert read_gpus(smi("No devices were found\n", status)) == GpuSource(name="nvidia-smi")


@given(st.text(), st.sampled_from([None, 0, 1, 2, 6, 9, 15, 255, -11]))
def test_whatever_a_tool_answers_is_gpus_or_trouble_or_its_word_that_there_are_none(text, status):
    way = read_gpus(smi(text, status))
    assert way.gpus or way.trouble or "No devices were found" in text
    if status not in (0, 14):
        assert way.trouble or way == GpuSource(name="nvidia-smi", notes=way.notes)
    for words in (way.trouble, *way.notes, *(each.name or "" for each in way.gpus)):
        assert not forbidden_character(words)


@pytest.mark.parametrize(
    "line",
    [
        "3b:00.0 3D controller: NVIDIA Corporation GV100GL [Tesla V100 SXM2 32GB] (rev a1)",
        "0000:3b:00.0 3D controller [0302]: NVIDIA Corporation GV100GL [Tesla V100 SXM2 32GB] "
        "[10de:1db5] (rev a1)",
        "0000:3b:00.0 3D controller [0302]: NVIDIA Corporation GV100GL [Tesla V100 SXM2 32GB] "
        "[10de:1db5]",
    ],
)
def test_lspci_is_read_with_and_without_numbers(line):
    (card,) = read_lspci(ToolOutput(tool="lspci", text=f"{line}\n3b:00.1 Audio device: NVIDIA\n"))
    assert (card.address, card.maker) == ("0000:3b:00.0", "NVIDIA")
    assert card.name == "NVIDIA Corporation GV100GL [Tesla V100 SXM2 32GB]"


@pytest.mark.parametrize(
    ("address", "maker", "code", "device", "integrated"),
    [
        ("0000:00:02.0", "Intel", "0300", "46a6", True),
        ("0000:29:00.0", "Intel", "0380", "0bda", False),
        ("0000:01:00.0", "Intel", "1200", "7d1d", True),
        ("0000:11:00.0", "AMD", "0300", "164e", True),
        ("0000:05:00.0", "AMD", "1200", "74a1", False),
        ("0000:03:00.0", "AMD", "0300", "67df", False),
        ("0000:03:00.0", "AMD", "0300", "", False),
        ("0000:00:02.0", "NVIDIA", "0300", "2204", False),
    ],
)
def test_graphics_in_a_processor_are_known_from_cards(address, maker, code, device, integrated):
    card = PciCard(address=address, maker=maker, code=code, device=device)
    assert card.is_integrated == integrated


def test_memory_is_read_from_every_shape_that_amd_smi_had():
    def told(size: object) -> object:
        gpu = {"gpu": 0, "asic": {"market_name": "AMD INSTINCT MI210"}, "vram": {"size": size}}
        (seen,) = read_amd_smi(json.dumps([gpu]))
        assert seen.name == "AMD Instinct MI210"
        return seen.memory or seen.quoted

    assert told({"value": 64, "unit": "GB"}) == told({"value": "65536", "unit": "MB"}) == 64 * GIB
    assert told(65536) == told({"value": 64 * GIB, "unit": "B"}) == 64 * GIB
    assert told({"value": 65536 * 1024, "unit": "KB"}) == 64 * GIB
    for size in ("N/A", {"value": "N/A", "unit": "MB"}, {"value": 1, "unit": "furlong"}, None):
        assert told(size) == "no memory of GPU 0"
    (nameless,) = read_rocm_smi('{"card10": {"Card Series": "N/A", "VRAM Total Memory (B)": "7"}}')
    assert nameless == GpuReading(name="AMD GPU", memory=7)


@given(st.text())
def test_what_amd_s_tools_answer_is_understood_or_known_not_to_be(text):
    assert read_rocm_smi(text) in (None, ()) or "card" in text
    assert read_amd_smi(text) in (None, ()) or "{" in text


ROUTES = """\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
docker0\t000011AC\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0
ens5\t00000000\t01001FAC\t0003\t0\t0\t100\t00000000\t0\t0\t0
"""


def test_the_network_is_that_of_the_default_route():
    assert read_default_interface(ROUTES) == "ens5"
    assert read_default_interface("\n".join(ROUTES.splitlines()[:2])) is None
    assert read_default_interface("") is None
    assert read_default_interface("head\nens5 00000000 1 2 3 4 5\n") is None
    assert read_speed("25000\n") == 25e9 / 8
    assert read_speed("-1\n") is read_speed("") is None


def test_known_gpus_take_the_catalogue_s_figures():
    gpus = (Gpu(name="Tesla T4", memory=15 * GIB, capability=(7, 5)),) * 4
    cluster, notes = hardware_cluster(
        MachineHardware(name="g4", gpus=gpus, wiring="PHB", network=Link(bandwidth=50e9 / 8))
    )
    assert cluster.types == {"T4": catalog()["T4"].type}
    assert cluster.nodes[0].devices == ("T4",) * 4
    assert cluster.nodes[0].inside == Link(bandwidth=12e9, latency=10e-6, shared=True)
    assert cluster.nodes[0].network.bandwidth == 50e9 / 8
    assert len(notes) == 1
    assert "PHB" in notes[0]


def test_nvlink_is_counted_in_lanes_of_its_generation():
    ampere = MachineHardware(
        name="a", gpus=(Gpu(name="NVIDIA A100-SXM4-40GB", memory=40 * GIB),), wiring="NV12"
    )
    assert links_inside(ampere, ("A100-40",))[0].bandwidth == 300e9
    blackwell = (Gpu(name="NVIDIA B200", memory=179 * GIB, capability=(10, 0)),)
    assert (
        links_inside(MachineHardware(name="b", gpus=blackwell, wiring="NV18"), ("B200",))[
            0
        ].bandwidth
        == 900e9
    )
    switch = links_inside(MachineHardware(name="s", gpus=blackwell, wiring="PXB"), ("B200",))[0]
    assert switch == Link(bandwidth=24e9, latency=10e-6)


FIGURES = DriverFigures(multiprocessors=84, clock=1.8e9, memory_rate=768e9)


def test_an_unknown_gpu_becomes_a_type_that_says_it_is_estimated():
    gpu = Gpu(name="NVIDIA Quadro GV/200", memory=48 * GIB, capability=(8, 6), figures=FIGURES)
    kind, note = device_type_of(gpu)
    assert kind.name == "Quadro-GV-200-48GiB"
    assert kind.memory == 47 * GIB
    assert kind.peak["bf16"] == pytest.approx(84 * 1.8e9 * 1024)
    assert kind.memory_bandwidth == 768e9
    assert "ESTIMATED" in note
    assert "ESTIMATED" in kind.source


TOLD = {
    "V100-32": ((7, 0), 80, 1530, 877, 4096),
    "T4": ((7, 5), 40, 1590, 5001, 256),
    "RTX2080Ti": ((7, 5), 68, 2100, 7000, 352),
    "A100-80": ((8, 0), 108, 1410, 1593, 5120),
    "A30": ((8, 0), 56, 1440, 1215, 3072),
    "RTX3090": ((8, 6), 82, 2100, 9751, 384),
    "A6000": ((8, 6), 84, 2100, 8001, 384),
    "A2": ((8, 6), 10, 1770, 6251, 128),
    "L4": ((8, 9), 58, 2040, 6251, 192),
    "RTX4090": ((8, 9), 128, 3120, 10501, 384),
    "RTX6000-Ada": ((8, 9), 142, 3105, 10001, 384),
    "H100": ((9, 0), 132, 1980, 2619, 5120),
    "B200": ((10, 0), 148, 1965, 3996, 8192),
    "RTX5090": ((12, 0), 170, 3090, 14001, 512),
    "P100": ((6, 0), 56, 1328, 715, 4096),
    "P40": ((6, 1), 30, 1531, 3615, 384),
}
"""What drivers tell of cards of the catalogue: capability, multiprocessors, highest clocks in MHz
of these and of the memory, and bits of its bus."""


@pytest.mark.parametrize("name", TOLD)
def test_an_estimate_is_within_half_of_the_datasheet(name):
    """As if the catalogue did not hold the card."""
    capability, count, clock, memory_clock, width = TOLD[name]
    figures = DriverFigures(
        multiprocessors=count,
        clock=clock * 1e6,
        memory_rate=memory_rate(memory_clock * 1e6, width),
    )
    true = catalog()[name].type
    brand = "GeForce " if name.startswith("RTX") and "Ada" not in name else ""
    found, _ = estimated_type("new", f"NVIDIA {brand}new", GIB, capability, figures, None)
    assert set(found.peak) >= set(true.peak) - {"fp64"}
    for precision in set(true.peak) - {"fp64"}:
        assert 1 / 1.5 < found.peak[precision] / true.peak[precision] < 1.5, precision
    assert 1 / 1.5 < found.memory_bandwidth / true.memory_bandwidth < 1.5


@pytest.mark.parametrize(
    ("chip", "units", "name"),
    [
        ("gfx908", 120, "MI100"),
        ("gfx90a", 104, "MI210"),
        ("gfx90a", 110, "MI250X"),
        ("gfx942", 304, "MI325X"),
        ("gfx950", 256, "MI355X"),
        ("gfx906", 60, "MI50"),
        ("gfx1030", 60, "W6800"),
        ("gfx1100", 96, "RX7900XTX"),
        ("gfx1201", 64, "RX9070XT"),
    ],
)
def test_an_unknown_card_of_amd_is_estimated_as_one_of_amd(chip, units, name):
    true = catalog()[name].type
    figures = DriverFigures(multiprocessors=units, memory_rate=true.memory_bandwidth, chip=chip)
    kind, _ = device_type_of(Gpu(name="AMD GPU", memory=64 * GIB, figures=figures))
    assert kind.name == "GPU-64GiB"
    for precision in set(true.peak) - {"fp64", "tf32"}:
        assert 1 / 1.5 < kind.peak[precision] / true.peak[precision] < 1.5, precision


@pytest.mark.parametrize(
    ("gpu", "missing"),
    [
        (Gpu(name="AMD GPU", memory=64 * GIB), "no generation, number of multiprocessors, memory"),
        (Gpu(name="", memory=64 * GIB), "a GPU without a name (64 GiB)"),
        (Gpu(name="New", memory=GIB, capability=(8, 9)), "no number of multiprocessors, memory"),
        (
            Gpu(
                name="New",
                memory=GIB,
                capability=(8, 9),
                figures=replace(FIGURES, memory_rate=None),
            ),
            "no memory clock and width of the bus",
        ),
        (
            Gpu(name="New", memory=GIB, figures=replace(FIGURES, chip="gfx802")),
            "too little: no generation",
        ),
    ],
)
def test_a_card_of_which_too_little_is_told_is_refused_with_the_fields_to_fill_in(gpu, missing):
    with pytest.raises(MachineError) as caught:
        device_type_of(gpu)
    for words in (missing, "memory_bandwidth, peak", "[device.NAME]"):
        assert words in str(caught.value)


@pytest.mark.parametrize(("total", "usable"), [(8 * GIB, 7 * GIB), (GIB, GIB // 2)])
def test_a_gib_of_a_gpu_is_reserved_but_never_more_than_half(total, usable):
    gpu = Gpu(name="Strange", memory=total, capability=(8, 6), figures=FIGURES)
    assert device_type_of(gpu)[0].memory == usable


def test_a_slice_of_a_known_gpu_is_not_taken_for_the_whole():
    kind, note = device_type_of(Gpu(name="NVIDIA A100-SXM4-40GB MIG 3g.20gb", memory=20 * GIB))
    assert kind.name == "A100-40-3g.20gb"
    assert kind.memory == 19 * GIB
    assert kind.peak["bf16"] == pytest.approx(catalog()["A100-40"].type.peak["bf16"] * 3 / 7)
    assert "a slice, 3g.20gb, with 3/7 of the peak" in note


@given(
    st.lists(
        st.builds(
            Gpu,
            name=st.sampled_from(
                [
                    "NVIDIA GeForce RTX 3080",
                    "GeForce RTX 3080",
                    "NVIDIA A100-SXM4-40GB",
                    "",
                    "cpu",
                    "Tesla T4",
                    "T4",
                    "AMD Instinct MI250X",
                    "GRID T4-8Q",
                    "NVIDIA H20",
                    "RTX 3080 10GB",
                ]
            ),
            memory=st.integers(2**24, 2**43),
            capability=st.sampled_from([(7, 5), (9, 0)]),
            figures=st.just(FIGURES),
            slice=st.sampled_from([None, "3g.20gb", "1g.5gb+me", "1c.3g.20gb", "strange"]),
            watts=st.sampled_from([None, 0.0, 100.0, 299.6, 300.4]),
            usual_watts=st.sampled_from([None, 300.0, 450.0]),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_every_gpu_keeps_the_memory_and_speed_of_its_own_type(gpus):
    """Whatever cards stand beside it, and whatever they are called."""
    found = MachineHardware(name="host", gpus=tuple(gpus), wiring="PHB", network=USUAL_NETWORK)
    cluster, _ = hardware_cluster(found)
    for gpu, name in zip(gpus, cluster.nodes[0].devices, strict=True):
        assert replace(cluster.types[name], name="") == replace(device_type_of(gpu)[0], name="")
    assert cluster_from(tomllib.loads(discover_toml(found)), source="here") == cluster


def test_unlike_types_of_one_name_are_numbered():
    kinds = [replace(catalog()["T4"].type, memory=gib * GIB) for gib in (14, 10, 14, 12)]
    names = [kind.name for kind in number_equal_names(kinds)]
    assert names == ["T4", "T4-2", "T4", "T4-3"]
    assert [kind.name for kind in number_equal_names(kinds[:2])] == ["T4", "T4-2"]


def test_a_type_is_called_the_same_whatever_stands_beside_it():
    cards = [Gpu(name="NVIDIA GeForce RTX 3080", memory=gib * GIB) for gib in (10, 12)]
    names = ["RTX3080", "RTX3080-12"]
    assert [device_type_of(card)[0].name for card in cards] == names
    for order in (cards, cards[::-1]):
        nodes = hardware_cluster(MachineHardware(name="desk", gpus=tuple(order)))[0].nodes
        assert sorted(nodes[0].devices) == names


def test_a_slice_is_never_faster_than_its_whole_gpu():
    """Whatever a driver of the future calls it."""
    kind, _ = device_type_of(Gpu(name="NVIDIA A100-SXM4-40GB MIG 9g.90gb", memory=40 * GIB))
    whole = catalog()["A100-40"].type
    assert kind.peak == whole.peak
    assert kind.memory_bandwidth == whole.memory_bandwidth


def test_slices_of_a_card_that_is_not_catalogued_have_their_share_too():
    whole = Gpu(name="NVIDIA A30", memory=24 * GIB, capability=(8, 0))
    part = Gpu(name="NVIDIA A30", memory=6 * GIB, capability=(8, 0), slice="1g.6gb", whole=24 * GIB)
    assert device_type_of(part)[0].name == "A30-1g.6gb"
    assert device_type_of(part)[0].peak["bf16"] == device_type_of(whole)[0].peak["bf16"] / 4
    assert device_type_of(part)[0].memory_bandwidth == device_type_of(whole)[0].memory_bandwidth / 4


def test_without_gpus_each_core_is_a_device():
    cluster, notes = hardware_cluster(MachineHardware(name="vm", cores=4, memory=40 * GIB))
    assert cluster.nodes[0].devices == ("cpu",) * 4
    assert cluster.types["cpu"].memory == 9 * GIB
    assert any("ASSUMED" in note for note in notes)


def test_this_machine_is_described_by_a_file_that_loads():
    text = discover_toml()
    assert text.startswith("# Found on this machine.")
    assert cluster_from(tomllib.loads(text), source="here") == discover()
