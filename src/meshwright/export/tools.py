"""Lists the tools that a plan can be exported to, by their names on the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from meshwright.errors import PlanError, Problem
from meshwright.export.accelerate import accelerate_files
from meshwright.export.deepspeed import deepspeed_files
from meshwright.export.megatron import megatron_files
from meshwright.export.pipelining import pipelining_files
from meshwright.export.torchtitan import torchtitan_files
from meshwright.model.config import LanguageModel
from meshwright.model.hf import language_model
from meshwright.model.spec import LayerGraph
from meshwright.model.transformer.defaults import base_of
from meshwright.plan.spec import Plan, RuntimeName
from meshwright.text import did_you_mean, forbidden_character

_WRITERS: dict[str, Callable[[Plan, LayerGraph, LanguageModel], dict[str, str]]] = {
    "torchtitan": torchtitan_files,
    "megatron": megatron_files,
    "deepspeed": deepspeed_files,
    "accelerate": accelerate_files,
}
PIPELINING = "pipelining-csv"
TOOLS = (*_WRITERS, PIPELINING)
RUNTIME_OF: Mapping[str, RuntimeName] = {
    "torchtitan": "fsdp",
    "megatron": "megatron",
    "deepspeed": "deepspeed",
    "accelerate": "fsdp",
    PIPELINING: "fsdp",
}
"""Names the system with whose habits each tool runs a plan."""


def check_tool(tool: str) -> None:
    """Raises PlanError if the tool is unknown."""
    if tool not in TOOLS:
        wanted, mend = f"one of: {', '.join(TOOLS)}", did_you_mean(tool, TOOLS)
        raise PlanError(Problem("--to", "", repr(tool), wanted, mend))


def export_files(plan: Plan, model: LayerGraph, tool: str) -> dict[str, str]:
    """Returns the text of every file that `tool` needs for the plan, by file name.

    Raises PlanError with every reason why the tool cannot express the plan.
    """
    check_tool(tool)
    PlanError.check(
        Problem(plan.name, "devices", device, "names that a script can hold", f"without {wrong}")
        for device in plan.devices
        if (wrong := forbidden_character(device))
    )
    if tool == PIPELINING:
        return pipelining_files(plan)
    if plan.model.source.endswith(".toml"):
        wanted = f"a language model by name or config.json, which {tool} can build"
        mend = f"--to {PIPELINING} takes any model"
        raise PlanError(Problem(plan.name, "model.source", plan.model.source, wanted, mend))
    language = language_model(plan.model.source, plan.job.sequence)
    if base_of(language) not in ("gpt2", "llama", "mixtral"):
        wanted = f"a model of equal blocks, which {tool} can build"
        mend = f"--to {PIPELINING} takes any model"
        raise PlanError(Problem(plan.name, "model.source", language.name, wanted, mend))
    return _WRITERS[tool](plan, model, language)
