"""Exports a plan as the arguments of Megatron-LM's pretrain_gpt.py.

Names: megatron/training/arguments.py and the records from which it makes options, Megatron-LM 0.20.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from meshwright.errors import PlanError, Problem
from meshwright.export.answers import (
    LABEL,
    Answers,
    ExportedTraining,
    PropertyAnswer,
    answer_lines,
    block_answers,
    export_notes,
    export_refusals,
    format_value,
    grid_answers,
    irrelevant,
    notes_file,
    only,
    switch,
    written,
    written_by,
)
from meshwright.export.grid import (
    RegularGrid,
    blocks_by_stage,
    grid_of,
    is_even,
    precision_problems,
    schedule_problems,
)
from meshwright.export.launch_script import (
    is_node_by_node,
    launch_script,
    replica_major,
    stage_major,
)
from meshwright.model.config import LanguageModel
from meshwright.model.spec import LayerGraph
from meshwright.model.transformer.defaults import architecture_of, base_of
from meshwright.model.transformer.spec import Scaling
from meshwright.plan.spec import Plan

TOOL = "Megatron-LM"
_LLAMA_BLOCKS = [
    "--position-embedding-type rope",
    "--normalization RMSNorm",
    "--swiglu",
    "--disable-bias-linear",
]
_BLOCKS = {
    # Megatron's GELU is the tanh form wherever it is fused with the bias, which is the default.
    "gpt2": ["--position-embedding-type learned_absolute", "--normalization LayerNorm"],
    "llama": _LLAMA_BLOCKS,
    "mixtral": _LLAMA_BLOCKS,
}
"""Megatron's arguments for the blocks of each model family."""


def _family(_: str, asked: ExportedTraining) -> str:
    known = base_of(asked.language) in _BLOCKS
    return "" if known else f"one of {', '.join(_BLOCKS)}: {TOOL} has no such blocks"


def _scaled(value: Scaling, _: ExportedTraining) -> list[str] | None:
    """Returns the arguments for Llama 3's rotary scaling, the factor of which is the only figure
    that Megatron can change."""
    if value.kind != "llama3" or (value.low, value.high, value.original) != (1.0, 4.0, 8192):
        return None
    return ["--use-rope-scaling", f"--rope-scaling-factor {format_value(value.factor)}"]


_EXPRESSED: dict[str, Callable[[Any, ExportedTraining], list[str] | None]] = {
    "norm.epsilon": lambda _, __: [],
    "rotary.scaling": _scaled,
    "query_bias": lambda _, asked: _query_bias(asked),
    "query_norm": lambda value, _: ["--qk-layernorm"] if value == "head" else None,
}


def _query_bias(asked: ExportedTraining) -> list[str] | None:
    """Returns the argument for biases of queries, keys and values; a Llama with these is a Qwen."""
    return ["--add-qkv-bias"] if base_of(asked.language) != "gpt2" else None


def _positions(value: int, asked: ExportedTraining) -> list[str]:
    return [f"--max-position-embeddings {max(value, asked.plan.job.sequence)}"]


def _padding(value: int, asked: ExportedTraining) -> str:
    """Returns the note on padding of the vocabulary, which every tensor rank holds an equal part
    of."""
    over = -value % asked.grid.tensor
    ranks = f"so that {asked.grid.tensor} tensor ranks divide it"
    return f"the vocabulary is {value + over}, {over} more than {value}, {ranks}" if over else ""


def _groups(value: int, asked: ExportedTraining) -> list[str]:
    if value == asked.language.heads:
        return []
    return ["--group-query-attention", f"--num-query-groups {value}"]


def _rotary_base(value: float, asked: ExportedTraining) -> list[str]:
    return [] if base_of(asked.language) == "gpt2" else [f"--rotary-base {value:.0f}"]


def _whole(value: float, _: ExportedTraining) -> str:
    return "" if value == round(value) else f"a whole number: {TOOL} has no other rotary bases"


def _unfused(value: str, _: ExportedTraining) -> str:
    if value == "fused":
        return ""
    return (
        f"the scores: {TOOL}'s fused softmax keeps them in the precision of activations, where the "
        "plan counts a softmax in fp32 and its cast"
    )


def _residual_std(_: Any, asked: ExportedTraining) -> str:
    """Returns the note on initialisation: Megatron initialises every model as GPT-2 does."""
    if base_of(asked.language) == "gpt2":
        return ""
    return (
        "the first weights: what is added to the residual stream is drawn from a narrower "
        f"distribution, by sqrt(2 x {asked.language.layers}); the plan's model has one for all"
    )


def _experts(value: int, _: ExportedTraining) -> list[str]:
    return [f"--num-experts {value}"] * (value > 0)


def _chosen(value: int, asked: ExportedTraining) -> list[str]:
    return [f"--moe-router-topk {value}"] * (asked.language.experts > 0)


def _balancing(value: float, asked: ExportedTraining) -> list[str]:
    """Returns the arguments for balancing experts; without an auxiliary loss nothing balances
    them."""
    if not asked.language.experts:
        return []
    kind = "aux_loss" if value else "none"
    return [
        f"--moe-router-load-balancing-type {kind}",
        f"--moe-aux-loss-coeff {format_value(value)}",
    ]


def _optimizer(value: str, _: ExportedTraining) -> list[str]:
    """Returns the arguments for the optimizer; SGD in plans has no momentum, which would also take
    memory."""
    return ["--optimizer sgd", "--sgd-momentum 0"] if value == "sgd" else ["--optimizer adam"]


def _gradient_sums(_: Any, asked: ExportedTraining) -> list[str]:
    return ["--accumulate-allreduce-grads-in-fp32"] * (asked.plan.job.precision != "fp32")


ANSWERS: Answers = {
    **grid_answers(TOOL),
    "model.name": irrelevant(LABEL),
    "model.family": PropertyAnswer(
        "`--normalization`, `--swiglu`, `--disable-bias-linear`, `--position-embedding-type`",
        write=lambda _, asked: _BLOCKS[base_of(asked.language)],
        wanted=_family,
    ),
    "model.vocabulary": PropertyAnswer(
        "`--vocab-size`, padded for tensor ranks where they do not divide it (listed)",
        write=lambda value, _: [f"--vocab-size {value}", "--make-vocab-size-divisible-by 1"],
        note=_padding,
    ),
    "model.positions": written_by("`--max-position-embeddings`", _positions),
    "model.width": written("--hidden-size {}"),
    "model.layers": written("--num-layers {}"),
    "model.heads": written("--num-attention-heads {}"),
    "model.kv_heads": written_by("`--num-query-groups`", _groups),
    "model.head": written("--kv-channels {}"),
    "model.hidden": written("--ffn-hidden-size {}"),
    "model.tied": switch("--untie-embeddings-and-output-weights", when=False),
    "model.experts": written_by("`--num-experts`", _experts),
    "model.chosen": written_by("`--moe-router-topk`", _chosen),
    "model.rotary_base": PropertyAnswer(
        "`--rotary-base`, if whole", write=_rotary_base, wanted=_whole
    ),
    "model.levels": only(0, lacks=f"{TOOL} has no U-Transformers"),
    "model.attention": PropertyAnswer(
        "`--attention-backend`, if unfused (listed)",
        write=lambda value, _: ["--attention-backend unfused"] * (value == "unfused"),
        note=_unfused,
    ),
    "model.attention_dropout": written("--attention-dropout {}"),
    "model.dropout": written("--hidden-dropout {}"),
    "model.architecture": block_answers(
        TOOL,
        "`--norm-epsilon`, `--use-rope-scaling`, `--add-qkv-bias`, `--qk-layernorm`; what else is "
        "not usual is refused",
        lambda asked: [
            f"--norm-epsilon {format_value(architecture_of(asked.language).norm.epsilon)}"
        ],
        _EXPRESSED,
    ),
    "model.initial_std": PropertyAnswer(
        "`--init-method-std`; narrower on the residual stream (listed)",
        write=lambda value, _: [f"--init-method-std {format_value(value)}"],
        note=_residual_std,
    ),
    "model.auxiliary_loss": written_by("`--moe-router-load-balancing-type`", _balancing),
    "job.optimizer": written_by("`--optimizer`; SGD with `--sgd-momentum 0`", _optimizer),
    "training.clip_norm": written("--clip-grad {}"),
    "training.gradient_sums": written_by("`--accumulate-allreduce-grads-in-fp32`", _gradient_sums),
    "training.attention_within_documents": irrelevant("off by default"),
    "training.sharded_weights": irrelevant("off by default"),
    "training.sequence_parallel": irrelevant("off by default"),
}


def megatron_files(plan: Plan, model: LayerGraph, language: LanguageModel) -> dict[str, str]:
    """Returns the files `arguments.txt`, `launch.sh` and the notes. Raises PlanError if Megatron-LM
    cannot run the plan."""
    grid = grid_of(plan, TOOL)
    blocks = blocks_by_stage(plan, grid, model, TOOL)
    asked = ExportedTraining(plan, grid, language)
    PlanError.check(
        [
            *_order_problems(plan, grid),
            *precision_problems(plan, TOOL, "bf16", "fp16", "fp32"),
            *export_refusals(TOOL, ANSWERS, asked),
        ]
    )
    order = stage_major(grid)
    mapping: list[str] = []
    if not is_node_by_node(order) and is_node_by_node(replica_major(grid)):
        order, mapping = replica_major(grid), ["--use-tp-pp-dp-mapping"]
    arguments = [
        *answer_lines(ANSWERS, asked, "model"),
        f"--seq-length {plan.job.sequence}",
        "--tokenizer-type NullTokenizer",
        f"--tensor-model-parallel-size {grid.tensor}",
        f"--pipeline-model-parallel-size {grid.stages}",
        *_split(blocks, grid),
        *mapping,
        f"--micro-batch-size {grid.rows}",
        f"--global-batch-size {plan.job.global_batch}",
        *([] if plan.job.precision == "fp32" else [f"--{plan.job.precision}"]),
        *answer_lines(ANSWERS, asked, "job", "stage", "training"),
        *(["--overlap-grad-reduce"] if grid.data > 1 else []),
    ]
    command = '"${MEGATRON:?the folder of Megatron-LM}/pretrain_gpt.py" $(cat arguments.txt)'
    environment = "CUDA_DEVICE_MAX_CONNECTIONS=1" if grid.tensor > 1 else ""
    return {
        "arguments.txt": "\n".join(arguments) + "\n",
        "launch.sh": launch_script(order, command, environment=environment),
        **notes_file(TOOL, export_notes(ANSWERS, asked)),
    }


def _order_problems(plan: Plan, grid: RegularGrid) -> Iterator[Problem]:
    """Yields Problems with the schedule; when Megatron interleaves, the number of micro-batches
    must be a multiple of the number of pipeline ranks."""
    if plan.schedule != "interleaved-1f1b" or grid.virtual_stages == 1 or grid.stages == 1:
        yield from schedule_problems(plan, grid, TOOL)
    elif grid.micro_batches % grid.stages:
        wanted = f"a multiple of {grid.stages}: {TOOL} interleaves {grid.stages} at a time"
        yield Problem(plan.name, "pipelines[0].micro_batches", str(grid.micro_batches), wanted)


def _split(blocks: tuple[int, ...], grid: RegularGrid) -> list[str]:
    """Returns the arguments for the cuts: only the number of virtual stages if all stages have the
    same number of blocks, a count for the first or last stage if only these differ, else the layout
    of every stage."""
    if grid.stages == 1 or is_even(blocks):
        return [f"--num-virtual-stages-per-pipeline-rank {grid.virtual_stages}"] * (
            grid.virtual_stages > 1
        )
    first, *middle, last = blocks
    ends_only = grid.virtual_stages == 1 and first > 0 and last > 0 and len(set(middle)) == 1
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
