"""Tells other tools of recomputation: those that have it repeat every block of all stages.

Names: megatron/training/arguments.py of Megatron-LM 0.20, which accelerate's plugin calls;
deepspeed/runtime/pipe/module.py of DeepSpeed 0.19; torchtitan/distributed/activation_checkpoint.py
of torchtitan 0.2.2.
"""

from __future__ import annotations

from meshwright.export.answers import (
    ExportedTraining,
    PropertyAnswer,
    StageSwitch,
    switch_of_all,
    switch_of_none,
)

PROPERTY = "stage.recompute"
_RECOMPUTE = StageSwitch("recompute")
_FULL = {"granularity": "full", "method": "uniform", "num_layers": "1"}
"""Megatron's settings for a model of which every block is recomputed."""


def answers(tool: str) -> dict[str, PropertyAnswer]:
    """Returns the answer of a tool for `Stage.recompute`; one that is not known here refuses it."""
    unknown = switch_of_none(_RECOMPUTE, f"{tool} recomputes nothing")
    return {PROPERTY: _OF_TOOLS.get(tool, unknown)}


def _megatron(recompute: bool, _: ExportedTraining) -> list[str]:
    options = {name.replace("_", "-"): value for name, value in _FULL.items()}
    return [f"--recompute-{name} {value}" for name, value in options.items()] * recompute


def _plugin(recompute: bool, _: ExportedTraining) -> list[str]:
    """Returns settings of the plugin or, as it would recompute every block without them, Megatron's
    arguments for no recomputation."""
    if recompute:
        return [f"megatron_lm_recompute_{name}: {value}" for name, value in _FULL.items()]
    return [f"--recompute-{name.replace('_', '-')} None" for name in _FULL]


def _torchtitan(recompute: bool, _: ExportedTraining) -> list[str]:
    if not recompute:
        return ["config.activation_checkpoint = None"]
    return [
        "from torchtitan.distributed.activation_checkpoint import FullAC",
        "config.activation_checkpoint = FullAC.Config()",
    ]


def _deepspeed(recompute: bool, _: ExportedTraining) -> list[str]:
    return [f"pipeline.activation_checkpoint_interval = {int(recompute)}"]


def _stages(asked: ExportedTraining) -> str:
    missing = "without stages DeepSpeed recomputes only what the model's code asks it to"
    return missing if asked.grid.stages == 1 else ""


_OF_TOOLS = {
    "torchtitan": switch_of_all(_RECOMPUTE, "`activation_checkpoint`", "torchtitan", _torchtitan),
    "Megatron-LM": switch_of_all(_RECOMPUTE, "`--recompute-granularity`", "Megatron-LM", _megatron),
    "DeepSpeed": switch_of_all(
        _RECOMPUTE, "`activation_checkpoint_interval`", "DeepSpeed", _deepspeed, _stages
    ),
    "accelerate": switch_of_none(
        _RECOMPUTE,
        "accelerate leaves recomputation of whole blocks to the model's own code; export it "
        "without, and call the model's gradient_checkpointing_enable()",
    ),
    "accelerate's Megatron-LM plugin": switch_of_all(
        _RECOMPUTE, "`megatron_lm_recompute_granularity`", "accelerate", _plugin
    ),
}
