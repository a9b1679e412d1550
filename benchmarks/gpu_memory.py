"""Predicted memory of one process against what the device's allocator counts."""

from __future__ import annotations

import gc
from functools import partial

import memory
import torch
from gpu_findings import Findings
from gpu_training import TIMEOUT_SECONDS, start_alone, synchronize
from rehearsal import OPTIMIZERS

from meshwright.cost.constants import (
    CUBLAS_WORKSPACE_BYTES,
    CUDA_CONTEXT_BYTES,
    FRAGMENTATION,
    NCCL_COMMUNICATOR_BYTES,
)
from meshwright.model.spec import LayerGraph
from meshwright.plan.spec import Plan
from meshwright.program.compile import compile_plan
from meshwright.runtime.engine import Engine
from meshwright.runtime.run_folder import TrainingOptions
from meshwright.runtime.world import connect

STEPS = 3
"""The optimizer's states are there from the first one's end."""
CASES = tuple(
    memory.Case(model, "bf16", "adamw", 1024, rows, recompute=recompute)
    for model, rows in (("gpt-89M", 4), ("llama-103M", 8), ("mixtral-92M", 4))
    for recompute in (False, True)
)
TINY = tuple(
    memory.Case("llama-9M", "bf16", "adamw", 64, 2, recompute=recompute)
    for recompute in (False, True)
)
"""Without a GPU: on tensors that have no storage, as benchmarks/memory.py measures."""
LOW, HIGH = -0.03, 0.15
"""How far a prediction may be off: too low ends in a failure, too high only wastes memory."""
MIB = 2**20


def against_allocator(device: torch.device, found: Findings) -> None:
    """A row for each model, with and without recomputation."""
    found.table(
        "model", "recomputed", "predicted, MiB", "allocated, MiB", "error, %",
        "reserved / allocated",
    )  # fmt: skip
    before = None if device.type == "cpu" else _context(device)
    start_alone(device)
    for case in TINY if device.type == "cpu" else CASES:
        graph, _ = memory.graphs_of(case.model, case.precision, case.sequence)
        plan = memory.plan_of(case, len(graph.layers))
        predicted = sum(memory.predicted(case, graph, plan).values())
        allocated, reserved = (
            _on_fake_tensors(case, graph, plan)
            if device.type == "cpu"
            else _on_device(case, graph, plan, device)
        )
        error = predicted / allocated - 1
        found.row(
            case.model, case.recompute, predicted / MIB, allocated / MIB, 100 * error,
            None if reserved is None else reserved / allocated,
        )  # fmt: skip
        found.check(LOW <= error <= HIGH, f"{case.model}: prediction off by {100 * error:+.1f} %")
    found.note(f"Reserved beyond allocated is predicted as {FRAGMENTATION['gpu']:.0%} of a device.")
    if before is not None:
        _framework(device, before, found)


def _on_fake_tensors(case: memory.Case, graph: LayerGraph, plan: Plan) -> tuple[int, None]:
    """Bytes of the runtime's own step, counted without storage."""
    import torch.distributed as dist

    dist.destroy_process_group()
    make, inputs = partial(memory.made, case.model), memory.tokens_of(case.sequence)
    try:
        return memory.measured_peak(make, inputs, plan, graph, memory.rank_of(case)), None
    finally:
        start_alone(torch.device("cpu"))


def _on_device(
    case: memory.Case, graph: LayerGraph, plan: Plan, device: torch.device
) -> tuple[int, int]:
    """Most bytes allocated and reserved in the steps after the first one."""
    gc.collect()
    _fill_workspaces(device)
    torch.cuda.empty_cache()
    left = torch.cuda.memory_allocated(device)
    program = compile_plan(plan, graph, clipped=True)
    world = connect(plan, program, timeout_seconds=TIMEOUT_SECONDS, device=device.type)
    tokens = torch.zeros(plan.job.global_batch, case.sequence, dtype=torch.long)
    with Engine(
        memory.made(case.model), plan, inputs=(tokens[:2], tokens[:2]), graph=graph, world=world,
        optimizer=OPTIMIZERS[case.optimizer], options=TrainingOptions(),
    ) as engine:  # fmt: skip
        for step in range(STEPS):
            if step == 1:
                synchronize(device)
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
            engine.step(lambda first, last: (tokens[first:last], tokens[first:last]))
        synchronize(device)
        peaks = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return peaks[0] - left, peaks[1]


def _fill_workspaces(device: torch.device) -> None:
    """cuBLAS takes its memory from the allocator, with the first product of each thread: it is a
    framework's, and is predicted as such."""
    layer = torch.nn.Linear(64, 64, device=device, dtype=torch.bfloat16)
    layer(torch.ones(64, 64, device=device, dtype=torch.bfloat16)).sum().backward()


def _context(device: torch.device) -> int:
    """Bytes of a device that other processes, and this one's context, take before any tensor."""
    torch.zeros(1, device=device)
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def _framework(device: torch.device, before: int, found: Findings) -> None:
    """What the device is missing besides the allocator's, against what is predicted."""
    free, total = torch.cuda.mem_get_info(device)
    outside = total - free - torch.cuda.memory_reserved(device)
    stated = (CUDA_CONTEXT_BYTES, CUBLAS_WORKSPACE_BYTES, NCCL_COMMUNICATOR_BYTES)
    context, workspace, communicator = (size // MIB for size in stated)
    found.note(
        f"Outside the allocator: {before // MIB} MiB before the first kernel and {outside // MIB} "
        f"after all steps, other processes included; predicted are {context} for the context and "
        f"{communicator} for each communicator ({workspace} of cuBLAS are the allocator's)."
    )
