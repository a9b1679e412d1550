"""What other tools are given: read back as they would, and refused where they could not."""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import replace
from functools import cache
from itertools import accumulate, count, pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.cluster.spec import Precision, node_of
from meshwright.errors import PlanError
from meshwright.export.deepspeed import uniform
from meshwright.export.grid import grid_of
from meshwright.export.launch_script import launch_script
from meshwright.export.tools import TOOLS, export_files
from meshwright.model.hf import language_model
from meshwright.model.load import load_model
from meshwright.model.spec import LayerGraph
from meshwright.plan.spec import Pipeline, Plan, PlanInput, Stage
from worlds import plan_by_hand

GPT, LLAMA = "gpt-tiny", "llama-tiny"
"""Eight blocks each, hence ten layers."""


def make(
    cuts: str = "10",
    *,
    model: str = GPT,
    data: int = 1,
    tensor: int = 1,
    micro_batches: int = 4,
    rows: int = 2,
    per_node: int = 2,
    precision: Precision = "bf16",
) -> tuple[Plan, LayerGraph]:
    """A grid of stages with `cuts` layers, `rows` per replica, on nodes a, b, c ..."""
    names = (f"{chr(97 + i // per_node)}:{i % per_node}" for i in count())
    ends = accumulate(map(int, cuts.split("|")), initial=0)
    stages = tuple(
        Stage(
            layers=layers,
            devices=tuple(tuple(next(names) for _ in range(tensor)) for _ in range(data)),
        )
        for layers in pairwise(ends)
    )
    plan = plan_by_hand(
        Pipeline(micro_batches=micro_batches, rows=rows * data, stages=stages),
        sequence=16,
        precision=precision,
        model=PlanInput(name=model, fingerprint="", source=model),
    )
    return plan, graph_of(model, precision)


@cache
def graph_of(model: str, precision: Precision) -> LayerGraph:
    return load_model(model, 16, precision)


def recomputing(plan: Plan, stages: slice = slice(None)) -> Plan:
    """The same with recomputation in some stages of its pipeline."""
    (pipeline,) = plan.pipelines
    chosen = pipeline.stages[stages]
    held = tuple(replace(s, recompute=s in chosen) for s in pipeline.stages)
    return replace(plan, pipelines=(replace(pipeline, stages=held),))


def refused(tool: str, plan: Plan, model: LayerGraph) -> str:
    with pytest.raises(PlanError) as caught:
        export_files(plan, model, tool)
    return str(caught.value)


def test_replicas_of_unlike_tensor_widths_are_refused():
    plan, model = make(data=2, tensor=2)
    devices = (("a:0", "a:1"), ("b:0",))
    stage = replace(plan.pipelines[0].stages[0], devices=devices)
    pipeline = replace(plan.pipelines[0], stages=(stage,))
    plan = replace(plan, devices=("a:0", "a:1", "b:0"), pipelines=(pipeline,))
    for tool in TOOLS:
        assert "one tensor width" in refused(tool, plan, model), tool


def arguments(plan: Plan, model: LayerGraph) -> dict[str, str]:
    lines = export_files(plan, model, "megatron")["arguments.txt"].splitlines()
    return {key: value for key, _, value in (line.partition(" ") for line in lines)}


def test_megatron_is_told_degrees_batches_and_model():
    found = arguments(*make("5|5", model=LLAMA, data=2, tensor=2))
    assert found["--tensor-model-parallel-size"] == "2"
    assert found["--pipeline-model-parallel-size"] == "2"
    assert (found["--micro-batch-size"], found["--global-batch-size"]) == ("2", "16")
    assert (found["--num-layers"], found["--num-query-groups"]) == ("8", "4")
    assert {"--bf16", "--swiglu", "--untie-embeddings-and-output-weights"} <= found.keys()
    assert not {"--pipeline-model-parallel-layout", "--sequence-parallel"} & found.keys()


@pytest.mark.parametrize(
    ("cuts", "first", "last", "layout"),
    [
        ("5|5", None, None, None),
        ("3|2|2|3", None, None, None),
        ("2|3|3|2", "1", "1", None),
        ("4|2|2|2", "3", "1", None),
        ("3|3|3|1", None, None, "Ett|ttt|ttt|L"),
        ("6|4", None, None, "Ettttt|tttL"),
        ("1|9", None, None, "E|ttttttttL"),
        ("3|1|4|2", None, None, "Ett|t|tttt|tL"),
    ],
)
def test_megatron_is_told_uneven_layers(cuts, first, last, layout):
    found = arguments(*make(cuts))
    assert found.get("--decoder-first-pipeline-num-layers") == first
    assert found.get("--decoder-last-pipeline-num-layers") == last
    assert found.get("--pipeline-model-parallel-layout") == layout


def test_equal_pipelines_are_replicas_and_megatron_takes_them_as_they_lie():
    plan, model = make("5|5", per_node=2)
    one = plan.pipelines[0]
    stages = tuple(
        replace(stage, devices=((f"z:{index}",),)) for index, stage in enumerate(one.stages)
    )
    twice = replace(
        plan,
        devices=(*plan.devices, "z:0", "z:1"),
        job=replace(plan.job, global_batch=16),
        pipelines=(one, replace(one, stages=stages)),
    )
    assert grid_of(twice, "x").data == 2
    files = export_files(twice, model, "megatron")
    assert "--use-tp-pp-dp-mapping" in files["arguments.txt"].split()
    assert "torchrun" in files["launch.sh"]


def titan_config(name: str, **other: object) -> SimpleNamespace:
    """What torchtitan's own configuration of a model looks like, as far as an export does."""
    c = replace(language_model(name), **other)  # type: ignore[arg-type]

    def block() -> SimpleNamespace:
        rope = SimpleNamespace(theta=5e5, scaling="llama", max_context_length=131072)
        return SimpleNamespace(
            attention=SimpleNamespace(
                n_heads=c.heads, n_kv_heads=c.kv_heads, head_dim=None, rope=rope
            ),
            feed_forward=SimpleNamespace(w1=SimpleNamespace(out_features=c.hidden)),
            attention_norm=SimpleNamespace(eps=1.0),
            ffn_norm=SimpleNamespace(eps=1.0),
        )

    model = SimpleNamespace(
        dim=c.width,
        vocab_size=c.vocabulary,
        layers=[block() for _ in range(c.layers)],
        norm=SimpleNamespace(eps=1.0),
        enable_weight_tying=c.tied,
    )
    return SimpleNamespace(
        parallelism=SimpleNamespace(),
        training=SimpleNamespace(),
        model_spec=SimpleNamespace(model=model),
    )


def test_torchtitan_sets_what_it_can_of_the_model_and_refuses_another():
    plan, model = make("3|4|3", model=LLAMA)
    scope: dict = {}
    exec(export_files(plan, model, "torchtitan")["meshwright_plan.py"], scope)
    found = scope["apply"](titan_config(LLAMA)).model_spec.model
    for each in found.layers:
        assert (each.attention.rope.theta, each.attention.rope.scaling) == (10000, "none")
        assert {found.norm.eps, each.attention_norm.eps, each.ffn_norm.eps} == {1e-5}
    for field in ("width", "vocabulary", "layers", "heads", "kv_heads", "hidden"):
        other = getattr(language_model(LLAMA), field) * 2
        with pytest.raises(ValueError, match=f"{field} = "):
            scope["apply"](titan_config(LLAMA, **{field: other}))
    with pytest.raises(ValueError, match="tied = False, not True"):
        scope["apply"](titan_config(LLAMA, tied=True))


def test_torchtitan_configuration_does_what_it_says():
    plan, model = make("3|4|3", model=LLAMA, data=2, precision="fp32")
    scope: dict = {}
    exec(export_files(plan, model, "torchtitan")["meshwright_plan.py"], scope)
    config = scope["apply"](titan_config(LLAMA))
    parallelism, training = config.parallelism, config.training
    assert parallelism.data_parallel_replicate_degree == 2
    assert parallelism.pipeline_parallel_degree == 3
    assert parallelism.num_pp_microbatches == 4
    parts = parallelism.module_fqns_per_model_part
    names = [name for part in parts for name in part]
    assert names == ["tok_embeddings", *(f"layers.{i}" for i in range(8)), "norm", "lm_head"]
    assert [len(part) for part in parts] == [3, 4, 4]
    assert training.num_tokens_per_microbatch_per_dp_rank == 2 * 16
    assert training.num_tokens_per_train_step == plan.job.global_batch * 16
    assert training.mixed_precision_param == "float32"
    assert config.activation_checkpoint is None


def test_deepspeed_settings_multiply_to_the_batch():
    plan, model = make("5|5", data=2)
    files = export_files(plan, model, "deepspeed")
    found = json.loads(files["ds_config.json"])
    accumulation = found["gradient_accumulation_steps"]
    each = found["train_micro_batch_size_per_gpu"]
    assert found["train_batch_size"] == accumulation * each * 2
    assert found["pipeline"] == {"stages": 2, "partition": "uniform"}
    scope: dict = {}
    exec(files["pipeline.py"], scope)
    assert scope["PIPELINE"] == {
        "num_stages": 2,
        "partition_method": "uniform",
        "activation_checkpoint_interval": 0,
    }
    plan, model = make("3|2|2|3")
    found = json.loads(export_files(plan, model, "deepspeed")["ds_config.json"])
    assert found["pipeline"]["partition"] == "type:block"
    plan, model = make("10", model=LLAMA, tensor=2)
    found = json.loads(export_files(plan, model, "deepspeed")["ds_config.json"])
    assert found["tensor_parallel"] == {"autotp_size": 2, "preset_model": "llama"}


@given(st.integers(1, 200), st.integers(1, 50))
def test_a_uniform_partition_holds_every_layer_and_is_even(items, stages):
    parts = uniform(items, stages)
    sizes = [end - first for first, end in parts]
    assert sum(sizes) == items
    assert sorted(sizes, reverse=True) == sizes
    assert max(sizes) - min(sizes) <= 1


def settings(text: str) -> dict[str, str]:
    return {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in text.splitlines())}


@pytest.mark.parametrize("data", [1, 2])
def test_megatron_hides_the_sums_of_gradients_where_there_are_any(data):
    plan, model = make("10", data=data)
    arguments = export_files(plan, model, "megatron")["arguments.txt"]
    assert ("--overlap-grad-reduce" in arguments) == (data > 1)


@pytest.mark.parametrize("tensor", [1, 2])
def test_tensor_ranks_of_megatron_in_accelerate_queue_their_work_in_one_order(tensor):
    plan, model = make("5|5", tensor=tensor)
    launch = export_files(plan, model, "accelerate")["launch.sh"]
    assert ("export CUDA_DEVICE_MAX_CONNECTIONS=1" in launch) == (tensor > 1)


def test_accelerate_takes_replicas_itself_and_stages_by_its_plugin():
    plan, model = make("10", data=4)
    files = export_files(plan, model, "accelerate")
    found = settings(files["accelerate.yaml"])
    assert found["distributed_type"] == "MULTI_GPU"
    assert (found["num_machines"], found["num_processes"]) == ("2", "4")
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4" in files["launch.sh"]
    plan, model = make("4|3|3", per_node=3)
    found = settings(export_files(plan, model, "accelerate")["accelerate.yaml"])
    assert found["distributed_type"] == "MEGATRON_LM"
    assert found["megatron_lm_pp_degree"] == "3"
    assert found["megatron_lm_decoder_last_pipeline_num_layers"] == "2"


@pytest.mark.parametrize("cuts", ["5|5", "3|2|2|3"])
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_torch_finds_the_schedule_valid_and_free_of_deadlock(cuts, schedule):
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    plan, model = make(cuts, micro_batches=6)
    text = export_files(replace(plan, schedule=schedule), model, "pipelining-csv")["schedule.csv"]
    actions = {
        rank: [schedules._Action.from_str(word) for word in line.split(",")]
        for rank, line in enumerate(text.splitlines())
    }
    stages = len(cuts.split("|"))
    ranks = schedules._validate_schedule(actions, stages, stages, 6)
    assert ranks == {stage: stage for stage in range(stages)}
    with_sends = schedules._add_send_recv(actions, lambda stage: stage, stages)
    schedules._simulate_comms_compute(with_sends, lambda stage: stage, stages)


def test_unequal_pipelines_are_a_schedule_each():
    plan, model = make("5|5")
    alone = Pipeline(micro_batches=2, rows=2, stages=(Stage(layers=(0, 10), devices=(("z:0",),)),))
    plan = replace(plan, pipelines=(*plan.pipelines, alone), devices=(*plan.devices, "z:0"))
    files = export_files(plan, model, "pipelining-csv")
    assert files["schedule-1.csv"] == "0F0,0B0,0F1,0B1\n"
    assert files["schedule-0.csv"].splitlines()[1].startswith("1F0,1B0")
    for tool in TOOLS[:-1]:
        assert "equal pipelines" in refused(tool, plan, model)


def test_stages_of_unlike_width_and_unequal_rows_are_refused_by_all():
    plan, model = make("5|5", data=2, rows=2)
    first, second = plan.pipelines[0].stages
    narrow = replace(second, devices=second.devices[:1])
    unlike = replace(plan, pipelines=(replace(plan.pipelines[0], stages=(first, narrow)),))
    shares = replace(first, rows=(3, 1))
    unequal = replace(plan, pipelines=(replace(plan.pipelines[0], stages=(shares, second)),))
    for tool in TOOLS:
        assert "2 x 1, 1 x 1" in refused(tool, unlike, model)
        assert "stages[0].rows: found [3, 1]" in refused(tool, unequal, model)


def several(layout: str, schedule: str, **grid: object) -> tuple[Plan, LayerGraph]:
    """Ten layers in four stages on two devices, the second half dealt out in turn or back up."""
    plan, model = make("3|2|2|3", **grid)  # type: ignore[arg-type]
    (pipeline,) = plan.pipelines
    first = pipeline.stages[:2]
    again = first if layout == "loop" else first[::-1]
    stages = tuple(
        replace(stage, devices=place.devices)
        for stage, place in zip(pipeline.stages, (*first, *again), strict=True)
    )
    devices = tuple(d for stage in first for replica in stage.devices for d in replica)
    pipelines = (replace(pipeline, stages=stages),)
    return replace(plan, schedule=schedule, devices=devices, pipelines=pipelines), model


def test_several_stages_of_each_device_are_told_or_refused():
    plan, model = several("loop", "interleaved-1f1b", data=2)
    found = arguments(plan, model)
    assert found["--pipeline-model-parallel-size"] == "2"
    assert found["--num-virtual-stages-per-pipeline-rank"] == "2"
    (pipeline,) = plan.pipelines
    cuts = ((0, 4), (4, 5), (5, 7), (7, 10))
    moved = tuple(replace(s, layers=c) for s, c in zip(pipeline.stages, cuts, strict=True))
    uneven = replace(plan, pipelines=(replace(pipeline, stages=moved),))
    found = arguments(uneven, model)
    assert found["--pipeline-model-parallel-layout"] == "Ettt|t|tt|ttL"
    assert "--num-virtual-stages-per-pipeline-rank" not in found
    odd = several("loop", "interleaved-1f1b", micro_batches=5)[0]
    assert "a multiple of 2" in refused("megatron", odd, model)
    folded = several("v", "zb-v")[0]
    for tool in ("megatron", "deepspeed", "accelerate"):
        assert "2 stages on each device" in refused(tool, folded, model)
    single = several("loop", "interleaved-1f1b", micro_batches=1)[0]
    assert "2 stages on each device" in refused("deepspeed", single, model)


@pytest.mark.parametrize(
    ("layout", "schedule", "name"),
    [("loop", "interleaved-1f1b", "Interleaved1F1B"), ("v", "zb-v", "ZBVZeroBubble")],
)
def test_torchtitan_deals_several_stages_to_each_device(layout, schedule, name):
    plan, model = several(layout, schedule, model=LLAMA)
    files = export_files(plan, model, "torchtitan")
    scope: dict = {}
    exec(files["meshwright_plan.py"], scope)
    parallelism = scope["apply"](titan_config(LLAMA)).parallelism
    assert parallelism.pipeline_parallel_degree == 2
    assert parallelism.pipeline_parallel_schedule == name
    assert [len(part) for part in parallelism.module_fqns_per_model_part] == [3, 2, 2, 4]
    assert "--nproc-per-node=2" in files["launch.sh"]
    for order in ("list", "interleaved-1f1b-2bp"):
        other = replace(plan, schedule=order)
        assert "interleaved-1f1b or zb-v" in refused("torchtitan", other, model)


REFUSALS = {
    "megatron schedule": ("megatron", make("5|5"), "gpipe", '"schedule": "1f1b"'),
    "megatron precision": ("megatron", make("10", precision="fp64"), "1f1b", "bf16 or fp16"),
    "titan gpt": ("torchtitan", make("10"), "1f1b", "no GPT-2"),
    "titan fp16": ("torchtitan", make("10", model=LLAMA, precision="fp16"), "1f1b", "bf16 or fp32"),
    "deepspeed uneven": ("deepspeed", make("6|4"), "1f1b", "5|5 (uniform)"),
    "deepspeed both": ("deepspeed", make("5|5", model=LLAMA, tensor=2), "1f1b", "AutoTP"),
    "deepspeed preset": ("deepspeed", make("10", tensor=2), "1f1b", "llama, mixtral"),
    "accelerate uneven": ("accelerate", make("6|2|2", per_node=3), "1f1b", "but the last"),
    "accelerate nodes": ("accelerate", make("4|3|3"), "1f1b", "2, 1 devices"),
    "unknown tool": ("megatrn", make("10"), "1f1b", "Did you mean 'megatron'"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_a_tool_cannot_express_is_refused_with_the_reason(name):
    tool, (plan, model), schedule, reason = REFUSALS[name]
    assert reason in refused(tool, replace(plan, schedule=schedule), model)


def test_recomputation_is_told_or_refused():
    plain, model = make("5|5")
    plan = recomputing(plain)
    llama, llama_model = make("5|5", model=LLAMA)
    assert "--recompute-granularity full" in export_files(plan, model, "megatron")["arguments.txt"]
    assert (
        '"activation_checkpoint_interval": 1'
        in (export_files(plan, model, "deepspeed")["pipeline.py"])
    )
    titan = export_files(recomputing(llama), llama_model, "torchtitan")["meshwright_plan.py"]
    assert "config.activation_checkpoint = FullAC.Config()" in titan
    alone = recomputing(make()[0])
    assert "the model's own code" in refused("accelerate", alone, model)
    assert "without stages" in refused("deepspeed", alone, model)
    for tool in ("torchtitan", "megatron", "deepspeed", "accelerate"):
        assert "all stages or none" in refused(tool, recomputing(plain, slice(1)), model)


@pytest.mark.heavy
def test_a_model_that_is_no_language_model_is_refused():
    plan, model = make("10")
    by_hand = replace(plan, model=replace(plan.model, source="unet.toml"))
    assert "pipelining-csv takes any model" in refused("megatron", by_hand, model)
    bent = make("11", model="u-transformer-tiny", data=2)
    for tool in ("torchtitan", "megatron", "deepspeed", "accelerate"):
        assert f"equal blocks, which {tool} can build" in refused(tool, *bent)


def ranks_started(script: str, node: str, folder: Path) -> list[dict[str, str]]:
    """What the processes that a launch script starts on a node find in their environment."""
    (folder / "launch.sh").write_text(script)
    shell = 'echo "$RANK $LOCAL_RANK $CUDA_VISIBLE_DEVICES $MASTER_ADDR $*" >> started\n'
    for name in ("torchrun", "python"):
        (folder / name).write_text("#!/usr/bin/env bash\n" + shell)
        (folder / name).chmod(0o755)
    (folder / "started").write_text("")
    done = subprocess.run(
        ["bash", "launch.sh", node, "--more"],
        cwd=folder,
        env={"PATH": f"{folder}:{os.environ['PATH']}", "RANK": "-", "LOCAL_RANK": "-"},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    words = (line.split(" ", 4) for line in (folder / "started").read_text().splitlines())
    keys = ("rank", "local", "visible", "master", "arguments")
    return sorted((dict(zip(keys, w, strict=True)) for w in words), key=lambda each: each["rank"])


@pytest.mark.heavy
def test_torchrun_numbers_the_devices_of_a_node_as_the_plan_does(tmp_path):
    script = launch_script(("a:1", "a:0", "b:0"), "train.py")
    (started,) = ranks_started(script, "a", tmp_path)
    assert (started["visible"], started["master"]) == ("1,0", "a")
    assert re.search(r"--nnodes=2 --node-rank=0 --nproc-per-node=2", started["arguments"])
    assert started["arguments"].endswith("train.py --more")
    (started,) = ranks_started(script, "b", tmp_path)
    assert "--node-rank=1 --nproc-per-node=1" in started["arguments"]


@pytest.mark.heavy
def test_ranks_that_torchrun_cannot_number_are_started_one_by_one(tmp_path):
    order = ("a:0", "b:0", "a:1", "b:1")
    found = ranks_started(launch_script(order, "train.py"), "b", tmp_path)
    assert [(each["rank"], each["local"]) for each in found] == [("1", "0"), ("3", "1")]
    assert {each["visible"] for each in found} == {"0,1"}
    assert all(node_of(order[int(each["rank"])]) == "b" for each in found)
