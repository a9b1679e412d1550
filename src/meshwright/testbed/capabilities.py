"""Finds out by trying what this machine permits: namespaces, shaping, latency, CPU quotas."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import field
from pathlib import Path

from meshwright.records import record

COMMAND_SECONDS = 20.0
"""Time after which a system command counts as failed."""


@record
class Quotas:
    """Names the control group in which CPU quotas can be set."""

    version: int
    """Version of the control group file system: 1 or 2."""
    folder: str
    """Folder below which control groups can be created."""


@record
class Capabilities:
    """Says what can be emulated on this machine; `missing` gives the reason why anything else
    cannot."""

    namespaces: bool = False
    """True if there can be network namespaces with links between them."""
    shaper: str | None = None
    """Queueing discipline that limits a link's rate: `htb` (small packets can overtake) or `tbf`
    (they cannot)."""
    priority: bool = False
    """True if small packets can be told from large ones (by the u32 classifier)."""
    latency: bool = False
    """True if packets can be delayed (by netem)."""
    quotas: Quotas | None = None
    cubic: bool = False
    """True if TCP's usual congestion control, for which the queues of shaped links are made, is
    available, whatever the host's default is."""
    missing: dict[str, str] = field(default_factory=dict)


def probe_capabilities(probe: str) -> Capabilities:
    """Tries everything in a temporary network namespace called `probe`."""
    quotas, no_quotas = _quotas()
    missing = {"CPU quotas": no_quotas} if no_quotas else {}
    reason = _no_namespaces(probe)
    if reason:
        return Capabilities(quotas=quotas, missing={"namespaces and link rates": reason, **missing})
    try:
        works = {name: _error(text.format(probe=probe).split()) for name, text in TRIALS.items()}
    finally:
        _error(["ip", "netns", "delete", probe])
    if works["veth"] or works["bridge"]:
        reason = f"veth: {works['veth'] or 'works'}; bridge: {works['bridge'] or 'works'}"
        return Capabilities(quotas=quotas, missing={"namespaces and link rates": reason, **missing})
    shaper = next((name for name in ("htb", "tbf") if not works[name]), None)
    if shaper is None:
        missing["link rates"] = f"htb: {works['htb']}; tbf: {works['tbf']}"
    if works["netem"]:
        missing["link latency"] = f"netem: {works['netem']}"
    priority = shaper == "htb" and not works["u32"]
    if not priority:
        missing["small packets first"] = works["u32"] or "needs htb"
    return Capabilities(
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
    """Returns the reason why there can be no network namespaces; empty if there can."""
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
"""Commands that try each feature, run in this order in a namespace of their own."""


def _error(command: list[str]) -> str:
    """Runs a command and returns its error message; empty if it succeeds."""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False
    )
    text = " ".join(done.stderr.split())
    return "" if done.returncode == 0 else text or f"exit status {done.returncode}"


def _quotas() -> tuple[Quotas | None, str]:
    """Returns where quotas can be set without touching an existing control group, and the reason if
    that is nowhere."""
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
    """Returns True if a group below the root of a version 1 hierarchy has a quota; the root itself
    has none."""
    if not os.access(folder, os.W_OK):
        return True
    probe = folder / f"mwprobe{os.getpid()}"
    probe.mkdir()
    try:
        return (probe / "cpu.cfs_quota_us").exists()
    finally:
        probe.rmdir()


def _hierarchies() -> list[tuple[int, Path]]:
    """Returns (version, folder) of each control group file system that is mounted."""
    mounts = Path("/proc/mounts")
    found = []
    for line in mounts.read_text().splitlines() if mounts.exists() else ():
        _, folder, kind, options, *_ = line.split()
        if kind == "cgroup" and "cpu" in options.split(","):
            found.append((1, Path(folder)))
        elif kind == "cgroup2":
            found.append((2, Path(folder)))
    return sorted(found)
