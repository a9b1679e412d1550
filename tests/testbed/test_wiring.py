"""The commands of a testbed's network: what they touch, and what they say is missing."""

from __future__ import annotations

from dataclasses import replace

from beds import EVERYTHING, NOTHING, bed, without_latency

from meshwright.testbed.lifecycle import design_testbed
from meshwright.testbed.network import as_text, wiring

ID = "mw-test"


def test_every_command_stays_in_namespaces_of_its_own() -> None:
    drawn = wiring(bed(), EVERYTHING, ID)
    for command in (*drawn.up, *drawn.down):
        if command[1] == "netns":
            assert command[3].startswith(ID)
        else:
            assert command[:2] in (("ip", "-n"), ("tc", "-n"))
            assert command[2] in drawn.namespaces


def test_what_is_added_is_deleted() -> None:
    drawn = wiring(bed(), EVERYTHING, ID)
    added = [c[3] for c in drawn.up if c[:3] == ("ip", "netns", "add")]
    assert added == [c[3] for c in drawn.down] == list(drawn.namespaces)


def test_links_are_shaped_both_ways_and_by_node() -> None:
    text = "\n".join(map(as_text, wiring(bed(), EVERYTHING, ID).up))
    for port in ("-n mw-test-n1 class add dev eth0", "-n mw-test-hub class add dev port1"):
        line = next(line for line in text.splitlines() if port in line)
        assert "rate 50000000bit" in line
    for port in ("out0", "in0"):
        assert f"class add dev {port} parent 1: classid 1:1 htb rate 20000000bit" in text
    assert "out1" not in text, "a site without uplink has no port of its own"


def test_half_of_a_latency_waits_at_each_end() -> None:
    text = "\n".join(map(as_text, wiring(bed(), EVERYTHING, ID).up))
    assert "dev eth0 parent 1:2 netem delay 2000us" in text
    assert "dev port0 parent 1:2 netem delay 2000us" in text


def test_a_direct_link_has_a_route_from_both_ends() -> None:
    lines = [as_text(c) for c in wiring(bed(), EVERYTHING, ID).up]
    assert (
        "ip -n mw-test-n0 route add 10.77.0.3/32 dev direct0 src 10.77.0.1 congctl cubic" in lines
    )
    assert (
        "ip -n mw-test-n2 route add 10.77.0.1/32 dev direct0 src 10.77.0.3 congctl cubic" in lines
    )


def test_without_netem_latency_is_said_to_be_absent() -> None:
    drawn = wiring(bed(), without_latency(EVERYTHING), ID)
    assert drawn.absent == ("link latencies (netem: unknown)",)
    assert not any("netem delay" in as_text(c) for c in drawn.up)


def test_tbf_stands_in_for_htb() -> None:
    able = replace(EVERYTHING, shaper="tbf", priority=False, latency=False,
                   missing={"small packets first": "needs htb", "link latency": "no"})  # fmt: skip
    drawn = wiring(bed(), able, ID)
    text = "\n".join(map(as_text, drawn.up))
    assert "htb" not in text
    assert "root tbf rate 50000000bit" in text
    assert "small packets first (needs htb)" in drawn.absent


def test_a_link_beyond_the_machine_is_left_alone_and_said() -> None:
    drawn = wiring(bed(bandwidth_scale=1e4), EVERYTHING, ID)
    assert not any("rate" in as_text(c) for c in drawn.up)
    assert any(each.startswith("rate of the uplink of east") for each in drawn.absent)


def test_without_namespaces_there_is_nothing_to_do_but_say_so() -> None:
    drawn = design_testbed(bed("quota"), NOTHING, ID)
    assert drawn.up == drawn.down == drawn.groups == ()
    assert drawn.running.testbed.mode == "dilation"
    assert drawn.running.shares["a:0"] == 0.4
    assert any("needs root" in each for each in drawn.running.absent)
    assert any("dilation in their place" in each for each in drawn.running.absent)


def test_quotas_get_a_group_for_each_device() -> None:
    drawn = design_testbed(bed("quota"), EVERYTHING, ID)
    assert dict(drawn.groups)["/sys/fs/cgroup/mw-test-d0"] == 0.4
    assert set(drawn.running.groups) == {"a:0", "a:1", "b:0", "c:0"}
    assert not drawn.running.shares, "the quota slows the device already"
