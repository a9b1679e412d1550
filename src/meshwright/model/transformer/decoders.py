"""Reads the config.json of decoders with field names of their own (GPT-2, GPT-NeoX, Falcon, BLOOM,
OPT) as LanguageModels."""

from __future__ import annotations

from meshwright.errors import ModelError, Problem
from meshwright.model.config import LanguageModel
from meshwright.model.transformer.config_values import (
    head_features,
    read_activation,
    rotated_share,
)
from meshwright.model.transformer.configs import (
    BloomConfig,
    FalconConfig,
    Gpt2Config,
    NeoxConfig,
    OptConfig,
)
from meshwright.model.transformer.rope import rotary
from meshwright.model.transformer.spec import Architecture, Norm


def gpt2(c: Gpt2Config, name: str, source: str, _kind: str) -> LanguageModel:
    """Reads a GPT-2: pre-normalisation, biases, and a position table."""
    return LanguageModel(
        name=name,
        family="gpt2",
        vocabulary=c.vocab_size,
        positions=c.n_positions,
        width=c.n_embd,
        layers=c.n_layer,
        heads=c.n_head,
        kv_heads=c.n_head,
        head=head_features(c.n_embd, c.n_head, ("n_embd", "n_head"), source),
        hidden=c.n_inner or 4 * c.n_embd,
        tied=c.tie_word_embeddings,
        architecture=Architecture(
            norm=Norm(kind="layer", epsilon=c.layer_norm_epsilon, bias=True),
            position="learned",
            activation=read_activation(c.activation_function, "activation_function", source),
            gated=False,
            query_bias=True,
            out_bias=True,
            feed_bias=True,
        ),
    )


def neox(c: NeoxConfig, name: str, source: str, kind: str) -> LanguageModel:
    """Reads a GPT-NeoX: parallel attention and feed-forward module, with part of each head
    rotated."""
    head = head_features(
        c.hidden_size, c.num_attention_heads, ("hidden_size", "num_attention_heads"), source
    )
    given = c.rope_parameters if c.rope_parameters is not None else c.rope_scaling
    turning = rotated_share(c.rope_parameters, c.rotary_pct or c.partial_rotary_factor or 0.25)
    turned = rotary(
        given, "rope_parameters" if c.rope_parameters is not None else "rope_scaling", source,
        base=c.rotary_emb_base or c.rope_theta or 10000.0, features=int(head * turning),
        positions=c.max_position_embeddings,
    )  # fmt: skip
    return _even(
        c, name, kind, head=head, hidden=c.intermediate_size,
        architecture=Architecture(
            norm=Norm(kind="layer", epsilon=c.layer_norm_eps, bias=True),
            parallel="two norms" if c.use_parallel_residual else "",
            position="rotary",
            rotary=turned,
            activation=read_activation(c.hidden_act, "hidden_act", source),
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
    """Makes the LanguageModel from a config with the common names of sizes."""
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
    """Reads a Falcon: one key-value head, or groups of them, and one or two parallel
    normalisations."""
    head = head_features(
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
            activation=read_activation(c.activation, "activation", source),
            gated=False,
            query_bias=c.bias,
            out_bias=c.bias,
            feed_bias=c.bias,
        ),
    )  # fmt: skip


def bloom(c: BloomConfig, name: str, source: str, kind: str) -> LanguageModel:
    """Reads a BLOOM: ALiBi positions and a normalised embedding."""
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
        head=head_features(width, heads, ("hidden_size", "n_head"), source),
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
    """Reads an OPT, whose position table has two rows before the first position."""
    head = head_features(
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
            activation=read_activation(c.activation_function, "activation_function", source),
            gated=False,
            query_bias=c.enable_bias,
            out_bias=c.enable_bias,
            feed_bias=c.enable_bias,
        ),
    )  # fmt: skip
