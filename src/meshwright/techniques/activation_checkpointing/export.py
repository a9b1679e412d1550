"""Tells other tools of recomputation: those that have it repeat every block of all stages.

Names: megatron/training/arguments.py of Megatron-LM 0.20, which accelerate's plugin calls;
deepspeed/runtime/pipe/module.py of DeepSpeed 0.19; torchtitan/distributed/activation_checkpoint.py
of torchtitan 0.2.2.
"""

from __future__ import annotations

from collections.abc import Callable

from meshwright.export.answers import ExportedTraining, PropertyAnswer

PROPERTY = "stage.recompute"
_FULL = {"granularity": "full", "method": "uniform", "num_layers": "1"}
"""Megatron's settings for a model of which every block is recomputed."""


def answers(tool: str) -> dict[str, PropertyAnswer]:
    """Returns the answer of a tool for `Stage.recompute`; one that is not known here refuses it."""
    return {PROPERTY: _OF_TOOLS.get(tool, _none(f"{tool} recomputes nothing"))}


def _none(lacks: str) -> PropertyAnswer:
    """Refuses recomputation; `lacks` says what the tool has not."""
    return PropertyAnswer("refused", wanted=lambda value, _: f"none: {lacks}" if value else "")


def _switch(
    told: str,
    tool: str,
    write: Callable[[bool], list[str]],
    lacks: Callable[[ExportedTraining], str] = lambda _: "",
) -> PropertyAnswer:
    """Writes the lines of a tool that recomputes in all stages or in none; `lacks` says what keeps
    it from recomputing at all."""

    def wanted(value: bool, asked: ExportedTraining) -> str:
        if not value:
            return ""
        if not all(stage.recompute for stage in asked.plan.stages):
            return f"all stages or none: {tool} recomputes every block or none"
        missing = lacks(asked)
        return f"none: {missing}" if missing else ""

    return PropertyAnswer(
        f"{told}, all stages or none", write=lambda value, _: write(value), wanted=wanted
    )


def _megatron(recompute: bool) -> list[str]:
    options = {name.replace("_", "-"): value for name, value in _FULL.items()}
    return [f"--recompute-{name} {value}" for name, value in options.items()] * recompute


def _plugin(recompute: bool) -> list[str]:
    """Returns settings of the plugin or, as it would recompute every block without them, Megatron's
    arguments for no recomputation."""
    if recompute:
        return [f"megatron_lm_recompute_{name}: {value}" for name, value in _FULL.items()]
    return [f"--recompute-{name.replace('_', '-')} None" for name in _FULL]


def _torchtitan(recompute: bool) -> list[str]:
    if not recompute:
        return ["config.activation_checkpoint = None"]
    return [
        "from torchtitan.distributed.activation_checkpoint import FullAC",
        "config.activation_checkpoint = FullAC.Config()",
    ]


def _deepspeed(recompute: bool) -> list[str]:
    return [f"pipeline.activation_checkpoint_interval = {int(recompute)}"]


def _stages(asked: ExportedTraining) -> str:
    missing = "without stages DeepSpeed recomputes only what the model's code asks it to"
    return missing if asked.grid.stages == 1 else ""


_OF_TOOLS = {
    "torchtitan": _switch("`activation_checkpoint`", "torchtitan", _torchtitan),
    "Megatron-LM": _switch("`--recompute-granularity`", "Megatron-LM", _megatron),
    "DeepSpeed": _switch("`activation_checkpoint_interval`", "DeepSpeed", _deepspeed, _stages),
    "accelerate": _none(
        "accelerate leaves recomputation of whole blocks to the model's own code; export it "
        "without, and call the model's gradient_checkpointing_enable()"
    ),
    "accelerate's Megatron-LM plugin": _switch(
        "`megatron_lm_recompute_granularity`", "accelerate", _plugin
    ),
}
