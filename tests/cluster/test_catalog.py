"""The catalogue of device types."""

import pytest

from meshwright.cluster.catalog import catalog, type_reported_as

NAMES = [
    "T4",
    "V100-16",
    "V100",
    "V100-32",
    "A10G",
    "A10",
    "L4",
    "A100-40",
    "A100-80",
    "A100-80-PCIe",
    "L40S",
    "H100",
    "H100-PCIe",
    "H200",
    "B200",
    "RTX3090",
    "RTX4090",
    "MI250",
    "MI250X",
    "MI300X",
    "cpu",
]


def test_all_types_are_there_with_their_sources():
    assert list(catalog()) == NAMES
    for entry in catalog().values():
        assert len(entry.type.source) > 60
        assert entry.type.peak["fp32"] > 0
        assert 0 < entry.type.attention_efficiency <= entry.type.matmul_efficiency <= 1


def test_old_cards_offer_no_bf16():
    without = {name for name, entry in catalog().items() if "bf16" not in entry.type.peak}
    assert without == {"T4", "V100-16", "V100", "V100-32"}


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
        ("NVIDIA L40", None),
        ("NVIDIA A100-SXM4-40GB", "A100-40"),
        ("NVIDIA A100-SXM4-80GB", "A100-80"),
        ("NVIDIA A100 80GB PCIe", "A100-80-PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GeForce RTX 3090", "RTX3090"),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("AMD Instinct MI250X", "MI250X"),
        ("AMD Instinct MI300X", "MI300X"),
    ],
)
def test_driver_names_lead_to_their_type_and_to_no_sibling(reported, name):
    assert type_reported_as(reported) == name
