"""How soon a run is training: `meshwright train` beside torchrun, which starts the same ranks.

python benchmarks/startup.py --ranks 2,4,8 --rounds 5

Seconds from starting the command to the end of the first step, and processor seconds until the
command has ended. Ours reads and checks the plan and prepares the folder, too; torchrun only starts
the ranks, in a folder that is prepared. Both take turns; medians are printed.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from meshwright.runtime.run_folder import METRICS

LIMIT_SECONDS = 300.0
MESHWRIGHT = [sys.executable, "-m", "meshwright"]
CLUSTER = """\
format = 1
name = "here"
[[node]]
name = "here"
devices = ["{ranks} x cpu"]
"""


def prepared(folder: Path, ranks: int) -> None:
    """A plan in which every rank has work, and a run folder for torchrun."""
    (folder / "cluster.toml").write_text(CLUSTER.format(ranks=ranks))
    job = ["--global-batch", str(ranks), "--sequence", "16", "--precision", "fp32"]
    for arguments in (
        ["plan", "--model", "gpt-tiny", "--cluster", "cluster.toml", *job],
        ["train", "plan.json", "--steps", "1", "--dry-run", "-o", "theirs"],
    ):
        subprocess.run([*MESHWRIGHT, *arguments], cwd=folder, check=True, stdout=subprocess.DEVNULL)


def command(side: str, ranks: int) -> list[str]:
    """What starts the ranks."""
    if side == "ours":
        return [*MESHWRIGHT, "train", "plan.json", "--steps", "1", "-o", "ours"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, f"--nproc-per-node={ranks}", "-m", "meshwright.runtime.worker", "theirs"]


def measured(folder: Path, side: str, ranks: int) -> tuple[float, float]:
    """Seconds to the end of the first step, and processor seconds in all."""
    metrics = folder / side / METRICS
    metrics.unlink(missing_ok=True)
    before = processor_seconds()
    began = time.monotonic()
    process = subprocess.Popen(
        command(side, ranks), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while not (metrics.exists() and metrics.stat().st_size):
            if process.poll() is not None or time.monotonic() > began + LIMIT_SECONDS:
                raise SystemExit(f"{side}: no first step")
            time.sleep(0.005)
        seconds = time.monotonic() - began
        process.wait(LIMIT_SECONDS)
    finally:
        process.kill()
        process.wait()
    return seconds, processor_seconds() - before


def processor_seconds() -> float:
    """Of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line for every number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", default="2,4")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    print(f"{'ranks':>5}{'torchrun':>11}{'ours':>9}{'ratio':>8}{'CPU: torchrun':>16}{'ours':>8}")
    for ranks in map(int, options.ranks.split(",")):
        found: dict[str, list[tuple[float, float]]] = {"theirs": [], "ours": []}
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            prepared(folder, ranks)
            for turn in range(options.rounds):
                for side in sorted(found, reverse=turn % 2 == 0):
                    found[side].append(measured(folder, side, ranks))
        wall = {side: median(seconds for seconds, _ in each) for side, each in found.items()}
        used = {side: median(seconds for _, seconds in each) for side, each in found.items()}
        ratio = median(t[0] / o[0] for t, o in zip(found["theirs"], found["ours"], strict=True))
        print(
            f"{ranks:5}{wall['theirs']:9.2f} s{wall['ours']:7.2f} s{ratio:7.2f}x"
            f"{used['theirs']:14.1f} s{used['ours']:6.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
