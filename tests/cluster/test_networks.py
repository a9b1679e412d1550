"""Every interface of a host: which one is used, why, and that its speed was not measured."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.cluster.host import GpuSource, Host, ToolOutput
from meshwright.cluster.networks import USUAL_NETWORK, read_network, read_rate
from meshwright.cluster.spec import Link

ROUTE = """\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth0\t00000000\t01001FAC\t0003\t0\t0\t100\t00000000\t0\t0\t0
"""


def card(name: str, speed: str, state: str = "up") -> dict[str, str]:
    place = f"/sys/class/net/{name}"
    return {
        f"{place}/speed": speed,
        f"{place}/operstate": state,
        f"{place}/device/vendor": "0x15b3",
    }


def adapter(name: str, rate: str, layer: str, state: str = "4: ACTIVE") -> dict[str, str]:
    place = f"/sys/class/infiniband/{name}/ports/1"
    return {f"{place}/rate": rate, f"{place}/link_layer": layer, f"{place}/state": state}


def host(*files: dict[str, str]) -> Host:
    every = {
        "/proc/net/route": ROUTE,
        **{path: text for own in files for path, text in own.items()},
    }

    def names(place: str) -> tuple[str, ...]:
        inside = (path.removeprefix(f"{place}/") for path in every if path.startswith(f"{place}/"))
        return tuple(sorted({path.partition("/")[0] for path in inside}))

    return Host(
        run=lambda command: ToolOutput(tool=command[0], installed=False, status=None),
        read=lambda place: every.get(place, ""),
        names=names,
        torch=lambda: None,
        nvml=lambda: GpuSource(name="NVML"),
        environment={},
        name="host",
        cores=1,
        memory=2**30,
    )


ETHERNET = card("eth0", "25000\n")
HDR = (adapter("mlx5_0", "200 Gb/sec (4X HDR)", "InfiniBand\n"),
       adapter("mlx5_1", "200 Gb/sec (4X HDR)", "InfiniBand\n"))  # fmt: skip
ROCE = adapter("mlx5_2", "100 Gb/sec (4X EDR)", "Ethernet\n")


def test_adapters_with_remote_memory_access_are_used_together_and_infiniband_first() -> None:
    link, notes = read_network(host(ETHERNET, *HDR, ROCE))
    assert link == Link(bandwidth=50e9, latency=5e-6, kind="infiniband")
    used, rest = notes
    assert "InfiniBand, mlx5_0:1, mlx5_1:1, 400 Gbit/s together" in used
    assert used.endswith("NOT MEASURED.")
    assert "not used: mlx5_2:1 (100 Gbit/s), eth0 (25 Gbit/s)" in rest
    link, notes = read_network(host(ETHERNET, ROCE))
    assert link == Link(bandwidth=12.5e9, latency=5e-6, kind="roce")
    assert "RoCE" in notes[0]


def test_adapters_that_are_down_or_tell_no_rate_are_not_used() -> None:
    down = adapter("mlx5_0", "200 Gb/sec (4X HDR)", "InfiniBand\n", "1: DOWN")
    silent = adapter("mlx5_1", "", "InfiniBand\n")
    link, _ = read_network(host(ETHERNET, down, silent))
    assert link == Link(bandwidth=25e9 / 8, latency=USUAL_NETWORK.latency)


def test_a_second_card_is_named_and_the_default_route_decides() -> None:
    link, notes = read_network(
        host(ETHERNET, card("eth1", "100000\n"), card("eth2", "1000", "down"))
    )
    assert link
    assert link.bandwidth == 25e9 / 8
    assert notes == (
        "network: eth0, 25 Gbit/s as it reports: the default route is through it; NOT MEASURED.",
        "network: not used: eth1 (100 Gbit/s); the default route is through eth0.",
    )
    alone, notes = read_network(host(ETHERNET))
    assert alone == link
    assert notes == ()


def test_where_no_speed_is_told_none_is_made_up() -> None:
    assert read_network(host(card("eth0", "-1\n"))) == (None, ())
    assert read_network(host()) == (None, ())


@pytest.mark.parametrize(
    ("text", "rate"), [("400 Gb/sec (4X NDR)\n", 50e9), ("2.5 Gb/sec (1X SDR)", 2.5e9 / 8),
                       ("", None), ("0 Gb/sec", None)]
)  # fmt: skip
def test_the_rate_of_a_port_is_in_gigabits(text: str, rate: float | None) -> None:
    assert read_rate(text) == rate


@given(st.text())
def test_what_the_kernel_writes_is_a_rate_or_none(text: str) -> None:
    found = read_rate(text)
    assert found is None or found > 0
