"""What is followed in the config.json of models with an encoder: BERT, ViT, T5, Whisper."""

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
    """BERT, trained to find masked tokens."""

    vocab_size: Vocabulary
    """Tokens that the model knows."""
    hidden_size: Width
    """Features of the residual stream."""
    num_hidden_layers: Layers
    """Blocks."""
    num_attention_heads: Heads
    """Heads of a block."""
    intermediate_size: Hidden
    """Inner features of the feed-forward module."""
    max_position_embeddings: Positions = 512
    """Rows of the position table."""
    type_vocab_size: Annotated[int, Field(ge=1, le=10**6)] = 2
    """Rows of the table of segments; all tokens are of the first."""
    hidden_act: Line = "gelu"
    """The feed-forward module's activation."""
    layer_norm_eps: Epsilon = 1e-12
    """What is added to a variance."""
    tie_word_embeddings: bool = True
    """Whether embedding and output projection are one parameter."""
    name_or_path: Annotated[Line, Field(alias="_name_or_path")] = ""
    """What the model is called here."""


@record
class VitConfig:
    """ViT, trained to tell classes of pictures."""

    hidden_size: Width
    """Features of the residual stream."""
    num_hidden_layers: Layers
    """Blocks."""
    num_attention_heads: Heads
    """Heads of a block."""
    intermediate_size: Hidden
    """Inner features of the feed-forward module."""
    image_size: Annotated[int, Field(ge=1, le=10**5)] = 224
    """Height and width of a picture."""
    patch_size: Annotated[int, Field(ge=1, le=10**5)] = 16
    """Height and width of a patch."""
    num_channels: Annotated[int, Field(ge=1, le=10**4)] = 3
    """Colours."""
    num_labels: Annotated[int, Field(ge=1, le=10**7)] | None = None
    """Classes."""
    id2label: dict[Name, Any] | None = None
    """The same, with their names; neither: two classes."""
    hidden_act: Line = "gelu"
    """The feed-forward module's activation."""
    layer_norm_eps: Epsilon = 1e-12
    """What is added to a variance."""
    qkv_bias: bool = True
    """Biases of queries, keys and values."""
    name_or_path: Annotated[Line, Field(alias="_name_or_path")] = ""
    """What the model is called here."""


@record
class T5Config:
    """T5, both forms."""

    vocab_size: Vocabulary
    """Tokens that the model knows."""
    d_model: Width
    """Features of the residual stream."""
    d_kv: Width
    """Features of a head."""
    d_ff: Hidden
    """Inner features of the feed-forward module."""
    num_layers: Layers
    """Blocks of the encoder."""
    num_decoder_layers: Layers | None = None
    """Blocks of the decoder; absent: as many."""
    num_heads: Heads
    """Heads of a block."""
    relative_attention_num_buckets: Annotated[int, Field(ge=4, le=10**6)] = 32
    """Biases of each head."""
    relative_attention_max_distance: Annotated[int, Field(ge=2, le=2**30)] = 128
    """The distance from which on all have the last bias."""
    feed_forward_proj: Line = "relu"
    """relu, or gated-gelu."""
    layer_norm_epsilon: Epsilon = 1e-6
    """What is added to a mean square."""
    tie_word_embeddings: bool = True
    """Whether embedding and output projection are one parameter."""
    scale_decoder_outputs: bool | None = None
    """Whether the last layer's input is divided by the root of the width; absent: if the output
    projection is the embedding."""
    n_positions: Positions = 512
    """The sequence that it was made for."""
    name_or_path: Annotated[Line, Field(alias="_name_or_path")] = ""
    """What the model is called here."""


@record
class WhisperConfig:
    """Whisper."""

    vocab_size: Vocabulary
    """Tokens that the model knows."""
    num_mel_bins: Annotated[int, Field(ge=1, le=10**5)] = 80
    """Features of a frame of speech."""
    d_model: Width
    """Features of the residual stream."""
    encoder_layers: Layers
    """Blocks of the encoder."""
    encoder_attention_heads: Heads
    """Heads of a block of the encoder."""
    encoder_ffn_dim: Hidden
    """Inner features of its feed-forward modules."""
    decoder_layers: Layers
    """Blocks of the decoder."""
    decoder_attention_heads: Heads
    """Heads of a block of the decoder."""
    decoder_ffn_dim: Hidden
    """Inner features of its feed-forward modules."""
    max_source_positions: Positions = 1500
    """Frames of speech, after they have been halved."""
    max_target_positions: Positions = 448
    """Rows of the decoder's position table."""
    activation_function: Line = "gelu"
    """The feed-forward modules' activation."""
    tie_word_embeddings: bool = True
    """Whether embedding and output projection are one parameter."""
    name_or_path: Annotated[Line, Field(alias="_name_or_path")] = ""
    """What the model is called here."""
