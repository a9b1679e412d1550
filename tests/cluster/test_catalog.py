"""The catalogue of device types."""

import pytest

from meshwright.cluster.catalog import catalog, read_catalog, type_reported_as
from meshwright.errors import ClusterError

FIRST = ["T4", "V100-16", "V100", "V100-32", "A10G", "A10", "L4", "A100-40", "A100-80"]
WANTED = [
    "H20",
    "H800",
    "A800",
    "H100-NVL",
    "A6000",
    "RTX2080Ti",
    "TitanRTX",
    "GH200",
    "P40",
    "P100",
    "MI300A",
    "Gaudi3",
    "TPU-v3",
    "TPU-v4",
    "TPU-v5e",
    "TPU-v5p",
    "TPU-v6e",
    "RTX2060",
    "RTX3080",
    "RTX3080-12",
    "RTX4060Ti-16",
    "RTX5090",
    "RTXA2000",
    "RTX6000-Ada",
    "L40",
    "L20",
    "A2",
    "A16",
    "A30",
    "A40",
    "B100",
    "GB200",
    "B300",
    "GB300",
    "MI50",
    "MI60",
    "MI100",
    "MI210",
    "MI325X",
    "MI350X",
    "MI355X",
    "W6800",
    "W7900",
    "RX6900XT",
    "RX7900XTX",
    "RX9070XT",
]
NO_GPU = ("TPU-", "Gaudi")
"""Beginnings of the names of accelerators that no driver of a GPU names."""


def test_all_types_are_there_with_their_sources():
    assert list(catalog())[: len(FIRST)] == FIRST
    assert set(WANTED) <= set(catalog())
    for name, entry in catalog().items():
        assert len(entry.type.source) > 60
        assert name.startswith("TPU-") or entry.type.peak["fp32"] > 0
        assert 0 < entry.type.attention_efficiency <= entry.type.matmul_efficiency <= 1
        assert entry.reported_as or name.startswith(NO_GPU) or name in ("cpu", "V100")


def test_every_name_that_drivers_tell_belongs_to_one_chip():
    """Cards that share a name differ in memory alone, or in what goes with it."""
    for name, entry in catalog().items():
        for other, its in catalog().items():
            if name < other and entry.reported_as == its.reported_as is not None:
                assert entry.architecture == its.architecture
                assert entry.type.memory != its.type.memory


def test_shares_follow_from_architecture_and_power_where_none_is_stated():
    a100, pcie = catalog()["A100-80"].type, catalog()["A100-80-PCIe"].type
    assert a100.matmul_efficiency == 0.88
    assert set(a100.matmul_shares or {}) == {"fp32", "fp64", "tf32"}
    assert pcie.matmul_shares is not None
    assert pcie.matmul_shares["bf16"].backward < pcie.matmul_shares["bf16"].forward < 0.88


def test_old_cards_offer_no_bf16():
    without = {entry.architecture for entry in catalog().values() if "bf16" not in entry.type.peak}
    assert without == {"pascal", "volta", "turing", "turing-gtx", "gcn", "rdna2"}


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-16GB", "V100-16"),
        ("Tesla V100-SXM2-32GB", "V100-32"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L40", "L40"),
        ("NVIDIA A100-SXM4-40GB", "A100-40"),
        ("NVIDIA A100-SXM4-80GB", "A100-80"),
        ("NVIDIA A100 80GB PCIe", "A100-80-PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GeForce RTX 3090", "RTX3090"),
        ("NVIDIA GeForce RTX 3090 Ti", "RTX3090Ti"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("NVIDIA GeForce RTX 4090 D", "RTX4090D"),
        ("AMD Instinct MI250X", "MI250X"),
        ("AMD Instinct MI300X", "MI300X"),
        ("AMD Instinct MI300A", "MI300A"),
        ("Tesla V100S-PCIE-32GB", "V100S"),
        ("NVIDIA A100-PCIE-40GB", "A100-40-PCIe"),
        ("NVIDIA H100 NVL", "H100-NVL"),
        ("NVIDIA H200 NVL", "H200-NVL"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA GeForce RTX 4080 SUPER", "RTX4080-SUPER"),
        ("NVIDIA GeForce RTX 3070 Ti Laptop GPU", "RTX3070Ti-Laptop"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX6000-Ada"),
        ("Quadro RTX 6000", "QuadroRTX6000"),
        ("NVIDIA RTX A6000", "A6000"),
        ("AMD Radeon RX 7900 XT", "RX7900XT"),
        ("AMD Radeon RX 7900 XTX", "RX7900XTX"),
        ("Tesla T10", None),
        ("NVIDIA RTX 6000D", None),
        ("", None),
    ],
)
def test_driver_names_lead_to_their_type_and_to_no_sibling(reported, name):
    assert type_reported_as(reported) == name


def test_of_one_name_the_card_with_the_nearest_memory_is_taken():
    name = "Navi 31 [Radeon RX 7900 XT/7900 XTX/7900M]"
    assert type_reported_as(name, 20 * 2**30) == "RX7900XT"
    assert type_reported_as(name, 24 * 2**30) == "RX7900XTX"
    assert type_reported_as("NVIDIA GeForce RTX 3080", 11 * 2**30) == "RTX3080-12"


GOOD = """\
[X1]
architecture = "ada"
watts = 300
memory = "15 GiB"
memory_bandwidth = "500 GB/s"
peak = { fp32 = "30 TFLOP/s" }
inside = { bandwidth = "12 GB/s", latency = "10 us" }
source = "here"
"""


@pytest.mark.parametrize(
    ("old", "new", "field", "words"),
    [
        ('"15 GiB"', '"30000 GiB"', "X1.memory", "16 TiB"),
        ('"15 GiB"', '"15"', "X1.memory", "a quantity like"),
        ('"500 GB/s"', '"500 GB"', "X1.memory_bandwidth", "500 GB"),
        ('"30 TFLOP/s"', '"30000 TFLOP/s"', "X1.peak.fp32", "Check the units of peak.fp32"),
        ('"30 TFLOP/s"', '"3 GFLOP/s"', "X1.peak.fp32", "FLOP for each byte"),
        ("watts = 300", "watts = 30000", "X1.watts", "5000 W"),
        ('"ada"', '"adda"', "X1.architecture", "ada"),
        ("watts = 300", "watts = 300\nwats = 3", "X1.wats", "unknown"),
    ],
)
def test_an_entry_that_no_device_has_is_refused_by_file_and_field(old, new, field, words):
    assert list(read_catalog(GOOD, "mine.toml")) == ["X1"]
    with pytest.raises(ClusterError) as caught:
        read_catalog(GOOD.replace(old, new), "mine.toml")
    assert f"mine.toml: {field}" in str(caught.value)
    assert words in str(caught.value)
