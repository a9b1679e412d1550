"""Exports a plan as a configuration file of Hugging Face accelerate.

Names: src/accelerate/commands/config/config_args.py and src/accelerate/utils/dataclasses.py, 1.15.
Accelerate runs plain data parallelism itself, and stages and tensor parallelism through its
Megatron-LM plugin. The plugin reads a few numbers of the model and leaves the rest at Megatron's
defaults, which fit no Llama: `megatron_plugin.py` sets them all.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import replace

from meshwright.errors import PlanError, Problem
from meshwright.export import megatron
from meshwright.export.answers import (
    ASSUMED,
    Answers,
    ExportedTraining,
    PropertyAnswer,
    answer_lines,
    export_notes,
    export_refusals,
    format_value,
    grid_answers,
    irrelevant,
    is_rotary,
    listed_in_notes,
    notes_file,
    of_techniques,
    only,
    own_model_answers,
)
from meshwright.export.grid import (
    RegularGrid,
    blocks_by_stage,
    grid_of,
    precision_problems,
    schedule_problems,
)
from meshwright.export.launch_script import (
    PORT,
    by_node,
    is_node_by_node,
    stage_major,
    visible_devices,
)
from meshwright.export.writing import line_comment, shell_default
from meshwright.model.config import LanguageModel
from meshwright.model.spec import LayerGraph
from meshwright.plan.spec import Plan

TOOL = "accelerate"
PLUGIN_TOOL = "accelerate's Megatron-LM plugin"
_PLUGIN_FAMILIES = ("gpt2", "llama")
_NO_EXPERTS = "its Megatron-LM plugin has no experts"


def _family(value: str, _: ExportedTraining) -> str:
    known = value in _PLUGIN_FAMILIES
    return (
        ""
        if known
        else f"one of {', '.join(_PLUGIN_FAMILIES)}: its Megatron-LM plugin has no others"
    )


_YOURS = {
    **grid_answers(TOOL),
    "job.sequence": listed_in_notes("the length of a row, in your data: {} tokens"),
    "job.optimizer": listed_in_notes(
        "the optimizer, which is your own code: {} (sgd is without momentum)"
    ),
}
OWN: Answers = {
    **_YOURS,
    **own_model_answers(),
    "training.clip_norm": listed_in_notes(
        "clipping: accelerator.clip_grad_norm_(model.parameters(), {})"
    ),
    "training.gradient_sums": irrelevant("fp32, as the weights"),
    "training.attention_within_documents": irrelevant("as your code has it: over a whole row"),
    "training.sharded_weights": irrelevant("off by default"),
    "training.sequence_parallel": irrelevant("off by default"),
}
"""Rules for plans that accelerate runs without the plugin."""
PLUGIN: Answers = {
    **_YOURS,
    **of_techniques(PLUGIN_TOOL),
    **{name: answer for name, answer in megatron.ANSWERS.items() if name.startswith("model.")},
    "model.family": replace(
        megatron.ANSWERS["model.family"],
        wanted=_family,
    ),
    "model.attention": only("fused", lacks="its Megatron-LM plugin does not choose kernels"),
    "model.experts": only(0, lacks=_NO_EXPERTS),
    "model.chosen": only(0, lacks=_NO_EXPERTS),
    "model.auxiliary_loss": only(0.0, lacks=_NO_EXPERTS),
    "training.clip_norm": PropertyAnswer("`megatron_lm_gradient_clipping`"),
    "training.gradient_sums": megatron.ANSWERS["training.gradient_sums"],
    "training.attention_within_documents": irrelevant("off by default"),
    "training.sharded_weights": PropertyAnswer("`megatron_lm_use_custom_fsdp`"),
    "training.sequence_parallel": PropertyAnswer("`megatron_lm_sequence_parallelism`"),
}
"""Rules for plans that need accelerate's Megatron-LM plugin."""
_ATTRIBUTES = {"norm_epsilon": "layernorm_epsilon"}
"""Attributes of Megatron's arguments whose names differ from the command line's."""


def accelerate_files(plan: Plan, model: LayerGraph, language: LanguageModel) -> dict[str, str]:
    """Returns the files `accelerate.yaml`, `launch.sh` and, if needed, `megatron_plugin.py` and the
    notes. Raises PlanError if accelerate cannot run the plan."""
    grid = grid_of(plan, TOOL)
    blocks = blocks_by_stage(plan, grid, model, TOOL)
    asked = ExportedTraining(plan, grid, language)
    answers = PLUGIN if _needs_plugin(grid) else OWN
    PlanError.check(
        [
            *schedule_problems(plan, grid, TOOL),
            *precision_problems(plan, TOOL, "bf16", "fp16", "fp32"),
            *_order_problems(plan, grid),
            *_plugin_problems(plan, grid, blocks),
            *export_refusals(TOOL, answers, asked),
        ]
    )
    plugin = {"megatron_plugin.py": _plugin(asked)} if _needs_plugin(grid) else {}
    return {
        "accelerate.yaml": _yaml(asked, blocks),
        "launch.sh": _launch(grid),
        **plugin,
        **notes_file(TOOL, [*_to_be_used(grid), *export_notes(answers, asked)]),
    }


def _to_be_used(grid: RegularGrid) -> Iterator[str]:
    if _needs_plugin(grid):
        yield (
            "megatron_plugin.py, which your code is to use: without it accelerate builds another "
            "model, and recomputes all of its blocks"
        )


def _needs_plugin(grid: RegularGrid) -> bool:
    return grid.stages > 1 or grid.tensor > 1


def _order_problems(plan: Plan, grid: RegularGrid) -> Iterator[Problem]:
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


def _plugin_problems(plan: Plan, grid: RegularGrid, blocks: tuple[int, ...]) -> Iterator[Problem]:
    if not _needs_plugin(grid):
        return
    if len(set(blocks[:-1])) > 1 or 0 in blocks:
        found = f"{'|'.join(map(str, blocks))} blocks"
        wanted = "equally many on all stages but the last: the plugin has no other option"
        yield Problem(plan.name, "pipelines[0].stages", found, wanted)


def _of_techniques(asked: ExportedTraining) -> tuple[list[str], list[str]]:
    """Returns what techniques tell the plugin: its own settings, and arguments of Megatron."""
    lines = dict.fromkeys(answer_lines(PLUGIN, asked, "stage"))
    arguments = [line for line in lines if line.startswith("--")]
    return [line for line in lines if line not in arguments], arguments


def _plugin(asked: ExportedTraining) -> str:
    """Returns the text of `megatron_plugin.py`: Megatron's arguments by their attribute names."""
    given = [
        *answer_lines(PLUGIN, asked, "model", "training"),
        f"--seq-length {asked.plan.job.sequence}",
        *_of_techniques(asked)[1],
    ]
    pairs = [_attribute(line) for line in given]
    arguments = "\n".join(f"    {name!r}: {value!r}," for name, value in pairs)
    return f'''"""For MegatronLMPlugin(other_megatron_args=ARGUMENTS), given to Accelerator."""

ARGUMENTS = {{
{arguments}
}}
'''


def _attribute(line: str) -> tuple[str, object]:
    """Converts an argument of Megatron's command line to the attribute that holds it, and its
    value."""
    option, _, text = line.removeprefix("--").partition(" ")
    name = option.replace("-", "_")
    if name == "disable_bias_linear":
        return "add_bias_linear", False
    return _ATTRIBUTES.get(name, name), _read(text) if text else True


def _read(text: str) -> object:
    if text == "None":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:  # a word, or a number of the other kind
            continue
    return text


def _yaml(asked: ExportedTraining, blocks: tuple[int, ...]) -> str:
    plan, grid = asked.plan, asked.grid
    order = stage_major(grid)
    kind = "MULTI_GPU" if len(order) > 1 else "NO"
    precision = plan.job.precision
    text = [
        line_comment(
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
        turned, dropped = is_rotary(asked.language), asked.language.attention_dropout
        text += [
            "megatron_lm_config:",
            f"  megatron_lm_tp_degree: {grid.tensor}",
            f"  megatron_lm_pp_degree: {grid.stages}",
            f"  megatron_lm_num_micro_batches: {grid.micro_batches}",
            f"  megatron_lm_gradient_clipping: {ASSUMED['training.clip_norm']}",
            f"  megatron_lm_attention_dropout: {format_value(dropped)}",
            f"  megatron_lm_hidden_dropout: {ASSUMED['model.dropout']}",
            f"  megatron_lm_use_rotary_position_embeddings: {str(turned).lower()}",
            "  megatron_lm_context_parallel_size: 1",
            "  megatron_lm_use_custom_fsdp: false",
            "  megatron_lm_recompute_activations: false",
            "  megatron_lm_sequence_parallelism: false",
            *(f"  {line}" for line in _of_techniques(asked)[0]),
        ]
        if blocks[-1] != blocks[0]:
            text.append(f"  megatron_lm_decoder_last_pipeline_num_layers: {blocks[-1]}")
    return "\n".join(text) + "\n"


def _launch(grid: RegularGrid) -> str:
    nodes = by_node(stage_major(grid))
    names = [node for node, _ in nodes]
    lines = [
        "#!/usr/bin/env bash",
        "# Start it on every node, in this folder: bash launch.sh NODE [more arguments]",
        line_comment(
            f"NODE: {shlex.join(names)} (names that the others can reach; else set MASTER_ADDR)"
        ),
        "set -euo pipefail",
        f'export MASTER_ADDR="${{MASTER_ADDR:-{shell_default(names[0])}}}"',
        f'export MASTER_PORT="${{MASTER_PORT:-{PORT}}}"',
    ]
    if grid.tensor > 1:
        lines.append("export CUDA_DEVICE_MAX_CONNECTIONS=1")  # Megatron requires it
    if not _needs_plugin(grid):
        lines.append(f"export ACCELERATE_GRADIENT_ACCUMULATION_STEPS={grid.micro_batches}")
    lines += ['node="${1:?the name of this node}"; shift', 'case "$node" in']
    for rank, (node, devices) in enumerate(nodes):
        lines += [
            f"  {shlex.quote(node)})",
            f"    CUDA_VISIBLE_DEVICES={visible_devices(devices)} accelerate launch \\",
            f"      --config_file accelerate.yaml --machine_rank {rank} \\",
            '      --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" \\',
            '      "${SCRIPT:-train.py}" "$@"',
            "    ;;",
        ]
    lines += ['  *) echo "no ranks on $node" >&2; exit 2 ;;', "esac"]
    return "\n".join(lines) + "\n"
