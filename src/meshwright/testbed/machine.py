"""What this machine permits: namespaces, shaping, latency, CPU quotas. Found out by trying."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import field
from pathlib import Path

from meshwright.records import record

COMMAND_SECONDS = 20.0


@record
class Quotas:
    """Where CPU quotas can be set."""

    version: int
    """Of the cgroups."""
    folder: str


@record
class Abilities:
    """What can be emulated here; `missing` has the reason for everything that cannot."""

    namespaces: bool = False
    shaper: str | None = None
    """`htb` (packets may overtake) or `tbf`."""
    priority: bool = False
    """Small packets can be told from large ones (the u32 classifier)."""
    latency: bool = False
    quotas: Quotas | None = None
    cubic: bool = False
    """TCP's usual congestion control can be had, whatever the host's default is: shaped queues
    are made for it."""
    missing: dict[str, str] = field(default_factory=dict)


def abilities(probe: str) -> Abilities:
    """Tries everything in a throw-away network namespace called `probe`."""
    quotas, no_quotas = _quotas()
    missing = {"CPU quotas": no_quotas} if no_quotas else {}
    reason = _no_namespaces(probe)
    if reason:
        return Abilities(quotas=quotas, missing={"namespaces and link rates": reason, **missing})
    try:
        works = {name: _error(text.format(probe=probe).split()) for name, text in TRIALS.items()}
    finally:
        _error(["ip", "netns", "delete", probe])
    if works["veth"] or works["bridge"]:
        reason = f"veth: {works['veth'] or 'works'}; bridge: {works['bridge'] or 'works'}"
        return Abilities(quotas=quotas, missing={"namespaces and link rates": reason, **missing})
    shaper = next((name for name in ("htb", "tbf") if not works[name]), None)
    if shaper is None:
        missing["link rates"] = f"htb: {works['htb']}; tbf: {works['tbf']}"
    if works["netem"]:
        missing["link latency"] = f"netem: {works['netem']}"
    priority = shaper == "htb" and not works["u32"]
    if not priority:
        missing["small packets first"] = works["u32"] or "needs htb"
    return Abilities(
        namespaces=True,
        shaper=shaper,
        priority=priority,
        latency=not works["netem"],
        quotas=quotas,
        cubic="cubic" in _congestion_controls(),
        missing=missing,
    )


def _congestion_controls() -> list[str]:
    path = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")
    return path.read_text().split() if path.exists() else []


def _no_namespaces(probe: str) -> str:
    """Why there can be no network namespaces; empty if there can."""
    if sys.platform != "linux":
        return f"needs Linux, this is {sys.platform}"
    absent = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if absent:
        return f"needs the commands {' and '.join(absent)} (package iproute2)"
    if os.geteuid() != 0:
        return "needs root (CAP_NET_ADMIN and CAP_SYS_ADMIN)"
    return _error(["ip", "netns", "add", probe])


TRIALS = {
    "veth": "ip -n {probe} link add name a type veth peer name b",
    "bridge": "ip -n {probe} link add name c type bridge",
    "netem": "tc -n {probe} qdisc add dev b root netem delay 1ms",
    "tbf": "tc -n {probe} qdisc replace dev b root tbf rate 1mbit burst 4k latency 9ms",
    "htb": "tc -n {probe} qdisc add dev a root handle 1: htb default 2",
    "u32": "tc -n {probe} filter add dev a parent 1: protocol ip prio 1 "
    "u32 match u16 0x0000 0xff00 at 2 flowid 1:3",
}
"""One after the other, in a namespace of their own."""


def _error(command: list[str]) -> str:
    """What a command complains about; empty if it succeeds."""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False
    )
    text = " ".join(done.stderr.split())
    return "" if done.returncode == 0 else text or f"exit status {done.returncode}"


def _quotas() -> tuple[Quotas | None, str]:
    """Where quotas can be set without touching a control group that exists, else why not."""
    reasons = []
    for version, folder in _hierarchies():
        if version == 2:
            enabled = folder / "cgroup.subtree_control"
            if "cpu" not in enabled.read_text().split():
                reasons.append(f"{enabled} does not offer cpu, and it is not ours to change")
                continue
        elif not (folder / "cpu.cfs_quota_us").exists() and not _probe_quota(folder):
            reasons.append(f"{folder} has no cpu.cfs_quota_us")
            continue
        if os.access(folder, os.W_OK):
            return Quotas(version=version, folder=str(folder)), ""
        reasons.append(f"{folder} cannot be written to")
    return None, "; ".join(reasons) or "no cgroup file system is mounted"


def _probe_quota(folder: Path) -> bool:
    """Whether a group below the root of a version 1 hierarchy, which has no quota itself, gets
    one."""
    if not os.access(folder, os.W_OK):
        return True
    probe = folder / f"mwprobe{os.getpid()}"
    probe.mkdir()
    try:
        return (probe / "cpu.cfs_quota_us").exists()
    finally:
        probe.rmdir()


def _hierarchies() -> list[tuple[int, Path]]:
    mounts = Path("/proc/mounts")
    found = []
    for line in mounts.read_text().splitlines() if mounts.exists() else ():
        _, folder, kind, options, *_ = line.split()
        if kind == "cgroup" and "cpu" in options.split(","):
            found.append((1, Path(folder)))
        elif kind == "cgroup2":
            found.append((2, Path(folder)))
    return sorted(found)
