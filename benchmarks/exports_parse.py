"""Exports as the tools themselves read them: every one is parsed and checked by its tool.

python benchmarks/exports_parse.py --megatron Megatron-LM --torchtitan torchtitan

The two are folders, checked out by you; what they import must be installed beside meshwright, and
so must deepspeed and accelerate, which are found by name. A tool that is not given, or not there,
is left out and said so. Nothing is trained and no GPU is needed: Megatron's arguments are parsed
and validated and become its TransformerConfig; torchtitan's configuration goes through its
ConfigManager and on to the model's; DeepSpeed's through DeepSpeedConfig, its cuts through its own
partitions; accelerate's through its launcher and plugin, and on to Megatron's parser.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import runpy
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

from meshwright.errors import PlanError
from meshwright.export.tools import export_files
from meshwright.model.hf import language_model
from meshwright.model.load import load_model
from meshwright.model.transformer.defaults import architecture_of, base_of
from meshwright.plan.spec import Job, Pipeline, Plan, PlanInput, Stage, StateDivision

CONFIGS = Path(__file__).parents[1] / "examples" / "configs"


@dataclass(frozen=True, slots=True)
class Case:
    """A plan for each tool that has one like it."""

    model: str
    cuts: str
    data: int = 1
    tensor: int = 1
    micro_batches: int = 4
    precision: str = "bf16"
    optimizer: str = "adamw"
    recompute: bool = False
    divided: bool = False
    """Optimizer states are divided over data parallelism, in all stages."""
    loop: bool = False
    """The second half of the stages is on the devices of the first."""

    @property
    def stages(self) -> int:
        """Groups of devices."""
        return len(self.cuts.split("|")) // (1 + self.loop)

    def __str__(self) -> str:
        kinds = [name for name in ("recompute", "divided", "loop") if getattr(self, name)]
        width = f"dp{self.data} tp{self.tensor} [{self.cuts}]"
        return " ".join([self.model, width, self.precision, self.optimizer, *kinds])


CASES = (
    Case("gpt2", "14", data=2),
    Case("gpt2", "7|7", tensor=1, precision="fp16"),
    Case("gpt2", "5|4|5", data=2, recompute=True),
    Case("gpt2", "7|7", data=2, divided=True),
    Case("gpt2", "14", data=2, precision="fp16", optimizer="sgd", divided=True),
    Case("gpt2", "14", tensor=2, precision="fp32", optimizer="sgd"),
    Case("gpt-tiny", "6|4"),
    Case("gpt-tiny", "3|2|2|3", loop=True),
    Case("llama-3-8b", "34", data=2),
    Case("llama-3-8b", "17|17", data=2, tensor=2),
    Case("llama-3-8b", "17|17", data=2, tensor=2, precision="fp32", divided=True),
    Case("llama-3-8b", "9|8|8|9", loop=True, recompute=True),
    Case("llama-3-70b", "41|41", tensor=8, precision="fp32"),
    Case("mistral-7b", "10|24", recompute=True),
    Case("llama-tiny", "10", precision="fp32"),
    Case("mixtral-tiny", "3|3"),
    Case("mixtral-8x7b", "34", tensor=4),
    Case(f"{CONFIGS}/llama-3.2-1b.json", "9|9", tensor=2),
    Case(f"{CONFIGS}/qwen2.5-7b.json", "15|15", data=2, tensor=2),
    Case(f"{CONFIGS}/qwen3-8b.json", "19|19", data=2),
)


def plan_of(case: Case) -> Plan:
    """On as many nodes as there are replicas and stages, one for each."""
    places = [
        tuple(
            tuple(f"n{stage}-{replica}:{t}" for t in range(case.tensor))
            for replica in range(case.data)
        )
        for stage in range(case.stages)
    ]
    ends = [*accumulate(map(int, case.cuts.split("|")), initial=0)]
    states = StateDivision(optimizer="all") if case.divided else None
    stages = tuple(
        Stage(
            layers=layers,
            devices=places[s % case.stages],
            recompute=case.recompute,
            states=states,
        )
        for s, layers in enumerate(pairwise(ends))
    )
    job = Job(
        global_batch=2 * case.data * case.micro_batches,
        sequence=1024,
        precision=case.precision,  # type: ignore[arg-type]
        optimizer=case.optimizer,  # type: ignore[arg-type]
    )
    return Plan(
        name="case",
        model=PlanInput(name=case.model, fingerprint="", source=case.model),
        cluster=PlanInput(name="c", fingerprint=""),
        job=job,
        schedule="interleaved-1f1b" if case.loop else "1f1b",
        devices=tuple(d for place in places for replica in place for d in replica),
        pipelines=(Pipeline(micro_batches=case.micro_batches, rows=2 * case.data, stages=stages),),
    )


def expect(what: str, found: object, wanted: object) -> None:
    """Raise ValueError where a tool has read something else."""
    if found != wanted:
        raise ValueError(f"{what} is {found!r}, not {wanted!r}")


def check_megatron(case: Case, files: dict[str, str]) -> None:
    """The arguments as namespace, validated, and as the record that the model is made of."""
    words = files["arguments.txt"].split()
    checked_by_megatron(case, [*words, "--train-iters", "10", "--lr", "3e-4", "--mock-data"], {})


def checked_by_megatron(case: Case, words: Sequence[str], defaults: dict[str, object]) -> None:
    """`defaults` are set on the parsed arguments, as accelerate does it."""
    arguments = importlib.import_module("megatron.training.arguments")
    parser = argparse.ArgumentParser(allow_abbrev=False)
    arguments.add_megatron_arguments(parser)
    parsed = parser.parse_args(words)
    parsed.world_size, parsed.rank = case.data * case.tensor * case.stages, 0
    for name, value in defaults.items():
        setattr(parsed, name, value)
    parsed.apply_rope_fusion = False  # of Transformer Engine, which is not needed to read them
    with patch.object(arguments, "get_device_arch_version", lambda: 9):
        arguments.validate_args(parsed)
    config = arguments.core_transformer_config_from_args(parsed)
    c = language_model(case.model)
    llama = base_of(c) != "gpt2"
    a = architecture_of(c)
    found_and_wanted = {
        "num_layers": c.layers,
        "hidden_size": c.width,
        "ffn_hidden_size": c.hidden,
        "num_attention_heads": c.heads,
        "num_query_groups": c.kv_heads,
        "kv_channels": c.head,
        "attention_dropout": 0,
        "hidden_dropout": 0,
        "layernorm_epsilon": a.norm.epsilon,
        "add_qkv_bias": a.query_bias,
        "qk_layernorm": a.query_norm == "head",
        "init_method_std": 0.02,
        "normalization": "RMSNorm" if llama else "LayerNorm",
        "gated_linear_unit": llama,
        "add_bias_linear": not llama,
        "num_moe_experts": c.experts or None,
        "recompute_granularity": "full" if case.recompute else None,
        "tensor_model_parallel_size": case.tensor,
        "pipeline_model_parallel_size": case.stages,
        "context_parallel_size": 1,
        "sequence_parallel": False,
    }
    for name, wanted in found_and_wanted.items():
        expect(name, getattr(config, name), wanted)
    of_arguments = {
        "untie_embeddings_and_output_weights": not c.tied,
        "position_embedding_type": "rope" if llama else "learned_absolute",
        "clip_grad": 1.0,
        "make_vocab_size_divisible_by": 1,
        "data_parallel_size": case.data,
        "use_distributed_optimizer": case.divided,
        "use_rope_scaling": bool(a.rotary and a.rotary.scaling),
        "accumulate_allreduce_grads_in_fp32": case.precision != "fp32",
        "moe_aux_loss_coeff": 0.0,
        "reset_attention_mask": False,
    }
    if case.optimizer == "sgd" and not defaults:
        of_arguments |= {"optimizer": "sgd", "sgd_momentum": 0}
    for name, wanted in of_arguments.items():
        expect(name, getattr(parsed, name), wanted)


def check_torchtitan(case: Case, files: dict[str, str]) -> None:
    """The module as --module and --config name it; then as the trainer takes it to the model."""
    manager = importlib.import_module("torchtitan.config").ConfigManager()
    sys.modules.pop("meshwright_plan", None)
    with patch.object(sys, "path", [os.getcwd(), *sys.path]):
        plan = importlib.import_module("meshwright_plan")
    own = ModuleType("own_model")
    own.train = lambda: plan.apply(_own_configuration(case))  # type: ignore[attr-defined]
    whole = "def train(" in files["meshwright_plan.py"]
    with patch.dict(sys.modules, {"own_model": own}):
        module = "meshwright_plan" if whole else "own_model"
        config = manager.parse_args(["--module", module, "--config", "train"])
    model, base = config.model_spec.model, language_model(case.model).rotary_base
    model.update_from_config(config=config)
    expect("pipeline_parallel_degree", config.parallelism.pipeline_parallel_degree, case.stages)
    rope = model.layers[0].attention.rope
    expect("rope", (rope.scaling, rope.theta, rope.max_context_length), ("none", base, 1024))
    expect("eps", {model.norm.eps, model.layers[-1].ffn_norm.eps}, {1e-5})
    expect("max_norm", config.training.max_norm, 1)
    registry = importlib.import_module("torchtitan.models.llama3.config_registry")
    try:
        plan.apply(registry.llama3_debugmodel())
    except ValueError as refusal:
        expect("the refusal", "the plan is for a model with" in str(refusal), True)
    else:
        raise ValueError("another model was taken for the plan's")


def _own_configuration(case: Case) -> Any:
    """What a user would write for a model that torchtitan has no configuration of."""
    c = language_model(case.model)
    llama = importlib.import_module("torchtitan.models.llama3")
    config = importlib.import_module("torchtitan.models.llama3.config_registry").llama3_8b()
    given = config.model_spec.model
    rope = replace(given.layers[0].attention.rope, dim=c.head)
    sizes = {"n_layers": c.layers, "dim": c.width, "n_heads": c.heads, "n_kv_heads": c.kv_heads}
    layers = llama._build_llama3_layers(
        **sizes, hidden_dim=c.hidden, rope=rope, attn_backend="flex"
    )
    table = {"num_embeddings": c.vocabulary, "embedding_dim": c.width}
    config.model_spec.model = replace(
        given,
        dim=c.width,
        vocab_size=c.vocabulary,
        tok_embeddings=replace(given.tok_embeddings, **table),
        norm=replace(given.norm, normalized_shape=c.width),
        lm_head=replace(given.lm_head, in_features=c.width, out_features=c.vocabulary),
        layers=layers,
        enable_weight_tying=c.tied,
    )
    return config


def check_deepspeed(case: Case, files: dict[str, str]) -> None:
    """The settings, the data types that an engine would refuse, and a PipelineModule's cuts."""
    config = importlib.import_module("deepspeed.runtime.config")
    settings = json.loads(files["ds_config.json"])
    mpu = SimpleNamespace(get_data_parallel_world_size=lambda: case.data)
    with patch.object(config.dist, "get_rank", lambda: 0):
        read = config.DeepSpeedConfig(settings, mpu=mpu)
    expect("gradient_accumulation_steps", read.gradient_accumulation_steps, case.micro_batches)
    expect("gradient_clipping", read.gradient_clipping, 1.0)
    expect("communication_data_type", str(read.communication_data_type), "torch.float32")
    sums = "fp32" if case.divided and case.precision != "fp32" else None
    expect("grad_accum_dtype", read.grad_accum_dtype, sums)
    expect("zero", read.zero_optimization_stage, int(case.divided))
    untested = case.divided and case.optimizer == "sgd"
    expect("zero_allow_untested_optimizer", read.zero_allow_untested_optimizer, untested)
    if "pipeline.py" in files:
        _check_cuts(case)


def _check_cuts(case: Case) -> None:
    from torch import nn

    module = importlib.import_module("deepspeed.runtime.pipe.module")

    class Block(nn.Module): ...

    class Table(nn.Module): ...

    given = runpy.run_path("pipeline.py")
    c = language_model(case.model)
    blocks = [(Block,), (Block,)] if c.tied else [(Block,)]
    specs = given["layers"]((Table,), *blocks, (Table,))
    ties = [spec for spec in specs if isinstance(spec, module.TiedLayerSpec)]
    expect("tied layers", len(ties), 2 * c.tied)
    pipe = module.PipelineModule.__new__(module.PipelineModule)
    nn.Module.__init__(pipe)
    pipe._layer_specs, pipe._num_layers = specs, len(specs)
    pipe.num_stages, pipe.global_rank, pipe.loss_fn = case.stages, 1, None
    pipe._topo = SimpleNamespace(
        get_dim=lambda _: case.stages, get_coord=lambda _: SimpleNamespace(pipe=0)
    )
    pipe._partition_layers(given["PIPELINE"]["partition_method"])
    found = [end - first for first, end in pairwise(pipe.parts)]
    expect("layers of stages", found, [*map(int, case.cuts.split("|"))])


def check_accelerate(case: Case, files: dict[str, str]) -> None:
    """The file as `accelerate launch` reads it, the environment that it makes of it, and what the
    plugin hands to Megatron from that."""
    launch = importlib.import_module("accelerate.commands.launch")
    parser = launch.launch_command_parser()
    given = parser.parse_args(["--config_file", "accelerate.yaml", "train.py"])
    given, *_ = launch._validate_launch_command(given)
    expect("num_processes", given.num_processes, case.data * case.tensor * case.stages)
    if "megatron_plugin.py" not in files:
        return
    environment = importlib.import_module("accelerate.utils.launch").prepare_multi_gpu_env(given)
    plugin = importlib.import_module("accelerate.utils.dataclasses").MegatronLMPlugin
    own = runpy.run_path("megatron_plugin.py")["ARGUMENTS"]
    with patch.dict(os.environ, environment):
        made = plugin(other_megatron_args=own)
    made.set_mixed_precision(given.mixed_precision)
    made.set_training_args(2, case.data)
    config = SimpleNamespace(model_type=language_model(case.model).family, **_as_transformers(case))
    made.set_network_size_args(SimpleNamespace(config=config), None)
    if "megatron" in sys.modules:
        defaults = dict(made.megatron_lm_default_args) | {"train_iters": 10, "lr": 3e-4}
        checked_by_megatron(case, [], defaults)


def _as_transformers(case: Case) -> dict[str, object]:
    """The fields of a model's configuration that the plugin looks at."""
    c = language_model(case.model)
    both = {"vocab_size": c.vocabulary, "return_dict": True}
    if c.family == "gpt2":
        sizes = {"n_layer": c.layers, "n_embd": c.width, "n_head": c.heads}
        return {**both, **sizes, "n_positions": c.positions}
    return {
        **both,
        "num_hidden_layers": c.layers,
        "hidden_size": c.width,
        "num_attention_heads": c.heads,
        "max_position_embeddings": c.positions,
    }


CHECKS: dict[str, tuple[str, Callable[[Case, dict[str, str]], None]]] = {
    "megatron": ("megatron.training.arguments", check_megatron),
    "torchtitan": ("torchtitan.config", check_torchtitan),
    "deepspeed": ("deepspeed.runtime.config", check_deepspeed),
    "accelerate": ("accelerate.commands.launch", check_accelerate),
}


_EXPORT = re.compile(r"^export (\w+)=(\w+)$", re.MULTILINE)
"""What a launch script sets for its processes."""


def outcomes(
    tool: str, check: Callable[[Case, dict[str, str]], None]
) -> Iterator[tuple[Case, str]]:
    """Each case with what came of it; what is wrong begins with `FAILED`."""
    for case in CASES:
        plan = plan_of(case)
        model = load_model(case.model, plan.job.sequence, plan.job.precision)
        try:
            files = export_files(plan, model, tool)
        except PlanError as refusal:
            yield case, f"refused: {refusal.problems[0].wanted}"
            continue
        with tempfile.TemporaryDirectory() as folder, chdir(folder):
            for name, text in files.items():
                Path(name).write_text(text)
            exported = dict(_EXPORT.findall(files.get("launch.sh", "")))
            try:
                with patch.dict(os.environ, exported):
                    check(case, files)
            except (Exception, SystemExit) as failure:
                yield case, f"FAILED: {type(failure).__name__}: {failure}"
            else:
                yield case, "read as meant"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for every export; 1 if a tool read one otherwise than it is meant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megatron", type=Path, help="folder of Megatron-LM")
    parser.add_argument("--torchtitan", type=Path, help="folder of torchtitan")
    options = parser.parse_args(arguments)
    given = [each.resolve() for each in (options.megatron, options.torchtitan) if each]
    sys.path[:0] = map(str, given)
    failed = 0
    for tool, (module, check) in CHECKS.items():
        try:
            importlib.import_module(module)
        except ImportError as missing:
            print(f"{tool}: left out, {missing}", flush=True)
            continue
        for case, outcome in outcomes(tool, check):
            failed += outcome.startswith("FAILED")
            print(f"{tool}: {case}: {outcome}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
