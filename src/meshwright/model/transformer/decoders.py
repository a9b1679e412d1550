"""From what a config.json says to the model: families of decoders."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from meshwright.errors import ModelError, Problem
from meshwright.model.config import LanguageModel
from meshwright.model.transformer.configs import (
    BloomConfig,
    DecoderConfig,
    FalconConfig,
    Gpt2Config,
    NeoxConfig,
    OptConfig,
)
from meshwright.model.transformer.rope import rotary
from meshwright.model.transformer.spec import (
    Activation,
    Architecture,
    Latent,
    Mixture,
    Norm,
    Rotary,
)

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu-tanh",
    "gelu_pytorch_tanh": "gelu-tanh",
    "gelu_fast": "gelu-tanh",
    "quick_gelu": "quick-gelu",
    "relu": "relu",
    "relu2": "relu-squared",
}
FULL, SLIDING = "full_attention", "sliding_attention"


def activation(word: str, field: str, source: str) -> Activation:
    """Raises ModelError for one that the modules do not have."""
    if word not in ACTIVATIONS:
        wanted = f"one of {', '.join(ACTIVATIONS)}"
        raise ModelError(Problem(source, field, repr(word), wanted))
    return ACTIVATIONS[word]


def divided(width: int, heads: int, names: tuple[str, str], source: str) -> int:
    """Features of a head where the config does not say. Raises ModelError."""
    if width % heads:
        wanted = f"a divisor of {names[0]} = {width}"
        raise ModelError(Problem(source, names[1], str(heads), wanted))
    return width // heads


def gpt2(c: Gpt2Config, name: str, source: str, _kind: str) -> LanguageModel:
    """Layer normalisations before attention and feed-forward module, biases, a position table."""
    return LanguageModel(
        name=name,
        family="gpt2",
        vocabulary=c.vocab_size,
        positions=c.n_positions,
        width=c.n_embd,
        layers=c.n_layer,
        heads=c.n_head,
        kv_heads=c.n_head,
        head=divided(c.n_embd, c.n_head, ("n_embd", "n_head"), source),
        hidden=c.n_inner or 4 * c.n_embd,
        tied=c.tie_word_embeddings,
        architecture=Architecture(
            norm=Norm(kind="layer", epsilon=c.layer_norm_epsilon, bias=True),
            position="learned",
            activation=activation(c.activation_function, "activation_function", source),
            gated=False,
            query_bias=True,
            out_bias=True,
            feed_bias=True,
        ),
    )


def llama(c: DecoderConfig, name: str, source: str, kind: str) -> LanguageModel:
    """Llama, and what differs from it in the families that use its words."""
    head = c.head_dim or divided(
        c.hidden_size, c.num_attention_heads, ("hidden_size", "num_attention_heads"), source
    )
    latent = _latent(c, kind)
    if latent is not None:
        head = latent.plain + latent.rotary
    mixture, experts, hidden = _mixture(c, kind, source)
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
    """What a Llama with these fields is."""
    head = c.qk_rope_head_dim if kind.startswith("deepseek") else c.head_dim
    head = head or c.hidden_size // c.num_attention_heads
    turned = int(head * _share(c.rope_parameters, c.partial_rotary_factor or 1.0))
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
        activation=activation(word, field, source),
        gated=True,
        query_bias=c.attention_bias if c.qkv_bias is None else c.qkv_bias,
        out_bias=c.attention_bias,
        feed_bias=c.mlp_bias,
    )


def _share(table: Mapping[str, Any] | None, usual: float) -> float:
    """Of a head's features that are turned."""
    given = (table or {}).get("partial_rotary_factor")
    return float(given) if isinstance(given, int | float) and 0 < given <= 1 else usual


def _of_kind(c: DecoderConfig, head: int, kind: str) -> dict[str, Any]:
    """What a family has that Llama has not."""
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
    """DeepSeek widens scores as yarn widens cosines."""
    given = c.rope_scaling or c.rope_parameters or {}
    share, factor = given.get("mscale_all_dim"), given.get("factor", 1.0)
    if not share or factor <= 1:
        return None
    return float(head**-0.5 * (0.1 * share * math.log(factor) + 1.0) ** 2)


def _windows(c: DecoderConfig, kind: str, source: str) -> tuple[int, ...]:
    """How far each block reaches; none given where all reach all."""
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


def _latent(c: DecoderConfig, kind: str) -> Latent | None:
    if not kind.startswith("deepseek"):
        return None
    assert c.kv_lora_rank is not None
    assert c.qk_nope_head_dim is not None
    assert c.qk_rope_head_dim is not None
    assert c.v_head_dim is not None
    return Latent(
        query_rank=c.q_lora_rank or 0,
        key_value_rank=c.kv_lora_rank,
        plain=c.qk_nope_head_dim,
        rotary=c.qk_rope_head_dim,
        value=c.v_head_dim,
    )


def _mixture(c: DecoderConfig, kind: str, source: str) -> tuple[Mixture | None, int, int]:
    """The mixture, how many experts it has, and the inner width of one of them."""
    if kind == "mixtral":
        _needed(c, source, "num_local_experts", "num_experts_per_tok")
        return Mixture(), c.num_local_experts, c.intermediate_size
    blocks = range(c.num_hidden_layers)
    if kind in ("qwen2_moe", "qwen3_moe"):
        _needed(c, source, "num_experts", "num_experts_per_tok")
        experts = c.num_local_experts or c.num_experts or 0
        dense = tuple(
            b for b in blocks if b in c.mlp_only_layers or (b + 1) % c.decoder_sparse_step
        )
        shared = c.shared_expert_intermediate_size or 0 if kind == "qwen2_moe" else 0
        mixture = Mixture(
            normalised=c.norm_topk_prob, shared=shared, shared_gate=kind == "qwen2_moe",
            dense=dense, dense_hidden=c.intermediate_size,
        )  # fmt: skip
        return mixture, experts, c.moe_intermediate_size or c.intermediate_size
    if kind.startswith("deepseek"):
        _needed(c, source, "n_routed_experts", "num_experts_per_tok")
        return _deepseek(c, kind, source), c.n_routed_experts or 0, c.moe_intermediate_size or 1
    return None, 0, c.intermediate_size


def _deepseek(c: DecoderConfig, kind: str, source: str) -> Mixture:
    free = kind == "deepseek_v3"
    grouped = c.topk_method != "greedy" and (c.n_group or 1) > 1
    ModelError.check(_choice_problems(c, free, grouped, source))
    groups = c.n_group or 1
    width = c.moe_intermediate_size or 1
    return Mixture(
        score="sigmoid" if c.scoring_func == "sigmoid" else "softmax",
        normalised=c.norm_topk_prob,
        scale=c.routed_scaling_factor,
        groups=groups if grouped else 1,
        groups_chosen=(c.topk_group or 1) if grouped else 1,
        group_score="two best" if free else "best",
        balanced=free,
        shared=(c.n_shared_experts or 0) * width,
        dense=tuple(range(min(c.first_k_dense_replace or 0, c.num_hidden_layers))),
        dense_hidden=c.intermediate_size,
    )


def _choice_problems(c: DecoderConfig, free: bool, grouped: bool, source: str) -> Iterator[Problem]:
    """Where experts are chosen in another way than the two that DeepSeek has."""
    ways = ("noaux_tc",) if free else ("greedy", "group_limited_greedy")
    if c.topk_method not in ways:
        yield Problem(source, "topk_method", repr(c.topk_method), " or ".join(ways))
    score = "sigmoid" if free else "softmax"
    if c.scoring_func != score:
        yield Problem(source, "scoring_func", repr(c.scoring_func), score)
    if c.norm_topk_prob and not free:
        why = "transformers passes over it, other code does not"
        yield Problem(source, "norm_topk_prob", "True", "False in a deepseek_v2", why)
    if not grouped:
        return
    experts, groups, chosen = c.n_routed_experts or 1, c.n_group or 1, c.topk_group or 1
    if experts % groups or chosen > groups or (free and experts < 2 * groups):
        two = ", of two and more each" if free else ""
        wanted = f"a divisor of the {experts} experts{two}, and at least topk_group"
        yield Problem(source, "n_group", str(groups), wanted)
    elif experts // groups * chosen < c.num_experts_per_tok:
        wanted = f"groups that hold the {c.num_experts_per_tok} experts of a token"
        yield Problem(source, "topk_group", str(chosen), wanted)


def _needed(c: DecoderConfig, source: str, *names: str) -> None:
    wanted = "this field, which a mixture of experts needs"
    ModelError.check(
        Problem(source, name, "nothing", wanted) for name in names if not getattr(c, name)
    )


def neox(c: NeoxConfig, name: str, source: str, kind: str) -> LanguageModel:
    """Attention and feed-forward module side by side, part of each head turned."""
    head = divided(
        c.hidden_size, c.num_attention_heads, ("hidden_size", "num_attention_heads"), source
    )
    given = c.rope_parameters if c.rope_parameters is not None else c.rope_scaling
    share = _share(c.rope_parameters, c.rotary_pct or c.partial_rotary_factor or 0.25)
    turned = rotary(
        given, "rope_parameters" if c.rope_parameters is not None else "rope_scaling", source,
        base=c.rotary_emb_base or c.rope_theta or 10000.0, features=int(head * share),
        positions=c.max_position_embeddings,
    )  # fmt: skip
    return _even(
        c, name, kind, head=head, hidden=c.intermediate_size,
        architecture=Architecture(
            norm=Norm(kind="layer", epsilon=c.layer_norm_eps, bias=True),
            parallel="two norms" if c.use_parallel_residual else "",
            position="rotary",
            rotary=turned,
            activation=activation(c.hidden_act, "hidden_act", source),
            gated=False,
            query_bias=c.attention_bias,
            out_bias=c.attention_bias,
            feed_bias=True,
        ),
    )  # fmt: skip


def _even(
    c: NeoxConfig | FalconConfig | OptConfig, name: str, kind: str, *, head: int, hidden: int,
    architecture: Architecture, kv_heads: int | None = None,
) -> LanguageModel:  # fmt: skip
    """A model with the usual names of sizes, and one kind of block."""
    return LanguageModel(
        name=name,
        family=kind,
        vocabulary=c.vocab_size,
        positions=c.max_position_embeddings,
        width=c.hidden_size,
        layers=c.num_hidden_layers,
        heads=c.num_attention_heads,
        kv_heads=kv_heads or c.num_attention_heads,
        head=head,
        hidden=hidden,
        tied=c.tie_word_embeddings,
        architecture=architecture,
    )


def falcon(c: FalconConfig, name: str, source: str, kind: str) -> LanguageModel:
    """One key and value for all heads, or groups of them; one or two normalisations."""
    head = divided(
        c.hidden_size, c.num_attention_heads, ("hidden_size", "num_attention_heads"), source
    )
    two = c.new_decoder_architecture and (c.num_ln_in_parallel_attn or 2) == 2
    kv_heads = c.num_attention_heads
    if c.new_decoder_architecture:
        kv_heads = c.num_kv_heads or kv_heads
    elif c.multi_query:
        kv_heads = 1
    side_by_side = c.parallel_attn or c.new_decoder_architecture
    given = c.rope_parameters if c.rope_parameters is not None else c.rope_scaling
    where = "rope_parameters" if c.rope_parameters is not None else "rope_scaling"
    return _even(
        c, name, kind, head=head, hidden=c.ffn_hidden_size or 4 * c.hidden_size, kv_heads=kv_heads,
        architecture=Architecture(
            norm=Norm(kind="layer", epsilon=c.layer_norm_epsilon, bias=True),
            parallel=("two norms" if two else "one norm") if side_by_side else "",
            position="rotary",
            rotary=rotary(given, where, source, base=c.rope_theta or 10000.0, features=head,
                          positions=c.max_position_embeddings),
            activation=activation(c.activation, "activation", source),
            gated=False,
            query_bias=c.bias,
            out_bias=c.bias,
            feed_bias=c.bias,
        ),
    )  # fmt: skip


def bloom(c: BloomConfig, name: str, source: str, kind: str) -> LanguageModel:
    """Scores that fall with the distance, and a normalised embedding."""
    width, layers = c.hidden_size or c.n_embed, c.n_layer or c.num_hidden_layers
    heads = c.n_head or c.num_attention_heads
    needed = {"hidden_size": width, "n_layer": layers, "n_head": heads}
    ModelError.check(Problem(source, field, "nothing", "this field") for field, there in
                     needed.items() if there is None)  # fmt: skip
    assert width is not None
    assert layers is not None
    assert heads is not None
    return LanguageModel(
        name=name,
        family=kind,
        vocabulary=c.vocab_size,
        positions=2048,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head=divided(width, heads, ("hidden_size", "n_head"), source),
        hidden=4 * width,
        tied=c.tie_word_embeddings,
        architecture=Architecture(
            norm=Norm(kind="layer", epsilon=c.layer_norm_epsilon, bias=True),
            embedding_norm=True,
            position="alibi",
            activation="gelu-tanh",
            gated=False,
            query_bias=True,
            out_bias=True,
            feed_bias=True,
        ),
    )


def opt(c: OptConfig, name: str, source: str, kind: str) -> LanguageModel:
    """A position table with two rows before the first position."""
    head = divided(
        c.hidden_size, c.num_attention_heads, ("hidden_size", "num_attention_heads"), source
    )
    affine = c.layer_norm_elementwise_affine
    other = c.word_embed_proj_dim not in (None, c.hidden_size)
    return _even(
        c, name, kind, head=head, hidden=c.ffn_dim,
        architecture=Architecture(
            norm=Norm(kind="layer", weight=affine, bias=affine),
            place="before" if c.do_layer_norm_before else "after",
            last_norm=c.do_layer_norm_before and not c.remove_final_layer_norm,
            position="learned",
            position_offset=2,
            embedding_width=c.word_embed_proj_dim or 0 if other else 0,
            activation=activation(c.activation_function, "activation_function", source),
            gated=False,
            query_bias=c.enable_bias,
            out_bias=c.enable_bias,
            feed_bias=c.enable_bias,
        ),
    )  # fmt: skip
