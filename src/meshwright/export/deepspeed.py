"""A plan as DeepSpeed's ds_config.json, and what its PipelineModule is to be given.

Names: docs/_pages/config-json.md, deepspeed/runtime/pipe/module.py, deepspeed/runtime/utils.py,
DeepSpeed 0.19.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import Any

from meshwright.errors import PlanError, Problem
from meshwright.export.grid import (
    Grid,
    blocks_by_stage,
    grid_of,
    is_even,
    only_precisions,
    only_schedule,
)
from meshwright.export.launch import launch_script, stage_major
from meshwright.model.config import LanguageModel
from meshwright.model.spec import LayerGraph
from meshwright.plan.spec import Plan

TOOL = "DeepSpeed"
LEARNING_RATE = 3e-4
"""That of `meshwright train`; a plan says nothing of it."""
_PRESETS = {"llama": "llama", "mixtral": "mixtral"}
"""AutoTP's names of the families."""


def deepspeed_files(plan: Plan, model: LayerGraph, language: LanguageModel) -> dict[str, str]:
    """`ds_config.json`, `launch.sh`, and `pipeline.py` where there are stages. Raises PlanError
    where DeepSpeed has no such plan."""
    grid = grid_of(plan, TOOL)
    blocks = blocks_by_stage(plan, grid, model, TOOL)
    method = _partition_method(grid, blocks, len(model.layers))
    PlanError.check(
        [
            *only_schedule(plan, grid, TOOL),
            *only_precisions(plan, TOOL, "bf16", "fp16", "fp32"),
            *_problems(plan, grid, language, len(model.layers), method),
        ]
    )
    command = '"${SCRIPT:-train.py}" --deepspeed --deepspeed_config ds_config.json'
    files = {
        "ds_config.json": json.dumps(_settings(plan, grid, language, method), indent=2) + "\n",
        "launch.sh": launch_script(stage_major(grid), command),
    }
    if grid.stages > 1:
        files["pipeline.py"] = _pipeline(grid, method)
    return files


def uniform(items: int, stages: int) -> tuple[tuple[int, int], ...]:
    """DeepSpeed's `uniform` partition of a list of layers: the first stages take what is over."""
    each, over = divmod(items, stages)
    ends = accumulate((each + (stage < over) for stage in range(stages)), initial=0)
    return tuple(pairwise(ends))


def _partition_method(grid: Grid, blocks: tuple[int, ...], items: int) -> str:
    """The method that gives the plan's cuts; empty if none does. `type:` balances the blocks, which
    are the layers of a class with that in its name."""
    if grid.layers == uniform(items, grid.stages):
        return "uniform"
    return "type:block" if is_even(blocks) else ""


def _problems(
    plan: Plan, grid: Grid, language: LanguageModel, items: int, method: str
) -> Iterator[Problem]:
    if grid.stages > 1 and grid.tensor > 1:
        found = f"{grid.stages} stages of tensor width {grid.tensor}"
        wanted = "stages, or tensor parallelism: AutoTP does not split a PipelineModule"
        yield Problem(plan.name, "pipelines", found, wanted)
    elif grid.tensor > 1 and language.family not in _PRESETS:
        wanted = f"one that AutoTP has a preset for: {', '.join(_PRESETS)}"
        yield Problem(plan.name, "model", f"{language.name} of tensor width {grid.tensor}", wanted)
    if grid.recompute and grid.stages == 1:
        wanted = "none: without stages DeepSpeed recomputes only what the model's code asks it to"
        yield Problem(plan.name, "pipelines", "a stage that recomputes", wanted)
    if not method:
        found = "|".join(str(end - first) for first, end in grid.layers)
        even = "|".join(str(end - first) for first, end in uniform(items, grid.stages))
        wanted = f"{even} (uniform) or equally many blocks: DeepSpeed takes no list of cuts"
        yield Problem(plan.name, "pipelines[0].stages", f"layers {found}", wanted)


def _settings(plan: Plan, grid: Grid, language: LanguageModel, method: str) -> dict[str, Any]:
    job = plan.job
    settings: dict[str, Any] = {
        "train_batch_size": job.global_batch,
        "train_micro_batch_size_per_gpu": grid.rows,
        "gradient_accumulation_steps": grid.micro_batches,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 0},
        "optimizer": {
            "type": "SGD" if job.optimizer == "sgd" else "AdamW",
            "params": {"lr": LEARNING_RATE},
        },
    }
    if job.precision != "fp32":
        settings[job.precision] = {"enabled": True}
    if grid.stages > 1:
        settings["pipeline"] = {"stages": grid.stages, "partition": method}
    if grid.tensor > 1:
        preset = _PRESETS[language.family]
        settings["tensor_parallel"] = {"autotp_size": grid.tensor, "preset_model": preset}
    return settings


def _pipeline(grid: Grid, method: str) -> str:
    cuts = "|".join(str(end - first) for first, end in grid.layers)
    return f'''"""For PipelineModule(layers=[embedding, block, ..., head], **PIPELINE): {cuts}.

A `type:` names the class of the blocks: put in the name of yours.
"""

PIPELINE = {{
    "num_stages": {grid.stages},
    "partition_method": "{method}",
    "activation_checkpoint_interval": {int(grid.recompute)},
}}
'''
