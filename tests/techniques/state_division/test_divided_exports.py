"""Divided optimizer states as other tools are told of them: ZeRO-1, or refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from meshwright.errors import PlanError
from meshwright.export.answers import NOTES
from meshwright.export.tools import export_files
from meshwright.model.load import load_model
from meshwright.model.spec import LayerGraph
from meshwright.plan.spec import Plan, StateDivision
from worlds import even_plan, one_node


def made(
    model: str = "llama-tiny",
    *,
    states: tuple[str, ...] = ("all",),
    optimizer: str = "adamw",
    precision: str = "bf16",
    **grid: int,
) -> tuple[Plan, LayerGraph]:
    """A grid of two replicas; `states` of its stages, in order."""
    graph = load_model(model, 16, precision)
    plan = even_plan(graph, one_node(8), **({"data": 2, "micro_batches": 4} | grid))
    (pipeline,) = plan.pipelines
    levels = states * len(pipeline.stages) if len(states) == 1 else states
    stages = tuple(
        replace(stage, states=StateDivision(optimizer=level))
        for stage, level in zip(pipeline.stages, levels, strict=True)
    )
    job = replace(plan.job, sequence=16, precision=precision, optimizer=optimizer)
    subject = replace(plan.model, source=model)
    return replace(
        plan, job=job, model=subject, pipelines=(replace(pipeline, stages=stages),)
    ), graph


def written(tool: str, name: str, *args: Any, **kwargs: Any) -> str:
    return export_files(*made(*args, **kwargs), tool)[name]


def refused(tool: str, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(PlanError) as caught:
        export_files(*made(*args, **kwargs), tool)
    (problem,) = caught.value.problems
    assert problem.field == "stage.states"
    return problem.wanted


def test_megatron_is_told_to_use_its_distributed_optimizer():
    for stages in (1, 2):
        found = written("megatron", "arguments.txt", stages=stages).splitlines()
        assert found.count("--use-distributed-optimizer") == 1
    found = written("megatron", "arguments.txt", states=("none",))
    assert "--use-distributed-optimizer" not in found
    assert "only the states of Adam" in refused("megatron", optimizer="sgd")


def test_deepspeed_is_told_stage_1_and_then_sums_gradients_in_fp32():
    files = export_files(*made("gpt-tiny", stages=2), "deepspeed")
    settings = json.loads(files["ds_config.json"])
    assert settings["zero_optimization"] == {"stage": 1}
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "added up in" not in files[NOTES]
    whole = export_files(*made("gpt-tiny", stages=2, states=("none",)), "deepspeed")
    settings = json.loads(whole["ds_config.json"])
    assert settings["zero_optimization"] == {"stage": 0}
    assert "data_types" not in settings
    assert "added up in bf16" in whole[NOTES]


def test_deepspeed_takes_sgd_with_stage_1_only_if_it_is_told_so():
    text = written("deepspeed", "ds_config.json", precision="fp32", optimizer="sgd")
    settings = json.loads(text)
    assert settings["zero_allow_untested_optimizer"] is True
    assert "data_types" not in settings
    assert "zero_allow" not in written("deepspeed", "ds_config.json", precision="fp32")


def test_accelerate_divides_them_by_its_plugin_alone():
    line = "  megatron_lm_use_distributed_optimizer: {}\n"
    for grid in ({"stages": 2}, {"tensor": 2}, {"stages": 2, "states": ("none",)}):
        found = written("accelerate", "accelerate.yaml", **grid)
        assert found.count(line.format(str("states" not in grid).lower())) == 1
        assert found.count("use_distributed_optimizer") == 1
    assert "without its Megatron-LM plugin" in refused("accelerate")
    assert "only the states of Adam" in refused("accelerate", stages=2, optimizer="sgd")


def test_fsdp_is_not_the_same():
    assert "divides weights and gradients as well" in refused("torchtitan")
    assert "meshwright_plan.py" in export_files(*made(states=("none",)), "torchtitan")


@pytest.mark.parametrize("tool", ["megatron", "deepspeed", "accelerate"])
def test_one_switch_for_all_stages_cannot_divide_only_some(tool):
    wanted = refused(tool, "gpt-tiny", stages=2, states=("all", "none"))
    assert wanted.startswith("all stages or none")


def test_a_schedule_alone_lists_them_beside_it():
    plan, model = made(stages=2)
    assert "optimizer states of all stages" in export_files(plan, model, "pipelining-csv")[NOTES]
    plan, model = made(stages=2, states=("none", "all"))
    assert "states of the stages marked z" in export_files(plan, model, "pipelining-csv")[NOTES]
    plan, model = made(stages=2, states=("none",))
    assert "ZeRO" not in export_files(plan, model, "pipelining-csv")[NOTES]
