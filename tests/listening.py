"""Who listens where, as `ss` tells it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable

import pytest


def listening(pids: Iterable[int], namespace: str | None = None) -> dict[int, set[str]]:
    """The addresses at which each of these processes waits for connections."""
    if shutil.which("ss") is None:
        pytest.skip("needs ss (package iproute2)")
    inside = ["ip", "netns", "exec", namespace] if namespace else []
    command = [*inside, "ss", "--no-header", "--listening", "--numeric", "--processes"]
    found: dict[int, set[str]] = {pid: set() for pid in pids}
    for kind in ("--tcp", "--udp"):
        text = subprocess.run([*command, kind], capture_output=True, text=True, check=True).stdout
        for line in text.splitlines():
            address = line.split()[3].rpartition(":")[0]
            for pid in map(int, re.findall(r"pid=(\d+)", line)):
                if pid in found:
                    found[pid].add(address)
    return found
