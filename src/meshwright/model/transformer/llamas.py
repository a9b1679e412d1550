"""Reads the config.json of Llama, and of families with its field names, as a LanguageModel."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from meshwright.errors import ModelError, Problem
from meshwright.model.config import LanguageModel
from meshwright.model.transformer.config_values import (
    head_features,
    read_activation,
    rotated_share,
)
from meshwright.model.transformer.configs import DecoderConfig
from meshwright.model.transformer.mixtures import latent_of, mixture_of
from meshwright.model.transformer.rope import rotary
from meshwright.model.transformer.spec import Architecture, Norm, Rotary

FULL, SLIDING = "full_attention", "sliding_attention"


def llama(c: DecoderConfig, name: str, source: str, kind: str) -> LanguageModel:
    """Reads a model of family `kind`: Llama, plus what differs from Llama in that family."""
    head = c.head_dim or head_features(
        c.hidden_size, c.num_attention_heads, ("hidden_size", "num_attention_heads"), source
    )
    latent = latent_of(c, kind)
    if latent is not None:
        head = latent.plain + latent.rotary
    mixture, experts, hidden = mixture_of(c, kind, source)
    plain = _plain(c, source, kind)
    architecture = replace(
        plain,
        windows=_windows(c, kind, source),
        unrotated=_unrotated(c, kind, source),
        mixture=mixture,
        latent=latent,
    )
    return LanguageModel(
        name=name,
        family=kind,
        vocabulary=c.vocab_size,
        positions=c.max_position_embeddings,
        width=c.hidden_size,
        layers=c.num_hidden_layers,
        heads=c.num_attention_heads,
        kv_heads=(latent and c.num_attention_heads)
        or c.num_key_value_heads
        or c.num_attention_heads,
        head=head,
        hidden=hidden,
        tied=bool(c.tie_word_embeddings),
        experts=experts,
        chosen=c.num_experts_per_tok if experts else 0,
        rotary_base=plain.rotary.base if plain.rotary else 10000.0,
        architecture=replace(architecture, **_of_kind(c, head, kind)),
    )


def _plain(c: DecoderConfig, source: str, kind: str) -> Architecture:
    """Gives the architecture that a Llama with these fields has."""
    head = c.qk_rope_head_dim if kind.startswith("deepseek") else c.head_dim
    head = head or c.hidden_size // c.num_attention_heads
    turned = int(head * rotated_share(c.rope_parameters, c.partial_rotary_factor or 1.0))
    where = "rope_parameters" if c.rope_parameters is not None else "rope_scaling"
    given = c.rope_parameters if c.rope_parameters is not None else c.rope_scaling
    local = None
    two = kind in ("gemma3_text", "olmo3")
    if two and given is not None and (FULL in given or SLIDING in given):
        local, given = given.get(SLIDING), given.get(FULL)
    base = c.rope_theta or 10000.0
    common: dict[str, Any] = {
        "features": turned,
        "positions": c.max_position_embeddings,
        "original": c.original_max_position_embeddings,
        "adjacent": kind == "deepseek_v2" or (kind == "deepseek_v3" and c.rope_interleave),
    }
    full = rotary(given, where, source, base=base, **common)
    own: Rotary | None = None
    if two:
        local_base = c.rope_local_base_freq if kind == "gemma3_text" else full.base
        own = rotary(local, f"{where}.{SLIDING}", source, base=local_base or base, **common)
    word, field = (
        (c.hidden_activation, "hidden_activation")
        if kind.startswith("gemma") and (c.hidden_activation is not None)
        else (c.hidden_act or "silu", "hidden_act")
    )
    return Architecture(
        norm=Norm(kind="rms", epsilon=c.rms_norm_eps or 1e-6),
        position="rotary",
        rotary=full,
        local_rotary=own,
        activation=read_activation(word, field, source),
        gated=True,
        query_bias=c.attention_bias if c.qkv_bias is None else c.qkv_bias,
        out_bias=c.attention_bias,
        feed_bias=c.mlp_bias,
    )


def _of_kind(c: DecoderConfig, head: int, kind: str) -> dict[str, Any]:
    """Gives the fields of the architecture in which a family differs from Llama."""
    scale = (c.query_pre_attn_scalar or head) ** -0.5
    caps = {"score_cap": c.attn_logit_softcapping, "logit_cap": c.final_logit_softcapping}
    gemma_norm = Norm(kind="rms", epsilon=c.rms_norm_eps or 1e-6, one_added=True)
    gemma: dict[str, Any] = {"norm": gemma_norm, "embedding_scale": math.sqrt(c.hidden_size)}
    both = {**gemma, "place": "both", "score_scale": scale, **caps}
    match kind:
        case "qwen2" | "qwen2_moe":
            return {"out_bias": False}
        case "qwen3" | "qwen3_moe":
            return {"query_norm": "head"}
        case "gemma":
            return gemma
        case "gemma2":
            return both
        case "gemma3_text":
            return {**both, "query_norm": "head"}
        case "olmo":
            bare = Norm(kind="layer", epsilon=1e-5, weight=False)
            return {"norm": bare, "clamp": c.clip_qkv}
        case "olmo2" | "olmo3":
            return {"place": "output", "query_norm": "all"}
        case "phi":
            norm = Norm(kind="layer", epsilon=c.layer_norm_eps or 1e-5, bias=True)
            biases = dict.fromkeys(("query_bias", "out_bias", "feed_bias", "head_bias"), True)
            return {"norm": norm, "parallel": "one norm", "gated": False, **biases}
        case "deepseek_v2" | "deepseek_v3":
            return {"score_scale": _grown_scale(c, head)}
    return {}


def _grown_scale(c: DecoderConfig, head: int) -> float | None:
    """Gives DeepSeek's factor of attention scores, into which YaRN's magnitude enters squared; None
    for the default factor."""
    given = c.rope_scaling or c.rope_parameters or {}
    share, factor = given.get("mscale_all_dim"), given.get("factor", 1.0)
    if not share or factor <= 1:
        return None
    return float(head**-0.5 * (0.1 * share * math.log(factor) + 1.0) ** 2)


def _windows(c: DecoderConfig, kind: str, source: str) -> tuple[int, ...]:
    """Gives the attention window of each block, or () if every block attends to all tokens."""
    switched = kind.startswith("qwen") or kind == "smollm3"
    window = c.sliding_window if c.use_sliding_window or not switched else None
    if not window:
        return ()
    blocks = range(c.num_hidden_layers)
    if c.layer_types is not None:
        ModelError.check(_kind_problems(c, source))
        slides = [each == SLIDING for each in c.layer_types]
    elif kind == "qwen2_moe":
        wanted = f"{FULL} or {SLIDING} for each block"
        why = "versions of transformers differ in which blocks of a qwen2_moe have a window"
        raise ModelError(Problem(source, "layer_types", "nothing", wanted, why))
    elif kind in ("qwen2", "qwen3"):
        slides = [block >= (c.max_window_layers or 0) for block in blocks]
    elif kind == "gemma2":
        slides = [block % 2 == 0 for block in blocks]
    elif c.sliding_window_pattern:
        slides = [(block + 1) % c.sliding_window_pattern != 0 for block in blocks]
    elif kind == "smollm3":
        bare = _unrotated(c, kind, source)
        slides = [block in bare for block in blocks]
    else:
        slides = [True for _ in blocks]
    return tuple(window if each else 0 for each in slides) if any(slides) else ()


def _kind_problems(c: DecoderConfig, source: str) -> Iterator[Problem]:
    kinds = c.layer_types or ()
    if len(kinds) != c.num_hidden_layers:
        wanted = f"one for each of the {c.num_hidden_layers} blocks"
        yield Problem(source, "layer_types", f"{len(kinds)} kinds", wanted)
    for number, each in enumerate(kinds):
        if each not in (FULL, SLIDING):
            wanted = f"{FULL} or {SLIDING}"
            yield Problem(source, f"layer_types[{number}]", repr(each), wanted)
            return


def _unrotated(c: DecoderConfig, kind: str, source: str) -> tuple[int, ...]:
    if kind != "smollm3":
        return ()
    blocks = range(c.num_hidden_layers)
    if c.no_rope_layers is None:
        return tuple(b for b in blocks if (b + 1) % c.no_rope_layer_interval == 0)
    if len(c.no_rope_layers) != c.num_hidden_layers:
        wanted = f"one number for each of the {c.num_hidden_layers} blocks"
        found = f"{len(c.no_rope_layers)} numbers"
        raise ModelError(Problem(source, "no_rope_layers", found, wanted))
    return tuple(b for b in blocks if not c.no_rope_layers[b])
