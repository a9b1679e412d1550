"""Records of the config.json fields that are read for models with an encoder: BERT, ViT, T5 and
Whisper."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from meshwright.model.transformer.configs import (
    Heads,
    Hidden,
    Layers,
    Positions,
    Vocabulary,
    Width,
)
from meshwright.model.transformer.spec import Epsilon
from meshwright.records import Line, Name, record


@record
class BertConfig:
    """Holds the config.json of BERT, trained to predict masked tokens."""

    vocab_size: Vocabulary
    """Number of tokens in the vocabulary."""
    hidden_size: Width
    """Number of features of the residual stream."""
    num_hidden_layers: Layers
    """Number of blocks."""
    num_attention_heads: Heads
    """Number of attention heads of a block."""
    intermediate_size: Hidden
    """Inner width of the feed-forward module."""
    max_position_embeddings: Positions = 512
    """Number of rows of the position table, which is the longest sequence."""
    type_vocab_size: Annotated[int, Field(ge=1, le=10**6)] = 2
    """Number of rows of the segment table; all tokens are counted as the first segment."""
    hidden_act: Line = "gelu"
    """Activation of the feed-forward module."""
    layer_norm_eps: Epsilon = 1e-12
    """Epsilon of the layer normalisations."""
    tie_word_embeddings: bool = True
    """True if the embedding and the output projection are one parameter."""
    name_or_path: Annotated[Line, Field(alias="_name_or_path")] = ""
    """Name of the model."""


@record
class VitConfig:
    """Holds the config.json of ViT, trained to classify pictures."""

    hidden_size: Width
    """Number of features of the residual stream."""
    num_hidden_layers: Layers
    """Number of blocks."""
    num_attention_heads: Heads
    """Number of attention heads of a block."""
    intermediate_size: Hidden
    """Inner width of the feed-forward module."""
    image_size: Annotated[int, Field(ge=1, le=10**5)] = 224
    """Height and width of a picture, in pixels."""
    patch_size: Annotated[int, Field(ge=1, le=10**5)] = 16
    """Height and width of a patch, in pixels."""
    num_channels: Annotated[int, Field(ge=1, le=10**4)] = 3
    """Number of colour channels."""
    num_labels: Annotated[int, Field(ge=1, le=10**7)] | None = None
    """Number of classes."""
    id2label: dict[Name, Any] | None = None
    """Names of the classes; without it and num_labels there are two classes."""
    hidden_act: Line = "gelu"
    """Activation of the feed-forward module."""
    layer_norm_eps: Epsilon = 1e-12
    """Epsilon of the layer normalisations."""
    qkv_bias: bool = True
    """True if the projections to queries, keys and values have biases."""
    name_or_path: Annotated[Line, Field(alias="_name_or_path")] = ""
    """Name of the model."""


@record
class T5Config:
    """Holds the config.json of T5, in its original form and version 1.1."""

    vocab_size: Vocabulary
    """Number of tokens in the vocabulary."""
    d_model: Width
    """Number of features of the residual stream."""
    d_kv: Width
    """Number of features of a head."""
    d_ff: Hidden
    """Inner width of the feed-forward module."""
    num_layers: Layers
    """Number of blocks of the encoder."""
    num_decoder_layers: Layers | None = None
    """Number of blocks of the decoder; if absent, that of the encoder."""
    num_heads: Heads
    """Number of attention heads of a block."""
    relative_attention_num_buckets: Annotated[int, Field(ge=4, le=10**6)] = 32
    """Number of relative-position biases of each head."""
    relative_attention_max_distance: Annotated[int, Field(ge=2, le=2**30)] = 128
    """Distance from which on all positions have the last bias."""
    feed_forward_proj: Line = "relu"
    """Activation of the feed-forward module, such as relu or gated-gelu."""
    layer_norm_epsilon: Epsilon = 1e-6
    """Epsilon of the RMS normalisations."""
    tie_word_embeddings: bool = True
    """True if the embedding and the output projection are one parameter."""
    scale_decoder_outputs: bool | None = None
    """True if the input of the output projection is divided by the square root of the width; if
    absent, this is done when embedding and output projection are one parameter."""
    n_positions: Positions = 512
    """Length of the sequences that the model was trained on."""
    name_or_path: Annotated[Line, Field(alias="_name_or_path")] = ""
    """Name of the model."""


@record
class WhisperConfig:
    """Holds the config.json of Whisper, trained to turn speech into text."""

    vocab_size: Vocabulary
    """Number of tokens in the vocabulary."""
    num_mel_bins: Annotated[int, Field(ge=1, le=10**5)] = 80
    """Number of mel features of a frame of speech."""
    d_model: Width
    """Number of features of the residual stream."""
    encoder_layers: Layers
    """Number of blocks of the encoder."""
    encoder_attention_heads: Heads
    """Number of attention heads of an encoder block."""
    encoder_ffn_dim: Hidden
    """Inner width of the encoder's feed-forward modules."""
    decoder_layers: Layers
    """Number of blocks of the decoder."""
    decoder_attention_heads: Heads
    """Number of attention heads of a decoder block."""
    decoder_ffn_dim: Hidden
    """Inner width of the decoder's feed-forward modules."""
    max_source_positions: Positions = 1500
    """Number of frames of speech after the second convolution, which halves them."""
    max_target_positions: Positions = 448
    """Number of rows of the decoder's position table, which is the longest text."""
    activation_function: Line = "gelu"
    """Activation of the feed-forward modules."""
    tie_word_embeddings: bool = True
    """True if the embedding and the output projection are one parameter."""
    name_or_path: Annotated[Line, Field(alias="_name_or_path")] = ""
    """Name of the model."""
