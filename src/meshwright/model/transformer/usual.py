"""The architecture of a model that is given by its sizes alone."""

from __future__ import annotations

from meshwright.model.config import LanguageModel
from meshwright.model.transformer.spec import Architecture, Mixture, Norm, Rotary


def made_of(c: LanguageModel) -> Architecture:
    """Its own, or that of GPT-2, Llama or Mixtral, which `family` names."""
    if c.architecture is not None:
        return c.architecture
    if c.family == "gpt2":
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
