"""Several processes on one device, with gloo for messages: do they learn what one learns?

gpu.py's case starts this file once for each rank.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import gpu_staged_group
import torch
import torch.distributed as dist
from again import start_again
from gpu_findings import Findings
from gpu_training import (
    SHAPES,
    TIMEOUT_SECONDS,
    Shape,
    batch_of,
    engine_of,
    engine_step,
    plan_of,
    start_alone,
)

from meshwright.cluster.spec import Precision
from meshwright.plan.spec import Plan
from meshwright.program.instructions import Program
from meshwright.runtime.world import World, connect

PLANS = {
    2: {"pipeline": (2, 1), "data": (1, 2)},
    4: {"pipeline": (4, 1), "data": (1, 4), "both": (2, 2)},
}
"""By processes: stages and data width."""
TOLERANCE: dict[str, float] = {"fp32": 1e-4, "bf16": 1e-2}
"""Of losses, relative: sums come in another order."""
STEPS = 4


def shape_for(kind: str) -> Shape:
    """As many layers as the longest pipeline has stages, and rows for every replica."""
    shape = SHAPES["tiny" if kind == "cpu" else "small"]
    return Shape(**{**vars(shape), "rows": 4, "micro_batches": 4})


def processes(device: torch.device, found: Findings) -> None:
    """A row for each plan and precision."""
    start_alone(device)
    found.table("processes", "plan", "precision", "step, ms", "one process, ms", "loss apart")
    shape = shape_for(device.type)
    precisions: tuple[Precision, ...] = ("fp32",) if device.type == "cpu" else ("fp32", "bf16")
    alone = {p: _trained(shape, plan_of(shape, p), device) for p in precisions}
    for ranks in (2,) if device.type == "cpu" else (2, 4):
        for name, precision, losses, seconds in _started(ranks, precisions, device, found):
            wanted, once = alone[precision]
            apart = max(abs(a - b) / abs(b) for a, b in zip(losses, wanted, strict=True))
            found.row(ranks, name, precision, 1e3 * seconds, 1e3 * once, apart)
            found.check(
                apart <= TOLERANCE[precision],
                f"{ranks} processes, {name}, {precision}: losses differ by {apart:.2g}",
            )
    found.note("Messages go through the host: step times say what that costs, nothing of a link's.")


Trained = tuple[str, Precision, list[float], float]
"""Plan, precision, the loss of each step, and the seconds of the last one."""


def _started(
    ranks: int, precisions: tuple[Precision, ...], device: torch.device, found: Findings
) -> list[Trained]:
    """What the processes of a world of that size say of its plans; nothing if one has failed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "losses.json"
        arguments = [str(out), "--device", device.type, "--precisions", *precisions]
        try:
            start_again(ranks, arguments, script=__file__)
        except SystemExit as end:
            found.check(False, f"{ranks} processes: one ended with {end.code}")
            return []
        return [tuple(each) for each in json.loads(out.read_text())]


def _trained(
    shape: Shape, plan: Plan, device: torch.device, *, staged: bool = False
) -> tuple[list[float], float]:
    """The loss of each step, and the seconds of the last."""

    def together(plan: Plan, program: Program) -> World:
        return connect(
            plan, program, timeout_seconds=TIMEOUT_SECONDS, device=device.type,
            backend=gpu_staged_group.BACKEND, environ={**os.environ, "LOCAL_RANK": "0"},
        )  # fmt: skip

    batch, losses, seconds = batch_of(shape), [], 0.0
    with engine_of(shape, plan, device, world=together if staged else None) as engine:
        for _ in range(STEPS):
            began = time.perf_counter()
            losses.append(engine_step(engine, batch))
            seconds = time.perf_counter() - began
    return losses, seconds


def main() -> None:
    """Train by every plan, as one rank; the first one writes what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--precisions", nargs="+", required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(options.device, *((0,) if options.device == "cuda" else ()))
    gpu_staged_group.register()
    dist.init_process_group(gpu_staged_group.BACKEND)
    shape, told = shape_for(device.type), []
    for name, (stages, data) in PLANS[dist.get_world_size()].items():
        for precision in options.precisions:
            plan = plan_of(shape, precision, stages=stages, data=data)
            told.append((name, precision, *_trained(shape, plan, device, staged=True)))
    if dist.get_rank() == 0:
        options.out.write_text(json.dumps(told))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads need not be taken apart


if __name__ == "__main__":
    main()
