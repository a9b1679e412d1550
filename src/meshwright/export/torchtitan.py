"""A plan as a configuration of torchtitan, which is a Python function.

Names: torchtitan/config/configs.py, torchtitan/trainer.py, and pipeline_parallel.py and
activation_checkpoint.py in torchtitan/distributed, 0.2.2.
"""

from __future__ import annotations

from collections.abc import Iterator

from meshwright.errors import PlanError, Problem
from meshwright.export.grid import Grid, blocks_by_stage, grid_of, only_precisions
from meshwright.export.launch import launch_script, stage_major
from meshwright.export.writing import docstring
from meshwright.model.config import NAMED, LanguageModel
from meshwright.model.spec import LayerGraph
from meshwright.plan.spec import Plan

TOOL = "torchtitan"
BASES = {"llama-3-8b": "llama3_8b", "llama-3-70b": "llama3_70b"}
"""Configurations in torchtitan.models.llama3.config_registry, by the models they are for."""


def torchtitan_files(plan: Plan, model: LayerGraph, language: LanguageModel) -> dict[str, str]:
    """`meshwright_plan.py` and `launch.sh`. Raises PlanError where torchtitan has no such plan."""
    grid = grid_of(plan, TOOL)
    blocks = blocks_by_stage(plan, grid, model, TOOL)
    PlanError.check(
        [*only_precisions(plan, TOOL, "bf16", "fp32"), *_problems(plan, grid, language)]
    )
    own = language == NAMED.get(language.name)  # a config may call itself what it is not
    base = BASES.get(language.name) if own else None
    lines = [
        docstring(f"{plan.name}: {language.name} on {plan.cluster.name}, as torchtitan takes it."),
        "",
        *(["from torchtitan.distributed.activation_checkpoint import FullAC"] * grid.recompute),
        *([f"from torchtitan.models.llama3.config_registry import {base}", ""] if base else []),
        "",
        "def apply(config):",
        '    """Change a Trainer.Config of the model so that it trains by the plan."""',
        "    parallelism, training = config.parallelism, config.training",
        *(f"    parallelism.{name} = {value!r}" for name, value in _parallelism(plan, grid)),
        *_parts(grid, blocks),
        *(f"    training.{name} = {value!r}" for name, value in _training(plan, grid)),
        f"    config.activation_checkpoint = {'FullAC.Config()' if grid.recompute else None}",
        "    return config",
        *(["", "", "def train():", f"    return apply({base}())"] if base else []),
    ]
    function = "--module meshwright_plan --config train"
    if not base:
        function = (
            '--module "${MODULE:?a module with a configuration}" '
            '--config "${CONFIG:?its function, which returns meshwright_plan.apply(...)}"'
        )
    command = f"-m torchtitan.train {function}"
    return {
        "meshwright_plan.py": "\n".join(lines) + "\n",
        "launch.sh": launch_script(
            stage_major(grid), command, environment='PYTHONPATH="$PWD:${PYTHONPATH:-}"'
        ),
    }


SINGLE: dict[str, str] = {"1f1b": "1F1B", "gpipe": "GPipe"}
SEVERAL: dict[str, str] = {"interleaved-1f1b": "Interleaved1F1B", "zb-v": "ZBVZeroBubble"}
"""torchtitan's names of the orders that it plays on one stage, and on several, of each device."""


def _problems(plan: Plan, grid: Grid, language: LanguageModel) -> Iterator[Problem]:
    rounds = max(1, grid.micro_batches // grid.stages)
    if plan.schedule == "interleaved-1f1b" and grid.micro_batches % rounds:
        wanted = f"a multiple of {rounds}: as many micro-batches in each round of {grid.stages}"
        yield Problem(plan.name, "pipelines[0].micro_batches", str(grid.micro_batches), wanted)
    names = _schedules(grid)
    if plan.schedule not in names and len(grid.layers) > 1:
        wanted = f"{' or '.join(names)}, which torchtitan plays on these stages"
        mend = "`--to pipelining-csv` writes any order for torch.distributed.pipelining itself"
        yield Problem(plan.name, "schedule", plan.schedule, wanted, mend)
    if language.family == "gpt2":
        wanted = "a decoder of the Llama kind: torchtitan has no GPT-2"
        yield Problem(plan.name, "model", language.name, wanted)
    if plan.job.optimizer != "adamw":
        wanted = "adamw: torchtitan has Adam and AdamW"
        yield Problem(plan.name, "job.optimizer", plan.job.optimizer, wanted)


def _schedules(grid: Grid) -> dict[str, str]:
    return SEVERAL if grid.chunks > 1 and grid.stages > 1 else SINGLE


def _parallelism(plan: Plan, grid: Grid) -> list[tuple[str, object]]:
    """Parameters are replicated, as the plan has them, and activations are whole on every tensor
    rank."""
    settings: list[tuple[str, object]] = [
        ("data_parallel_replicate_degree", grid.data),
        ("data_parallel_shard_degree", 1),
        ("tensor_parallel_degree", grid.tensor),
        ("enable_sequence_parallel", False),
        ("context_parallel_degree", 1),
        ("pipeline_parallel_degree", grid.stages),
    ]
    if grid.stages > 1:
        schedule = _schedules(grid)[plan.schedule]
        settings.append(("pipeline_parallel_schedule", schedule))
        settings.append(("num_pp_microbatches", grid.micro_batches))
    return settings


def _parts(grid: Grid, blocks: tuple[int, ...]) -> list[str]:
    """The modules of every stage, by name; torchtitan deals several to each device as plans do."""
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


def _training(plan: Plan, grid: Grid) -> list[tuple[str, object]]:
    job = plan.job
    return [
        ("max_context_length", job.sequence),
        ("num_tokens_per_microbatch_per_dp_rank", grid.rows * job.sequence),
        ("num_tokens_per_train_step", job.global_batch * job.sequence),
        ("dtype", "float32"),
        ("mixed_precision_param", "bfloat16" if job.precision == "bf16" else "float32"),
    ]
