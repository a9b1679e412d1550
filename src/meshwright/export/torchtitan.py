"""Exports a plan as a configuration of torchtitan, which is a Python function.

Names: torchtitan/config/configs.py, torchtitan/trainer.py, torchtitan/distributed, and decoder.py
and config_utils.py in torchtitan/models/common, 0.2.2.
"""

from __future__ import annotations

from collections.abc import Iterator

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
    listed_in_notes,
    notes_file,
    only,
    planned,
    written,
    written_by,
)
from meshwright.export.grid import RegularGrid, blocks_by_stage, grid_of, precision_problems
from meshwright.export.launch_script import launch_script, stage_major
from meshwright.export.writing import python_docstring
from meshwright.model.config import NAMED, LanguageModel
from meshwright.model.spec import LayerGraph
from meshwright.model.transformer.defaults import architecture_of, base_of
from meshwright.plan.spec import Plan

TOOL = "torchtitan"
BASES = {"llama-3-8b": "llama3_8b", "llama-3-70b": "llama3_70b"}
"""Configurations in torchtitan.models.llama3.config_registry, by the models that they describe."""


def _same(name: str, found: str) -> PropertyAnswer:
    """Writes a line that refuses a configuration of another model when training starts."""
    return PropertyAnswer(
        "checked when it starts",
        write=lambda value, _: [f"same({name!r}, {found}, {value!r})"],
    )


def _llama(_: str, asked: ExportedTraining) -> str:
    return (
        "" if base_of(asked.language) == "llama" else f"llama: {TOOL} has no GPT-2 and no Mixtral"
    )


def _norms(asked: ExportedTraining) -> list[str]:
    epsilon = format_value(architecture_of(asked.language).norm.epsilon)
    return [
        f"model.norm.eps = each.attention_norm.eps = each.ffn_norm.eps = {epsilon}",
        "each.attention.rope.scaling = 'none'",
    ]


def _tied(value: bool, asked: ExportedTraining) -> str:
    apart = value and asked.grid.stages > 1
    return f"False: {TOOL} does not tie weights of two stages, and would train two" if apart else ""


def _positions(value: int, asked: ExportedTraining) -> list[str]:
    longest = max(value, asked.plan.job.sequence)
    return [f"each.attention.rope.max_context_length = {longest}"]


ANSWERS: Answers = {
    **grid_answers(TOOL),
    "model.name": irrelevant(LABEL),
    "model.family": PropertyAnswer("only Llamas", wanted=_llama),
    "model.vocabulary": _same("vocabulary", "model.vocab_size"),
    "model.positions": written_by("`rope.max_context_length`", _positions),
    "model.width": _same("width", "model.dim"),
    "model.layers": _same("layers", "len(model.layers)"),
    "model.heads": _same("heads", "each.attention.n_heads"),
    "model.kv_heads": _same("kv_heads", "each.attention.n_kv_heads or each.attention.n_heads"),
    "model.head": _same("head", "each.attention.head_dim or model.dim // each.attention.n_heads"),
    "model.hidden": _same("hidden", "each.feed_forward.w1.out_features"),
    "model.tied": PropertyAnswer(
        "checked when it starts; refused where stages share a weight",
        write=lambda value, _: [f"same('tied', model.enable_weight_tying, {value})"],
        wanted=_tied,
    ),
    "model.experts": only(0, lacks=f"{TOOL} has no experts in its Llama"),
    "model.chosen": only(0, lacks=f"{TOOL} has no experts in its Llama"),
    "model.rotary_base": written("each.attention.rope.theta = {}", told="`rope.theta`"),
    "model.levels": only(0, lacks=f"{TOOL} has no U-Transformers"),
    "model.attention": only("fused", lacks=f"{TOOL} has no unfused attention"),
    "model.attention_dropout": only(0.0, lacks=f"{TOOL} has no dropout"),
    "model.dropout": only(0.0, lacks=f"{TOOL} has no dropout"),
    "model.architecture": block_answers(
        TOOL,
        "`eps` of every norm, `rope.scaling`; what is not usual else is refused",
        _norms,
        {"norm.epsilon": lambda _, __: []},
    ),
    "model.initial_std": listed_in_notes(
        "the first weights: drawn from torchtitan's own distributions, not with a deviation of {}"
    ),
    "model.auxiliary_loss": only(0.0, lacks=f"{TOOL} has no experts in its Llama"),
    "training.clip_norm": written("training.max_norm = {}"),
    "training.gradient_sums": written_by(
        "`training.mixed_precision_reduce`",
        lambda _, __: ["training.mixed_precision_reduce = 'float32'"],
    ),
    "training.attention_within_documents": listed_in_notes(
        "the mask of attention: torchtitan's stays inside each document, the plan's does not"
    ),
    "training.sharded_weights": planned("`data_parallel_shard_degree`"),
    "training.sequence_parallel": written("parallelism.enable_sequence_parallel = {}"),
}
_CHECKED = '''def check(model):
    """Set what a model's configuration can say of the plan's, and refuse another model."""
    for each in model.layers:
{}


def same(what, found, planned):
    """The plan is for one model."""
    if found != planned:
        raise ValueError(f"the plan is for a model with {{what}} = {{planned}}, not {{found}}")
'''


def torchtitan_files(plan: Plan, model: LayerGraph, language: LanguageModel) -> dict[str, str]:
    """Returns the files `meshwright_plan.py`, `launch.sh` and the notes. Raises PlanError if
    torchtitan cannot run the plan."""
    grid = grid_of(plan, TOOL)
    blocks = blocks_by_stage(plan, grid, model, TOOL)
    asked = ExportedTraining(plan, grid, language)
    PlanError.check(
        [
            *precision_problems(plan, TOOL, "bf16", "fp32"),
            *_problems(plan, grid),
            *export_refusals(TOOL, ANSWERS, asked),
        ]
    )
    own = language == NAMED.get(language.name)  # a config.json may carry another model's name
    base = BASES.get(language.name) if own else None
    function = "--module meshwright_plan --config train"
    if not base:
        function = (
            '--module "${MODULE:?a module with a configuration}" '
            '--config "${CONFIG:?its function, which returns meshwright_plan.apply(...)}"'
        )
    command = f"-m torchtitan.train {function}"
    return {
        "meshwright_plan.py": _module(asked, blocks, base),
        "launch.sh": launch_script(
            stage_major(grid), command, environment='PYTHONPATH="$PWD:${PYTHONPATH:-}"'
        ),
        **notes_file(TOOL, export_notes(ANSWERS, asked)),
    }


def _module(asked: ExportedTraining, blocks: tuple[int, ...], base: str | None) -> str:
    """Returns the text of `meshwright_plan.py`: `apply`, which changes a configuration, and
    `train`, a complete one, if torchtitan has the model."""
    plan, grid, language = asked.plan, asked.grid, asked.language
    title = f"{plan.name}: {language.name} on {plan.cluster.name}, as torchtitan takes it."
    of_stages = answer_lines(ANSWERS, asked, "stage")
    imports = [line for line in of_stages if line.startswith("from ")]
    if base:
        imports.append(f"from torchtitan.models.llama3.config_registry import {base}")
    of_model = "\n".join(f"        {line}" for line in answer_lines(ANSWERS, asked, "model"))
    return "\n".join(
        [
            python_docstring(title),
            *([""] * bool(imports)),
            *imports,
            "",
            "",
            "def apply(config):",
            '    """Change a Trainer.Config of the model so that it trains by the plan."""',
            "    parallelism, training = config.parallelism, config.training",
            *(f"    parallelism.{name} = {value!r}" for name, value in _parallelism(plan, grid)),
            *_parts(grid, blocks),
            *(f"    training.{name} = {value!r}" for name, value in _training(plan, grid)),
            *(f"    {line}" for line in answer_lines(ANSWERS, asked, "training")),
            *(f"    {line}" for line in of_stages if line not in imports),
            "    check(config.model_spec.model)",
            "    return config",
            "",
            "",
            _CHECKED.format(of_model),
            *(["", "def train():", f"    return apply({base}())", ""] if base else []),
        ]
    )


SINGLE: dict[str, str] = {"1f1b": "1F1B", "gpipe": "GPipe"}
SEVERAL: dict[str, str] = {"interleaved-1f1b": "Interleaved1F1B", "zb-v": "ZBVZeroBubble"}
"""torchtitan's names of the schedules that it runs on one stage (SINGLE) and on several stages
(SEVERAL) of each device."""


def _problems(plan: Plan, grid: RegularGrid) -> Iterator[Problem]:
    rounds = max(1, grid.micro_batches // grid.stages)
    if plan.schedule == "interleaved-1f1b" and grid.micro_batches % rounds:
        wanted = f"a multiple of {rounds}: as many micro-batches in each round of {grid.stages}"
        yield Problem(plan.name, "pipelines[0].micro_batches", str(grid.micro_batches), wanted)
    names = _schedules(grid)
    if plan.schedule not in names and len(grid.layers) > 1:
        wanted = f"{' or '.join(names)}, which torchtitan runs on these stages"
        mend = "`--to pipelining-csv` writes any schedule for torch.distributed.pipelining itself"
        yield Problem(plan.name, "schedule", plan.schedule, wanted, mend)
    if plan.job.optimizer != "adamw":
        wanted = "adamw: torchtitan has Adam and AdamW"
        yield Problem(plan.name, "job.optimizer", plan.job.optimizer, wanted)


def _schedules(grid: RegularGrid) -> dict[str, str]:
    return SEVERAL if grid.virtual_stages > 1 and grid.stages > 1 else SINGLE


def _parallelism(plan: Plan, grid: RegularGrid) -> list[tuple[str, object]]:
    """Returns the settings of parallelism: parameters are replicated, as in the plan, and every
    tensor rank holds whole activations."""
    settings: list[tuple[str, object]] = [
        ("data_parallel_replicate_degree", grid.data),
        ("data_parallel_shard_degree", 1),
        ("tensor_parallel_degree", grid.tensor),
        ("context_parallel_degree", 1),
        ("pipeline_parallel_degree", grid.stages),
    ]
    if grid.stages > 1:
        schedule = _schedules(grid)[plan.schedule]
        settings.append(("pipeline_parallel_schedule", schedule))
        settings.append(("num_pp_microbatches", grid.micro_batches))
    return settings


def _parts(grid: RegularGrid, blocks: tuple[int, ...]) -> list[str]:
    """Returns the lines that name the modules of every stage; torchtitan deals several stages to
    each device in the same order as plans."""
    if grid.stages == 1:
        return []
    lines, done = ["    parallelism.module_fqns_per_model_part = ["], 0
    for stage, count in enumerate(blocks):
        names = [f"layers.{index}" for index in range(done, done + count)]
        names = ["tok_embeddings", *names] if stage == 0 else names
        names = [*names, "norm", "lm_head"] if stage == len(blocks) - 1 else names
        lines.append(f"        {names!r},")
        done += count
    return [*lines, "    ]"]


def _training(plan: Plan, grid: RegularGrid) -> list[tuple[str, object]]:
    job = plan.job
    # torchtitan captures CUDA graphs by default, but cannot do so with stages.
    graphs: list[tuple[str, object]] = [("disable_cuda_graphs", True)] if grid.stages > 1 else []
    return [
        *graphs,
        ("max_context_length", job.sequence),
        ("num_tokens_per_microbatch_per_dp_rank", grid.rows * job.sequence),
        ("num_tokens_per_train_step", job.global_batch * job.sequence),
        ("dtype", "float32"),
        ("mixed_precision_param", "bfloat16" if job.precision == "bf16" else "float32"),
    ]
