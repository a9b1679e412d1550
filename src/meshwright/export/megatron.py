"""A plan as the arguments of Megatron-LM's pretrain_gpt.py.

Names: megatron/training/arguments.py and the records it makes options of, Megatron-LM 0.20.
"""

from __future__ import annotations

from collections.abc import Iterator

from meshwright.errors import PlanError, Problem
from meshwright.export.grid import (
    Grid,
    blocks_by_stage,
    grid_of,
    is_even,
    only_precisions,
    only_schedule,
)
from meshwright.export.launch import is_node_by_node, launch_script, replica_major, stage_major
from meshwright.model.config import LanguageModel
from meshwright.model.spec import LayerGraph
from meshwright.plan.spec import Plan

TOOL = "Megatron-LM"
_RECOMPUTE = [
    "--recompute-granularity full",
    "--recompute-method uniform",
    "--recompute-num-layers 1",
]


def megatron_files(plan: Plan, model: LayerGraph, language: LanguageModel) -> dict[str, str]:
    """`arguments.txt` and `launch.sh`. Raises PlanError where Megatron-LM has no such plan."""
    grid = grid_of(plan, TOOL)
    blocks = blocks_by_stage(plan, grid, model, TOOL)
    PlanError.check(
        [*_order_problems(plan, grid), *only_precisions(plan, TOOL, "bf16", "fp16", "fp32")]
    )
    order = stage_major(grid)
    mapping: list[str] = []
    if not is_node_by_node(order) and is_node_by_node(replica_major(grid)):
        order, mapping = replica_major(grid), ["--use-tp-pp-dp-mapping"]
    lines = [
        *_model(language, plan.job.sequence),
        f"--tensor-model-parallel-size {grid.tensor}",
        f"--pipeline-model-parallel-size {grid.stages}",
        *_split(blocks, grid),
        *mapping,
        f"--micro-batch-size {grid.rows}",
        f"--global-batch-size {plan.job.global_batch}",
        *_precision(plan),
        f"--optimizer {'sgd' if plan.job.optimizer == 'sgd' else 'adam'}",
        *(_RECOMPUTE if grid.recompute else []),
        *(["--overlap-grad-reduce"] if grid.data > 1 else []),
    ]
    command = '"${MEGATRON:?the folder of Megatron-LM}/pretrain_gpt.py" $(cat arguments.txt)'
    environment = "CUDA_DEVICE_MAX_CONNECTIONS=1" if grid.tensor > 1 else ""
    return {
        "arguments.txt": "\n".join(lines) + "\n",
        "launch.sh": launch_script(order, command, environment=environment),
    }


def _order_problems(plan: Plan, grid: Grid) -> Iterator[Problem]:
    """Interleaving is as many micro-batches at a time as there are groups of devices."""
    if plan.schedule != "interleaved-1f1b" or grid.chunks == 1 or grid.stages == 1:
        yield from only_schedule(plan, grid, TOOL)
    elif grid.micro_batches % grid.stages:
        wanted = f"a multiple of {grid.stages}: {TOOL} interleaves so many at a time"
        yield Problem(plan.name, "pipelines[0].micro_batches", str(grid.micro_batches), wanted)


def _model(c: LanguageModel, sequence: int) -> list[str]:
    lines = [
        f"--num-layers {c.layers}",
        f"--hidden-size {c.width}",
        f"--ffn-hidden-size {c.hidden}",
        f"--num-attention-heads {c.heads}",
        f"--kv-channels {c.head}",
        f"--seq-length {sequence}",
        f"--max-position-embeddings {max(c.positions, sequence)}",
        f"--vocab-size {c.vocabulary}",
        "--tokenizer-type NullTokenizer",
    ]
    if c.kv_heads != c.heads:
        lines += ["--group-query-attention", f"--num-query-groups {c.kv_heads}"]
    if c.family != "gpt2":
        lines += [
            "--position-embedding-type rope",
            f"--rotary-base {round(c.rotary_base)}",
            "--normalization RMSNorm",
            "--swiglu",
            "--disable-bias-linear",
        ]
    if not c.tied:
        lines.append("--untie-embeddings-and-output-weights")
    if c.experts:
        lines += [f"--num-experts {c.experts}", f"--moe-router-topk {c.chosen}"]
    return lines


def _split(blocks: tuple[int, ...], grid: Grid) -> list[str]:
    """Nothing where stages are even but their number on each device, a count for the first or last
    stage where the others are, and the layout of every stage else."""
    if grid.stages == 1 or is_even(blocks):
        return [f"--num-virtual-stages-per-pipeline-rank {grid.chunks}"] * (grid.chunks > 1)
    first, *middle, last = blocks
    ends_only = grid.chunks == 1 and first > 0 and last > 0 and len(set(middle)) == 1
    if not ends_only:
        stages = ["t" * count for count in blocks]
        stages[0], stages[-1] = "E" + stages[0], stages[-1] + "L"
        return [f"--pipeline-model-parallel-layout {'|'.join(stages)}"]
    lines = []
    if first != middle[0]:
        lines.append(f"--decoder-first-pipeline-num-layers {first}")
    if last != middle[0]:
        lines.append(f"--decoder-last-pipeline-num-layers {last}")
    return lines


def _precision(plan: Plan) -> list[str]:
    """Gradients are summed in fp32, as the plan has it."""
    if plan.job.precision == "fp32":
        return []
    return [f"--{plan.job.precision}", "--accumulate-allreduce-grads-in-fp32"]
