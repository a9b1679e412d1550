"""Gives a LanguageModel's Architecture: its own, or the default of its family (GPT-2, Llama,
Mixtral) if it has only sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from meshwright.model.config import LanguageModel
from meshwright.model.transformer.spec import Architecture, Mixture, Norm, Rotary


def base_of(c: LanguageModel) -> str:
    """Gives the family that a text decoder is a variant of (gpt2, llama or mixtral); for any other
    model, its own family."""
    a = c.architecture
    if a is None or a.task != "next token":
        return c.family
    if a.position == "learned" and a.norm.kind == "layer":
        return "gpt2"
    return "mixtral" if c.experts else "llama"


def architecture_of(c: LanguageModel) -> Architecture:
    """Gives the model's own architecture, or the default one of its family."""
    return c.architecture if c.architecture is not None else _family_default(c)


def _family_default(c: LanguageModel) -> Architecture:
    """Gives the architecture of GPT-2, Llama or Mixtral as first published, in this model's
    sizes."""
    if base_of(c) == "gpt2":
        return Architecture(
            norm=Norm(kind="layer", bias=True),
            position="learned",
            activation="gelu-tanh",
            gated=False,
            query_bias=True,
            out_bias=True,
            feed_bias=True,
        )
    return Architecture(
        norm=Norm(kind="rms"),
        position="rotary",
        rotary=Rotary(base=c.rotary_base, features=c.head),
        activation="silu",
        gated=True,
        mixture=Mixture() if c.experts else None,
    )


def differences(c: LanguageModel) -> dict[str, Any]:
    """Gives the fields of the model's architecture that differ from its family's default, with
    their values. Example: {"norm.epsilon": 1e-6, "query_bias": True}."""
    return dict(_different(architecture_of(c), _family_default(c), ""))


def _different(own: Any, usual: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for each in fields(own):
        value, other = getattr(own, each.name), getattr(usual, each.name)
        if value == other:
            continue
        if is_dataclass(value) and is_dataclass(other):
            yield from _different(value, other, f"{prefix}{each.name}.")
        else:
            yield f"{prefix}{each.name}", value
