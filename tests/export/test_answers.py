"""Nothing that defines a training is passed over: tools are told, or refuse, or it is listed."""

from __future__ import annotations

import json
import sys
from dataclasses import MISSING, fields, replace
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from test_tools import GPT, LLAMA, make, recomputing, refused, several

from meshwright.errors import PlanError
from meshwright.export import accelerate, deepspeed, megatron, torchtitan
from meshwright.export.answers import (
    ASSUMED,
    NOTES,
    RECORDS,
    Answers,
    ExportedTraining,
    PropertyAnswer,
    answer_lines,
    export_notes,
    export_refusals,
    known_properties,
    own_model_answers,
)
from meshwright.export.grid import grid_of
from meshwright.export.tools import TOOLS, export_files
from meshwright.model.config import LanguageModel
from meshwright.model.hf import from_config, language_model
from meshwright.model.transformer.defaults import architecture_of, differences
from meshwright.model.transformer.spec import Architecture, Norm
from meshwright.plan.spec import StateDivision

TABLES: dict[str, Answers] = {
    "torchtitan": torchtitan.ANSWERS,
    "megatron": megatron.ANSWERS,
    "deepspeed": deepspeed.ANSWERS,
    "accelerate": accelerate.OWN,
    "accelerate with stages": accelerate.PLUGIN,
}
LABELS = {"model.name"}
"""Of the model, what nothing depends on."""


@pytest.mark.parametrize("tool", TABLES)
def test_every_field_has_an_answer_of_every_tool(tool):
    missing = known_properties().keys() - TABLES[tool].keys()
    assert not missing, f"say what {tool} makes of {sorted(missing)}: in its table of answers"


@pytest.mark.parametrize("tool", TABLES)
def test_no_answer_is_for_a_field_that_is_gone(tool):
    assert not TABLES[tool].keys() - known_properties().keys()


def test_what_a_record_says_is_not_assumed_as_well():
    own = {f"{kind}.{field.name}" for kind, cls in RECORDS.items() for field in fields(cls)}
    assert not own & ASSUMED.keys(), "take it out of ASSUMED: the record has it now"


def other(value: Any, kind: Any) -> Any:
    """Another value of the same type."""
    if get_origin(kind) is Literal:
        return next(each for each in get_args(kind) if each != value)
    match value:
        case bool():
            return not value
        case int():
            return value * 2 or 2
        case float():
            return value * 2 or 0.25
        case str():
            return f"{value}x"
        case _:
            return "something else"


def others() -> dict[str, list[tuple[LanguageModel, LanguageModel]]]:
    """By property of the model: models, and the same with another value of it."""
    hints = get_type_hints(LanguageModel)
    models = [language_model(name) for name in (GPT, LLAMA, "mixtral-tiny")]
    thin = [
        replace(
            model, architecture=replace(architecture_of(model), norm=Norm(kind="rms", epsilon=1e-7))
        )
        for model in models
    ]
    return {"model.architecture": [*zip(models, thin, strict=True)]} | {
        f"model.{field.name}": [
            (
                model,
                replace(
                    model, **{field.name: other(getattr(model, field.name), hints[field.name])}
                ),
            )
            for model in models
        ]
        for field in fields(LanguageModel)
        if field.name != "architecture"
    }


OTHERS = others()


def outcome(answers: Answers, language: LanguageModel) -> object:
    """All that a table makes of a model, on two stages of two tensor ranks."""
    plan, _ = make("5|5", model=LLAMA, tensor=2)
    asked = ExportedTraining(plan, grid_of(plan, "x"), language)
    refused_for = [(p.field, p.found) for p in export_refusals("x", answers, asked)]
    if refused_for:
        return refused_for
    return answer_lines(answers, asked, "model", "training"), export_notes(answers, asked)


@pytest.mark.parametrize("tool", TABLES)
@pytest.mark.parametrize("name", sorted(OTHERS.keys() - LABELS))
def test_another_model_makes_another_export_or_a_refusal(tool, name):
    pairs = [(outcome(TABLES[tool], a), outcome(TABLES[tool], b)) for a, b in OTHERS[name]]
    assert any(one != two for one, two in pairs), f"{tool} passes over {name}"


@pytest.mark.parametrize("tool", TABLES)
@pytest.mark.parametrize("name", [n for n in ASSUMED if n.startswith("model.")])
def test_what_is_assumed_of_models_is_told_too(tool, name, monkeypatch):
    mixture = language_model("mixtral-tiny" if name == "model.auxiliary_loss" else LLAMA)
    before = outcome(TABLES[tool], mixture)
    monkeypatch.setitem(ASSUMED, name, other(ASSUMED[name], None))
    assert outcome(TABLES[tool], mixture) != before


def test_a_property_that_a_table_has_no_answer_for_is_refused_unless_it_is_at_its_default():
    plan, _ = make("5|5", model=LLAMA)
    answers = {name: a for name, a in megatron.ANSWERS.items() if name != "model.tied"}
    language = language_model(LLAMA)
    asked = ExportedTraining(plan, grid_of(plan, "x"), language)
    assert not [*export_refusals("megatron", answers, asked)]
    asked = ExportedTraining(plan, grid_of(plan, "x"), replace(language, tied=True))
    (problem,) = export_refusals("megatron", answers, asked)
    assert problem.field == "model.tied"


def text(tool: str, *made: Any) -> str:
    return "\n".join(export_files(*made, tool).values())


PLANS = {
    "job.global_batch": (make("5|5", model=LLAMA), make("5|5", model=LLAMA, micro_batches=8)),
    "job.sequence": None,  # below
    "job.precision": (make("5|5", model=LLAMA), make("5|5", model=LLAMA, precision="fp32")),
    "job.optimizer": None,
    "plan.schedule": (several("loop", "interleaved-1f1b", model=LLAMA), make("5|5", model=LLAMA)),
    "plan.devices": (make("5|5", model=LLAMA), make("5|5", model=LLAMA, per_node=1)),
    "plan.pipelines": (make("5|5", model=LLAMA), make("10", model=LLAMA)),
    "pipeline.micro_batches": (make("5|5", model=LLAMA), make("5|5", model=LLAMA, micro_batches=8)),
    "pipeline.rows": (make("5|5", model=LLAMA), make("5|5", model=LLAMA, rows=4)),
    "pipeline.stages": (make("5|5", model=LLAMA), make("10", model=LLAMA)),
    "stage.layers": (make("5|5", model=LLAMA), make("6|4", model=LLAMA)),
    "stage.devices": (make("5|5", model=LLAMA), make("5|5", model=LLAMA, data=2)),
    "stage.recompute": None,
    "stage.rows": None,
    "stage.states": None,
    "stage.boundary": None,
}
"""Two plans that differ in a field, and in what must follow from it."""


def changed(name: str) -> tuple[Any, Any]:
    if PLANS[name] is not None:
        return PLANS[name]
    plan, model = one = make("5|5", model=LLAMA, data=2)
    kind, _, field = name.partition(".")
    if kind == "job":
        value = {"sequence": 32, "optimizer": "sgd"}[field]
        return one, (replace(plan, job=replace(plan.job, **{field: value})), model)
    if field == "recompute":
        return one, (recomputing(plan), model)
    (pipeline,) = plan.pipelines
    value = {
        "rows": (3, 1),
        "boundary": "broadcast",
        "states": StateDivision(optimizer="all"),
    }[field]
    stages = (pipeline.stages[0], replace(pipeline.stages[1], **{field: value}))
    return one, (replace(plan, pipelines=(replace(pipeline, stages=stages),)), model)


def test_the_fields_of_plans_that_define_a_training_are_all_tried():
    about = {"format", "name", "model", "cluster", "profile", "prediction", "job"}
    beside = {f"plan.{name}" for name in about} | {
        "pipeline.actions",
        "job.runtime",
        "job.compiled",
    }
    tried = {name for name in known_properties() if name.split(".")[0] not in ("model", "training")}
    assert tried - beside == PLANS.keys()


@pytest.mark.parametrize("tool", TOOLS[:-1])
@pytest.mark.parametrize("name", PLANS)
def test_another_plan_makes_another_export_or_a_refusal(tool, name):
    one, two = changed(name)
    try:
        first = text(tool, *one)
    except PlanError as failure:
        first = str(failure)
    try:
        second = text(tool, *two)
    except PlanError as failure:
        second = str(failure)
    assert first != second, f"{tool} passes over {name}"


@pytest.mark.parametrize("model", [GPT, LLAMA, "mixtral-tiny"])
def test_megatron_is_told_what_its_own_defaults_would_make_otherwise(model):
    plan, graph = make("6" if model == "mixtral-tiny" else "10", model=model)
    found = export_files(plan, graph, "megatron")["arguments.txt"].splitlines()
    for line in (
        "--attention-dropout 0",
        "--hidden-dropout 0",
        "--norm-epsilon 1e-05",
        "--init-method-std 0.02",
        "--clip-grad 1",
        "--make-vocab-size-divisible-by 1",
    ):
        assert line in found
    assert ("--moe-router-load-balancing-type none" in found) == (model == "mixtral-tiny")


def test_sgd_is_without_momentum_whatever_a_tool_would_take():
    plan, graph = make("10")
    plan = replace(plan, job=replace(plan.job, optimizer="sgd"))
    found = export_files(plan, graph, "megatron")["arguments.txt"].splitlines()
    assert {"--optimizer sgd", "--sgd-momentum 0"} <= {*found}
    settings = json.loads(export_files(plan, graph, "deepspeed")["ds_config.json"])
    assert settings["optimizer"]["params"]["momentum"] == 0
    assert "sgd is without momentum" in export_files(plan, graph, "accelerate")[NOTES]


def test_a_vocabulary_that_megatron_must_pad_is_listed():
    plan, graph = make("14", model="gpt2", tensor=2)
    assert (
        "the vocabulary is 50258, 1 more than 50257" in export_files(plan, graph, "megatron")[NOTES]
    )


def test_a_rotary_base_that_megatron_cannot_read_is_refused():
    plan, _ = make("10", model=LLAMA)
    language = replace(language_model(LLAMA), rotary_base=10000.5)
    (problem,) = export_refusals(
        "megatron", megatron.ANSWERS, ExportedTraining(plan, grid_of(plan, "x"), language)
    )
    assert (problem.field, problem.found) == ("model.rotary_base", "10000.5")


def tied(cuts: str) -> tuple[Any, Any, LanguageModel]:
    plan, model = make(cuts, model=LLAMA)
    return plan, model, replace(language_model(LLAMA), tied=True)


def test_one_table_on_two_stages_is_refused_by_torchtitan_and_tied_by_deepspeed_and_megatron():
    with pytest.raises(PlanError, match="does not tie weights of two stages"):
        torchtitan.torchtitan_files(*tied("5|5"))
    alone = torchtitan.torchtitan_files(*tied("10"))["meshwright_plan.py"]
    assert "same('tied', model.enable_weight_tying, True)" in alone
    assert "TiedLayerSpec(" in deepspeed.deepspeed_files(*tied("5|5"))["pipeline.py"]
    assert "pipeline.py" not in deepspeed.deepspeed_files(*tied("10"))
    assert ", tied," in deepspeed.deepspeed_files(*tied("10"))[NOTES]
    assert "--untie" not in megatron.megatron_files(*tied("5|5"))["arguments.txt"]


def test_the_layers_that_deepspeed_is_given_are_as_many_as_the_plan_cuts(monkeypatch):
    pipe = SimpleNamespace(
        LayerSpec=lambda *given: given,
        TiedLayerSpec=lambda *given, tied_weight_attr: (*given, tied_weight_attr),
    )
    monkeypatch.setitem(sys.modules, "deepspeed.pipe", pipe)
    scope: dict[str, Any] = {}
    exec(deepspeed.deepspeed_files(*tied("5|5"))["pipeline.py"], scope)
    found = scope["layers"](("e",), ("b",), ("last",), ("h",))
    assert found == [("table", "e", "weight"), *[("b",)] * 7, ("last",), ("table", "h", "weight")]
    scope = {}
    exec(text_of(deepspeed, LLAMA, "pipeline.py"), scope)
    assert scope["layers"](("e",), ("b",), ("h",)) == [("e",), *[("b",)] * 8, ("h",)]


def text_of(exporter: Any, model: str, name: str) -> str:
    plan, graph = make("5|5", model=model)
    return export_files(plan, graph, exporter.__name__.rpartition(".")[2])[name]


def test_gradient_sums_that_deepspeed_makes_in_16_bits_are_listed():
    plan, model = make("5|5", model=LLAMA)
    assert "added up in bf16, not in fp32" in export_files(plan, model, "deepspeed")[NOTES]
    plan, model = make("5|5", model=LLAMA, precision="fp32")
    assert "added up" not in export_files(plan, model, "deepspeed")[NOTES]


def test_the_plugin_of_accelerate_is_told_the_whole_model_and_not_to_recompute():
    plan, model = make("5|5", model=LLAMA, per_node=1)
    files = export_files(plan, model, "accelerate")
    scope: dict[str, Any] = {}
    exec(files["megatron_plugin.py"], scope)
    found = scope["ARGUMENTS"]
    assert (found["num_query_groups"], found["ffn_hidden_size"]) == (4, 704)
    assert (found["normalization"], found["swiglu"], found["add_bias_linear"]) == (
        "RMSNorm", True, False
    )  # fmt: skip
    assert found["recompute_granularity"] is None
    assert "megatron_lm_context_parallel_size: 1\n" in files["accelerate.yaml"]
    assert "megatron_plugin.py" in files[NOTES]
    files = export_files(recomputing(plan), model, "accelerate")
    assert "megatron_lm_recompute_granularity: full\n" in files["accelerate.yaml"]
    assert "recompute" not in files["megatron_plugin.py"]


def test_a_mixture_has_no_place_in_torchtitan_or_in_the_plugin_of_accelerate():
    made = make("3|3", model="mixtral-tiny", per_node=1)
    assert "no GPT-2 and no Mixtral" in refused("torchtitan", *made)
    assert "its Megatron-LM plugin has no others" in refused("accelerate", *made)


def test_an_answer_that_says_nothing_writes_refuses_and_lists_nothing():
    plan, _ = make("10")
    asked = ExportedTraining(plan, grid_of(plan, "x"), language_model(GPT))
    answer = PropertyAnswer("")
    assert ([*answer.write(1, asked)], answer.wanted(1, asked), answer.note(1, asked)) == (
        [], "", ""
    )  # fmt: skip
    assert known_properties()["model.family"] is MISSING


QWEN = {"model_type": "qwen2", "vocab_size": 256, "hidden_size": 256, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 704,
        "max_position_embeddings": 4096}  # fmt: skip
L3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
      "original_max_position_embeddings": 8192}  # fmt: skip


def test_megatron_is_told_what_is_not_as_usual_and_refuses_the_rest():
    plan, model = make("5|5", model=LLAMA)
    qwen = from_config(QWEN | {"rms_norm_eps": 1e-6}, "c")
    found = megatron.megatron_files(plan, model, qwen)["arguments.txt"].splitlines()
    assert {"--add-qkv-bias", "--norm-epsilon 1e-06"} <= {*found}
    llama = from_config(QWEN | {"model_type": "llama", "rope_scaling": L3}, "c")
    found = megatron.megatron_files(plan, model, llama)["arguments.txt"].splitlines()
    assert {"--use-rope-scaling", "--rope-scaling-factor 32"} <= {*found}
    gemma = from_config(QWEN | {"model_type": "gemma2", "head_dim": 32}, "c")
    with pytest.raises(PlanError, match=r"model\.architecture(?s:.*)not told of(?s:.*)score_cap"):
        megatron.megatron_files(plan, model, gemma)


def test_torchtitan_refuses_biases_and_scaled_rotary_positions():
    plan, model = make("5|5", model=LLAMA)
    for more in ({}, {"model_type": "llama", "rope_scaling": L3}):
        language = from_config(QWEN | more, "c")
        with pytest.raises(PlanError, match=r"not told of (query_bias|rotary\.scaling)"):
            torchtitan.torchtitan_files(plan, model, language)


def test_code_of_ones_own_is_told_what_the_blocks_are_made_of():
    plan, model = make("10", model=LLAMA)
    language = from_config(QWEN | {"rms_norm_eps": 1e-6}, "c")
    told = deepspeed.deepspeed_files(plan, model, language)[NOTES]
    assert "query_bias True" in told
    assert "norm.epsilon 1e-06" in told


def test_every_field_of_an_architecture_is_a_difference_where_it_differs():
    llama = language_model(LLAMA)
    usual = architecture_of(llama)
    assert differences(llama) == {}
    hints = get_type_hints(Architecture)
    for field in fields(Architecture):
        kind = hints[field.name]
        value = getattr(usual, field.name)
        changed = replace(usual, **{field.name: other(value, kind)})
        found = differences(replace(llama, architecture=changed))
        assert any(name.partition(".")[0] == field.name for name in found), field.name


def test_the_plugin_of_accelerate_knows_families_by_their_own_names():
    plan, model = make("5|5", model=LLAMA)
    with pytest.raises(PlanError, match="its Megatron-LM plugin has no others"):
        accelerate.accelerate_files(plan, model, from_config(QWEN, "c"))
    files = accelerate.accelerate_files(
        plan, model, from_config(QWEN | {"model_type": "llama"}, "c")
    )
    assert "megatron_plugin.py" in files


@pytest.mark.parametrize("weight", [0.0, 0.01])
def test_the_auxiliary_loss_of_a_mixture_is_told_even_if_it_has_none(weight):
    asked = SimpleNamespace(language=language_model("mixtral-8x7b", 64))
    note = own_model_answers()["model.auxiliary_loss"].note
    assert note(weight, asked) == f"auxiliary loss {weight:g}"
    assert not note(weight, SimpleNamespace(language=language_model("llama-2-7b", 64)))
