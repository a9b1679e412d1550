"""A plan as a configuration file of Hugging Face accelerate.

Names: src/accelerate/commands/config/config_args.py and src/accelerate/utils/dataclasses.py, 1.15:
data parallelism of its own, stages and tensor parallelism through its Megatron-LM plugin.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from meshwright.errors import PlanError, Problem
from meshwright.export.grid import (
    Grid,
    blocks_by_stage,
    grid_of,
    only_precisions,
    only_schedule,
)
from meshwright.export.launch import PORT, by_node, is_node_by_node, stage_major, visible
from meshwright.export.writing import comment, shell_default
from meshwright.model.config import LanguageModel
from meshwright.model.spec import LayerGraph
from meshwright.plan.spec import Plan

TOOL = "accelerate"
_PLUGIN_FAMILIES = ("gpt2", "llama")


def accelerate_files(plan: Plan, model: LayerGraph, language: LanguageModel) -> dict[str, str]:
    """`accelerate.yaml` and `launch.sh`. Raises PlanError where accelerate has no such plan."""
    grid = grid_of(plan, TOOL)
    blocks = blocks_by_stage(plan, grid, model, TOOL)
    PlanError.check(
        [
            *only_schedule(plan, grid, TOOL),
            *only_precisions(plan, TOOL, "bf16", "fp16", "fp32"),
            *_order_problems(plan, grid),
            *_plugin_problems(plan, grid, language, blocks),
            *_recompute_problems(plan, grid),
        ]
    )
    return {"accelerate.yaml": _yaml(plan, grid, blocks), "launch.sh": _launch(grid)}


def _needs_plugin(grid: Grid) -> bool:
    return grid.stages > 1 or grid.tensor > 1


def _order_problems(plan: Plan, grid: Grid) -> Iterator[Problem]:
    order = stage_major(grid)
    if not is_node_by_node(order):
        wanted = "stages that follow each other node by node, as accelerate numbers its processes"
        yield Problem(plan.name, "devices", "nodes that hold parts of several stages", wanted)
        return
    counts = [len(devices) for _, devices in by_node(order)]
    if len(set(counts)) > 1:
        found = f"{', '.join(map(str, counts))} devices of its nodes"
        wanted = "equally many: accelerate starts num_processes / num_machines on each"
        yield Problem(plan.name, "devices", found, wanted)


def _plugin_problems(
    plan: Plan, grid: Grid, language: LanguageModel, blocks: tuple[int, ...]
) -> Iterator[Problem]:
    if not _needs_plugin(grid):
        return
    if language.family not in _PLUGIN_FAMILIES:
        wanted = f"a model of the Megatron-LM plugin: {', '.join(_PLUGIN_FAMILIES)}"
        yield Problem(plan.name, "model", language.name, wanted)
    if len(set(blocks[:-1])) > 1 or 0 in blocks:
        found = f"{'|'.join(map(str, blocks))} blocks"
        wanted = "equally many on all stages but the last: the plugin has no other option"
        yield Problem(plan.name, "pipelines[0].stages", found, wanted)


def _recompute_problems(plan: Plan, grid: Grid) -> Iterator[Problem]:
    if grid.recompute:
        wanted = "none: accelerate leaves recomputation of whole blocks to the model's own code"
        mend = "export it without, and call the model's gradient_checkpointing_enable()"
        yield Problem(plan.name, "pipelines", "stages that recompute", wanted, mend)


def _yaml(plan: Plan, grid: Grid, blocks: tuple[int, ...]) -> str:
    order = stage_major(grid)
    kind = "MULTI_GPU" if len(order) > 1 else "NO"
    precision = plan.job.precision
    lines = [
        comment(
            f"{plan.name}: {grid.rows} rows of {plan.job.sequence} tokens in a batch of the data"
        ),
        f"# loader, {grid.micro_batches} batches and {plan.job.global_batch} rows in a step.",
        "compute_environment: LOCAL_MACHINE",
        f"distributed_type: {'MEGATRON_LM' if _needs_plugin(grid) else kind}",
        "machine_rank: 0",
        f"mixed_precision: '{'no' if precision == 'fp32' else precision}'",
        f"num_machines: {len(by_node(order))}",
        f"num_processes: {len(order)}",
        "rdzv_backend: static",
        "same_network: true",
        "use_cpu: false",
    ]
    if _needs_plugin(grid):
        lines += [
            "megatron_lm_config:",
            f"  megatron_lm_tp_degree: {grid.tensor}",
            f"  megatron_lm_pp_degree: {grid.stages}",
            f"  megatron_lm_num_micro_batches: {grid.micro_batches}",
            "  megatron_lm_gradient_clipping: 1.0",
            "  megatron_lm_recompute_activations: false",
            "  megatron_lm_sequence_parallelism: false",
            "  megatron_lm_use_distributed_optimizer: false",
        ]
        if blocks[-1] != blocks[0]:
            lines.append(f"  megatron_lm_decoder_last_pipeline_num_layers: {blocks[-1]}")
    return "\n".join(lines) + "\n"


def _launch(grid: Grid) -> str:
    nodes = by_node(stage_major(grid))
    names = [node for node, _ in nodes]
    lines = [
        "#!/usr/bin/env bash",
        "# Start it on every node, in this folder: bash launch.sh NODE [more arguments]",
        comment(
            f"NODE: {shlex.join(names)} (names that the others can reach; else set MASTER_ADDR)"
        ),
        "set -euo pipefail",
        f'export MASTER_ADDR="${{MASTER_ADDR:-{shell_default(names[0])}}}"',
        f'export MASTER_PORT="${{MASTER_PORT:-{PORT}}}"',
    ]
    if not _needs_plugin(grid):
        lines.append(f"export ACCELERATE_GRADIENT_ACCUMULATION_STEPS={grid.micro_batches}")
    lines += ['node="${1:?the name of this node}"; shift', 'case "$node" in']
    for rank, (node, devices) in enumerate(nodes):
        lines += [
            f"  {shlex.quote(node)})",
            f"    CUDA_VISIBLE_DEVICES={visible(devices)} accelerate launch \\",
            f"      --config_file accelerate.yaml --machine_rank {rank} \\",
            '      --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" \\',
            '      "${SCRIPT:-train.py}" "$@"',
            "    ;;",
        ]
    lines += ['  *) echo "no ranks on $node" >&2; exit 2 ;;', "esac"]
    return "\n".join(lines) + "\n"
