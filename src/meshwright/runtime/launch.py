"""Plan to processes: the torchrun commands it stands for, and running them on this machine."""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

from meshwright.cluster.spec import node_of
from meshwright.plan.spec import Plan
from meshwright.runtime.failure import cause
from meshwright.runtime.run import LOGS, METRICS

MODULE = "meshwright.runtime.worker"
POLL_SECONDS = 0.2
GRACE_SECONDS = 10.0
"""How long processes may take to end by themselves before they are killed."""


def torchrun_commands(plan: Plan, folder: Path, *, master_port: int = 29500) -> tuple[str, ...]:
    """One command per node, to be started on that node with the run's folder in reach."""
    nodes = [(node, len(list(devices))) for node, devices in groupby(plan.devices, key=node_of)]
    rendezvous = f"--master-addr={nodes[0][0]} --master-port={master_port}"
    return tuple(
        f"torchrun --nnodes={len(nodes)} --node-rank={rank} --nproc-per-node={processes} "
        f"{rendezvous} -m {MODULE} {shlex.quote(str(folder))}"
        for rank, (_, processes) in enumerate(nodes)
    )


def local_command(world_size: int, folder: Path, module: str = MODULE) -> list[str]:
    """All ranks of the plan as processes of this machine."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1"]
    logs = [f"--log-dir={folder / LOGS}", "--redirects=3"]
    return [*torchrun, f"--nproc-per-node={world_size}", *logs, "-m", module, str(folder)]


def run_here(
    world_size: int,
    folder: Path,
    *,
    module: str = MODULE,
    on_metrics: Callable[[dict[str, float]], None] = lambda _: None,
    environment: dict[str, str] | None = None,
) -> None:
    """Run all ranks here and wait. Each new line of metrics.jsonl is handed to `on_metrics`.

    Raises the MeshwrightError of the first rank that fails, or a TrainingError that says which one
    was lost. No process outlives the call, whatever ends it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stale in (folder / METRICS, *folder.glob("failure-*.json")):
        stale.unlink(missing_ok=True)
    with (folder / "launcher.log").open("w") as log:
        process = subprocess.Popen(
            local_command(world_size, folder, module),
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
            start_new_session=True,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
        try:
            _follow(process, folder / METRICS, on_metrics)
        finally:
            _reap(process)
    if process.returncode != 0:
        raise cause(folder, process.returncode)


def _die_with_parent() -> None:
    """Ask Linux to end the launcher when we are killed; torchrun then ends its workers."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _follow(
    process: subprocess.Popen[bytes], metrics: Path, on_metrics: Callable[[dict[str, float]], None]
) -> None:
    position = 0
    while True:
        ended = process.poll() is not None
        if metrics.exists():
            with metrics.open() as lines:
                lines.seek(position)
                text = lines.read()
            whole = text[: text.rfind("\n") + 1]
            position += len(whole.encode())
            for line in whole.splitlines():
                on_metrics(json.loads(line))
        if ended:
            return
        time.sleep(POLL_SECONDS)


def _reap(process: subprocess.Popen[bytes]) -> None:
    """End the launcher and every worker in its session."""
    for ask in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            process.send_signal(ask)
            try:
                process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                continue
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def launch(plan: Plan) -> None:
    """Start the running script again as the plan's processes on this machine, and end with them.

    Under a launcher (torchrun, srun with its variables set) it does nothing: the script goes on as
    one of the processes.
    """
    if "RANK" in os.environ:
        return
    count = f"--nproc-per-node={len(plan.devices)}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", count]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    sys.exit(subprocess.run([*torchrun, *sys.argv], env=environment, check=False).returncode)
