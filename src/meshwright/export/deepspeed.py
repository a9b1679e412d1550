"""Exports a plan as DeepSpeed's ds_config.json, and the arguments of its PipelineModule.

Names: docs/_pages/config-json.md, deepspeed/runtime/pipe/module.py, deepspeed/runtime/utils.py and
_do_optimizer_sanity_check in deepspeed/runtime/engine.py, DeepSpeed 0.19.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import Any

from meshwright.errors import PlanError, Problem
from meshwright.export.answers import (
    ASSUMED,
    Answers,
    ExportedTraining,
    PropertyAnswer,
    answer_lines,
    export_notes,
    export_refusals,
    grid_answers,
    irrelevant,
    listed_in_notes,
    notes_file,
    own_code,
    own_model_answers,
    planned,
)
from meshwright.export.grid import (
    RegularGrid,
    blocks_by_stage,
    grid_of,
    is_even,
    precision_problems,
    schedule_problems,
)
from meshwright.export.launch_script import launch_script, stage_major
from meshwright.model.config import LanguageModel
from meshwright.model.spec import LayerGraph
from meshwright.model.transformer.defaults import base_of
from meshwright.plan.spec import Plan

TOOL = "DeepSpeed"
LEARNING_RATE = 3e-4
"""Learning rate of `meshwright train`; plans do not contain one."""
_PRESETS = {"llama": "llama", "mixtral": "mixtral"}
"""AutoTP's names of the model families."""


def _tied(value: bool, asked: ExportedTraining) -> str:
    """Returns the note on tied weights; with several stages pipeline.py ties them itself."""
    return "" if asked.grid.stages > 1 and value else own_code("model.tied").note(value, asked)


def _gradient_sums(_: Any, asked: ExportedTraining) -> str:
    precision, times = asked.plan.job.precision, asked.grid.micro_batches
    told = any(line.startswith("data_types.grad_accum_dtype") for line in _lines(asked))
    if precision == "fp32" or times == 1 or told:
        return ""
    return (
        f"gradients of the {times} micro-batches are added up in {precision}, not in fp32: {TOOL} "
        "has no other sums without ZeRO (between replicas they are summed in fp32)"
    )


ANSWERS: Answers = {
    **grid_answers(TOOL),
    **own_model_answers(),
    "model.tied": PropertyAnswer(
        "`TiedLayerSpec` in pipeline.py; else yours", note=_tied, own_code=True
    ),
    "job.sequence": listed_in_notes("the length of a row, in your data: {} tokens"),
    "training.clip_norm": planned("`gradient_clipping`"),
    "training.gradient_sums": PropertyAnswer(
        "`communication_data_type`; of micro-batches listed", note=_gradient_sums
    ),
    "training.attention_within_documents": irrelevant("as your code has it: over a whole row"),
    "training.sharded_weights": planned("`zero_optimization.stage`, at most 1"),
    "training.sequence_parallel": irrelevant("off by default"),
    "training.optimizer_settings": PropertyAnswer(
        f"`lr` {LEARNING_RATE}; listed",
        note=lambda _, __: (
            f"a plan says nothing of the optimizer's settings: `lr` is {LEARNING_RATE}, with which "
            "`meshwright train` begins; schedule, betas, weight decay, number of steps and data "
            "are yours"
        ),
    ),
}


def deepspeed_files(plan: Plan, model: LayerGraph, language: LanguageModel) -> dict[str, str]:
    """Returns the files `ds_config.json`, `launch.sh`, `pipeline.py` if there are several stages,
    and the notes. Raises PlanError if DeepSpeed cannot run the plan."""
    grid = grid_of(plan, TOOL)
    blocks = blocks_by_stage(plan, grid, model, TOOL)
    method = _partition_method(grid, blocks, len(model.layers))
    asked = ExportedTraining(plan, grid, language)
    PlanError.check(
        [
            *schedule_problems(plan, grid, TOOL),
            *precision_problems(plan, TOOL, "bf16", "fp16", "fp32"),
            *_problems(plan, grid, language, len(model.layers), method),
            *export_refusals(TOOL, ANSWERS, asked),
        ]
    )
    command = '"${SCRIPT:-train.py}" --deepspeed --deepspeed_config ds_config.json'
    files = {
        "ds_config.json": json.dumps(_settings(asked, method), indent=2) + "\n",
        "launch.sh": launch_script(stage_major(grid), command),
    }
    if grid.stages > 1:
        files["pipeline.py"] = _pipeline(asked, method)
    return {**files, **notes_file(TOOL, export_notes(ANSWERS, asked))}


_OF_PIPELINE = "pipeline."
"""What the names of the settings begin with that are arguments of PipelineModule."""


def _lines(asked: ExportedTraining) -> list[str]:
    """Returns the settings that techniques add, as `zero_optimization.stage = 1`."""
    lines = answer_lines(ANSWERS, asked, "stage")
    return [line for line in lines if not line.startswith(_OF_PIPELINE)]


def uniform(items: int, stages: int) -> tuple[tuple[int, int], ...]:
    """Computes DeepSpeed's `uniform` partition of a list of layers: the first stages take the
    remainder."""
    each, over = divmod(items, stages)
    ends = accumulate((each + (stage < over) for stage in range(stages)), initial=0)
    return tuple(pairwise(ends))


def _partition_method(grid: RegularGrid, blocks: tuple[int, ...], items: int) -> str:
    """Returns the partition method that gives the plan's cuts; empty if none does.

    `type:` balances the number of blocks, which are the layers whose class has that word in its
    name.
    """
    if grid.layers == uniform(items, grid.stages):
        return "uniform"
    return "type:block" if is_even(blocks) else ""


def _problems(
    plan: Plan, grid: RegularGrid, language: LanguageModel, items: int, method: str
) -> Iterator[Problem]:
    if grid.stages > 1 and grid.tensor > 1:
        found = f"{grid.stages} stages of tensor width {grid.tensor}"
        wanted = "stages, or tensor parallelism: AutoTP does not split a PipelineModule"
        yield Problem(plan.name, "pipelines", found, wanted)
    elif grid.tensor > 1 and base_of(language) not in _PRESETS:
        wanted = f"one that AutoTP has a preset for: {', '.join(_PRESETS)}"
        yield Problem(plan.name, "model", f"{language.name} of tensor width {grid.tensor}", wanted)
    if not method:
        found = "|".join(str(end - first) for first, end in grid.layers)
        even = "|".join(str(end - first) for first, end in uniform(items, grid.stages))
        wanted = f"{even} (uniform) or equally many blocks: DeepSpeed takes no list of cuts"
        yield Problem(plan.name, "pipelines[0].stages", f"layers {found}", wanted)


def _settings(asked: ExportedTraining, method: str) -> dict[str, Any]:
    job, grid = asked.plan.job, asked.grid
    sgd = job.optimizer == "sgd"
    settings: dict[str, Any] = {
        "train_batch_size": job.global_batch,
        "train_micro_batch_size_per_gpu": grid.rows,
        "gradient_accumulation_steps": grid.micro_batches,
        "gradient_clipping": ASSUMED["training.clip_norm"],
        "communication_data_type": "fp32",
        "zero_optimization": {"stage": 0},
        "optimizer": {
            "type": "SGD" if sgd else "AdamW",
            "params": {"lr": LEARNING_RATE} | ({"momentum": 0.0} if sgd else {}),
        },
    }
    if job.precision != "fp32":
        settings[job.precision] = {"enabled": True}
    if grid.stages > 1:
        settings["pipeline"] = {"stages": grid.stages, "partition": method}
    if grid.tensor > 1:
        preset = _PRESETS[base_of(asked.language)]
        settings["tensor_parallel"] = {"autotp_size": grid.tensor, "preset_model": preset}
    for line in _lines(asked):
        path, _, value = line.partition(" = ")
        *outer, name = path.split(".")
        inner = settings
        for each in outer:
            inner = inner.setdefault(each, {})
        inner[name] = json.loads(value)
    return settings


def _pipeline(asked: ExportedTraining, method: str) -> str:
    grid, language = asked.grid, asked.language
    lines = answer_lines(ANSWERS, asked, "stage")
    told = (line.removeprefix(_OF_PIPELINE) for line in lines if line.startswith(_OF_PIPELINE))
    further = "".join(
        f'    "{name}": {value},\n' for name, _, value in (t.partition(" = ") for t in told)
    )
    cuts = "|".join(str(end - first) for first, end in grid.layers)
    return f'''"""For PipelineModule(layers(...), **PIPELINE): {cuts}.

A `type:` names the class of the blocks: put in the name of yours.
"""

BLOCKS = {language.layers}
PIPELINE = {{
    "num_stages": {grid.stages},
    "partition_method": "{method}",
{further}}}

''' + (_TIED if language.tied else _UNTIED)


_UNTIED = '''
def layers(embedding, block, head):
    """Of classes of yours, each with its arguments in a tuple."""
    from deepspeed.pipe import LayerSpec

    blocks = [LayerSpec(*block) for _ in range(BLOCKS)]
    return [LayerSpec(*embedding), *blocks, LayerSpec(*head)]
'''
# DeepSpeed excludes from the gradient norm all other weights of a table's second module.
_TIED = '''
def layers(embedding, block, last_block, head):
    """Of classes of yours, each with its arguments in a tuple.

    Embedding and head have one table, each as its `weight`, which DeepSpeed keeps equal. The last
    block has the final norm after it: the head must have no other parameters than the table.
    """
    from deepspeed.pipe import LayerSpec, TiedLayerSpec

    return [
        TiedLayerSpec("table", *embedding, tied_weight_attr="weight"),
        *[LayerSpec(*block) for _ in range(BLOCKS - 1)],
        LayerSpec(*last_block),
        TiedLayerSpec("table", *head, tied_weight_attr="weight"),
    ]
'''
