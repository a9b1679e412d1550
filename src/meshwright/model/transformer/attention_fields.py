"""Reads from a config.json how attention is computed.

It says `eager` for a product, a softmax and a product, and names a fused kernel otherwise. Only
with `eager` is the file's dropout of attention weights followed, since only there it takes memory
and time of its own. Models are trained without all other dropout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from meshwright.errors import Problem
from meshwright.model.config import AttentionKind
from meshwright.text import did_you_mean

IMPLEMENTATION_FIELDS = ("attn_implementation", "_attn_implementation")
"""Fields of a config.json that name an implementation, the public name first."""
IMPLEMENTATIONS: Mapping[str, AttentionKind] = {
    "eager": "unfused",
    "sdpa": "fused",
    "flash_attention_2": "fused",
    "flash_attention_3": "fused",
    "flex_attention": "fused",
}
"""Implementation, as transformers names it -> what it is here."""
DROPOUT_FIELDS: Mapping[str, tuple[str, float]] = {
    "gpt2": ("attn_pdrop", 0.1),
    "bert": ("attention_probs_dropout_prob", 0.1),
    "vit": ("attention_probs_dropout_prob", 0.0),
    "t5": ("dropout_rate", 0.1),
}
"""`model_type` -> the field with the dropout of attention weights, and what transformers takes
if it is absent. Other families have `attention_dropout`, 0 if absent."""


def _dropout_field(kind: str) -> tuple[str, float]:
    return DROPOUT_FIELDS.get(kind, ("attention_dropout", 0.0))


def _named(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: config[key] for key in IMPLEMENTATION_FIELDS if config.get(key) is not None}


def _is_unfused(config: Mapping[str, Any]) -> bool:
    return "eager" in _named(config).values()


def attention_problems(config: Mapping[str, Any], kind: str, source: str) -> Iterator[Problem]:
    """Yields a Problem for an implementation that is unknown, or named twice and differently, and
    for a dropout of unfused attention that is no probability."""
    named = _named(config)
    for key, value in named.items():
        if not isinstance(value, str) or value not in IMPLEMENTATIONS:
            mend = did_you_mean(value, IMPLEMENTATIONS) if isinstance(value, str) else ""
            yield Problem(
                source, key, repr(value)[:80], f"one of {', '.join(IMPLEMENTATIONS)}", mend
            )
    if len({str(value) for value in named.values()}) > 1:
        first, second = named
        yield Problem(source, second, repr(named[second])[:80], f"{named[first]!r}, as {first}")
    if _is_unfused(config):
        key, usual = _dropout_field(kind)
        value = config.get(key, usual)
        known = isinstance(value, int | float) and not isinstance(value, bool)
        if not known or not 0 <= value < 1:
            yield Problem(source, key, repr(value)[:80], "a probability from 0 to below 1")


def chosen_attention(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Gives the fields of a LanguageModel that say how its attention is computed, from a config
    without `attention_problems`."""
    if not _is_unfused(config):
        return {}
    key, usual = _dropout_field(kind)
    return {"attention": "unfused", "attention_dropout": float(config.get(key, usual))}
