"""Reads the config.json of families with an encoder (BERT, ViT, T5, Whisper) as LanguageModels."""

from __future__ import annotations

from typing import Any

from meshwright.errors import ModelError, Problem
from meshwright.model.config import LanguageModel
from meshwright.model.transformer.config_values import head_features, read_activation
from meshwright.model.transformer.encoder_configs import (
    BertConfig,
    T5Config,
    VitConfig,
    WhisperConfig,
)
from meshwright.model.transformer.spec import Architecture, Encoder, Norm, Picture

_BIASES: dict[str, Any] = {"query_bias": True, "out_bias": True, "feed_bias": True}


def bert(c: BertConfig, name: str, source: str, kind: str) -> LanguageModel:
    """Reads a BERT: an encoder with post-normalisation and attention in both directions."""
    names = ("hidden_size", "num_attention_heads")
    return LanguageModel(
        name=name,
        family=kind,
        vocabulary=c.vocab_size,
        positions=c.max_position_embeddings,
        width=c.hidden_size,
        layers=c.num_hidden_layers,
        heads=c.num_attention_heads,
        kv_heads=c.num_attention_heads,
        head=head_features(c.hidden_size, c.num_attention_heads, names, source),
        hidden=c.intermediate_size,
        tied=c.tie_word_embeddings,
        architecture=Architecture(
            task="masked tokens",
            norm=Norm(kind="layer", epsilon=c.layer_norm_eps, bias=True),
            place="after",
            last_norm=False,
            embedding_norm=True,
            segments=c.type_vocab_size,
            head_transform=True,
            head_bias=True,
            position="learned",
            activation=read_activation(c.hidden_act, "hidden_act", source),
            gated=False,
            **_BIASES,
        ),
    )


def vit(c: VitConfig, name: str, source: str, kind: str) -> LanguageModel:
    """Reads a ViT, whose tokens are a class token and the patches of a picture."""
    if c.image_size % c.patch_size:
        wanted = f"a divisor of image_size = {c.image_size}"
        raise ModelError(Problem(source, "patch_size", str(c.patch_size), wanted))
    classes = c.num_labels or (len(c.id2label) if c.id2label else 2)
    names = ("hidden_size", "num_attention_heads")
    size, patch = (c.image_size, c.image_size), (c.patch_size, c.patch_size)
    return LanguageModel(
        name=name,
        family=kind,
        vocabulary=classes,
        positions=(c.image_size // c.patch_size) ** 2 + 1,
        width=c.hidden_size,
        layers=c.num_hidden_layers,
        heads=c.num_attention_heads,
        kv_heads=c.num_attention_heads,
        head=head_features(c.hidden_size, c.num_attention_heads, names, source),
        hidden=c.intermediate_size,
        architecture=Architecture(
            task="image class",
            norm=Norm(kind="layer", epsilon=c.layer_norm_eps, bias=True),
            position="learned",
            activation=read_activation(c.hidden_act, "hidden_act", source),
            gated=False,
            picture=Picture(size=size, patch=patch, channels=c.num_channels, classes=classes),
            **(_BIASES | {"query_bias": c.qkv_bias}),
        ),
    )


def t5(c: T5Config, name: str, source: str, kind: str) -> LanguageModel:
    """Reads a T5, which has relative-position biases and unscaled attention scores."""
    word = c.feed_forward_proj.removeprefix("gated-")
    gated = word != c.feed_forward_proj
    scaled = c.tie_word_embeddings if c.scale_decoder_outputs is None else c.scale_decoder_outputs
    # The transformers library takes "gated-gelu" as the tanh approximation of GELU.
    word = "gelu_new" if c.feed_forward_proj == "gated-gelu" else word
    return LanguageModel(
        name=name,
        family=kind,
        vocabulary=c.vocab_size,
        positions=c.n_positions,
        width=c.d_model,
        layers=c.num_decoder_layers or c.num_layers,
        heads=c.num_heads,
        kv_heads=c.num_heads,
        head=c.d_kv,
        hidden=c.d_ff,
        tied=c.tie_word_embeddings,
        architecture=Architecture(
            task="text to text",
            norm=Norm(kind="rms", epsilon=c.layer_norm_epsilon),
            position="relative",
            buckets=c.relative_attention_num_buckets,
            reach=c.relative_attention_max_distance,
            score_scale=1.0,
            activation=read_activation(word, "feed_forward_proj", source),
            gated=gated,
            logit_scale=c.d_model**-0.5 if scaled else None,
            encoder=Encoder(
                layers=c.num_layers, heads=c.num_heads, hidden=c.d_ff, positions=c.n_positions
            ),
        ),
    )


def whisper(c: WhisperConfig, name: str, source: str, kind: str) -> LanguageModel:
    """Reads a Whisper: speech goes through two convolutions and an encoder, whose output a text
    decoder attends to."""
    names = ("d_model", "encoder_attention_heads")
    head = head_features(c.d_model, c.encoder_attention_heads, names, source)
    if c.decoder_attention_heads != c.encoder_attention_heads:
        wanted = f"encoder_attention_heads = {c.encoder_attention_heads}"
        found = str(c.decoder_attention_heads)
        raise ModelError(Problem(source, "decoder_attention_heads", found, wanted))
    return LanguageModel(
        name=name,
        family=kind,
        vocabulary=c.vocab_size,
        positions=c.max_target_positions,
        width=c.d_model,
        layers=c.decoder_layers,
        heads=c.decoder_attention_heads,
        kv_heads=c.decoder_attention_heads,
        head=head,
        hidden=c.decoder_ffn_dim,
        tied=c.tie_word_embeddings,
        architecture=Architecture(
            task="speech to text",
            norm=Norm(kind="layer", bias=True),
            position="sinusoidal",
            mels=c.num_mel_bins,
            key_bias=False,
            activation=read_activation(c.activation_function, "activation_function", source),
            gated=False,
            encoder=Encoder(
                layers=c.encoder_layers,
                heads=c.encoder_attention_heads,
                hidden=c.encoder_ffn_dim,
                positions=c.max_source_positions,
            ),
            **_BIASES,
        ),
    )
