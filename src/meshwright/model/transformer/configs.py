"""What is followed in a Hugging Face `config.json`: the fields of each way of writing one.

A family follows those fields of its record that `families` names; every number is in a range ten
and more times what a published model has.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from meshwright.model.transformer.spec import Epsilon
from meshwright.records import Line, Name, record

Vocabulary = Annotated[int, Field(ge=1, le=10**7)]
Positions = Annotated[int, Field(ge=1, le=2**30)]
Width = Annotated[int, Field(ge=1, le=10**6)]
Layers = Annotated[int, Field(ge=1, le=10_000)]
Heads = Annotated[int, Field(ge=1, le=10**5)]
Hidden = Annotated[int, Field(ge=1, le=10**7)]
Experts = Annotated[int, Field(ge=0, le=10**5)]
Period = Annotated[int, Field(ge=0, le=10_000)]
Base = Annotated[float, Field(gt=0, le=1e15)]
Share = Annotated[float, Field(gt=0, le=1)]
Cap = Annotated[float, Field(gt=0, le=1e6)]
Blocks = Annotated[tuple[Annotated[int, Field(ge=0, le=10_000)], ...], Field(max_length=10_000)]
Kinds = Annotated[tuple[Line, ...], Field(max_length=10_000)]
Rope = dict[Name, Any]


@record
class DecoderConfig:
    """Llama, and what is written with its words."""

    vocab_size: Vocabulary
    """Tokens that the model knows."""
    hidden_size: Width
    """Features of the residual stream."""
    num_hidden_layers: Layers
    """Blocks."""
    num_attention_heads: Heads
    """Query heads of a block."""
    intermediate_size: Hidden
    """Inner features of the feed-forward module; of a mixture's plain blocks."""
    max_position_embeddings: Positions = 2048
    """The longest sequence that positions are made for."""
    num_key_value_heads: Heads | None = None
    """Heads of keys and values; absent: as many as query heads."""
    head_dim: Width | None = None
    """Features of a head; absent: those of the residual stream, divided by the heads."""
    hidden_act: Line | None = None
    """The feed-forward module's activation."""
    hidden_activation: Line | None = None
    """The same in Gemma."""
    rms_norm_eps: Epsilon | None = None
    """What is added to a mean square."""
    layer_norm_eps: Epsilon | None = None
    """What is added to a variance."""
    tie_word_embeddings: bool | None = None
    """Whether embedding and output projection are one parameter."""
    attention_bias: bool = False
    """Biases of the projections of attention."""
    qkv_bias: bool | None = None
    """Biases of queries, keys and values."""
    mlp_bias: bool = False
    """Biases of the feed-forward module."""
    rope_theta: Base | None = None
    """The base of rotary positions."""
    rope_scaling: Rope | None = None
    """How rotary frequencies are changed: linear, llama3, yarn or longrope."""
    rope_parameters: Rope | None = None
    """Both of these, as newer files have them."""
    rope_local_base_freq: Base | None = None
    """The base in blocks with a window."""
    rope_interleave: bool = True
    """Whether neighbours are turned as pairs (DeepSeek-V3)."""
    original_max_position_embeddings: Positions | None = None
    """Positions of the first training, for longrope."""
    partial_rotary_factor: Share | None = None
    """The share of a head's features that is turned."""
    sliding_window: Annotated[int, Field(ge=0, le=2**30)] | None = None
    """How many tokens attention reaches back; 0: all."""
    use_sliding_window: bool = False
    """Whether it is used."""
    max_window_layers: Period | None = None
    """The first block that has a window."""
    sliding_window_pattern: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """Every so manieth block reaches all tokens."""
    layer_types: Kinds | None = None
    """For each block full_attention or sliding_attention."""
    no_rope_layers: Blocks | None = None
    """For each block 0 where it has no positions."""
    no_rope_layer_interval: Annotated[int, Field(ge=1, le=10_000)] = 4
    """Every so manieth block has no positions."""
    query_pre_attn_scalar: Cap | None = None
    """Scores are divided by its square root."""
    attn_logit_softcapping: Cap | None = None
    """The cap of scores."""
    final_logit_softcapping: Cap | None = None
    """The cap of logits."""
    clip_qkv: Cap | None = None
    """Limit of queries, keys and values."""
    num_local_experts: Experts = 0
    """Experts of a block (Mixtral; Qwen in newer files)."""
    num_experts: Experts | None = None
    """Experts of a block (Qwen)."""
    n_routed_experts: Experts | None = None
    """Experts of a block (DeepSeek)."""
    num_experts_per_tok: Experts = 0
    """Experts that a token goes to."""
    moe_intermediate_size: Hidden | None = None
    """Inner features of one expert."""
    shared_expert_intermediate_size: Hidden | None = None
    """Inner features of the expert of all tokens."""
    n_shared_experts: Experts | None = None
    """How many experts' worth of features the expert of all tokens has."""
    norm_topk_prob: bool = False
    """Whether the shares of the chosen experts are made to sum to 1."""
    decoder_sparse_step: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Every so manieth block has experts."""
    mlp_only_layers: Blocks = ()
    """Blocks without experts."""
    first_k_dense_replace: Period | None = None
    """How many blocks come before those with experts."""
    scoring_func: Line | None = None
    """softmax or sigmoid."""
    topk_method: Line | None = None
    """greedy, group_limited_greedy or noaux_tc."""
    n_group: Annotated[int, Field(ge=1, le=10**5)] | None = None
    """Groups of experts."""
    topk_group: Annotated[int, Field(ge=1, le=10**5)] | None = None
    """Groups that are looked at."""
    routed_scaling_factor: Cap = 1.0
    """What shares of experts are multiplied by."""
    q_lora_rank: Width | None = None
    """Width that queries are compressed to."""
    kv_lora_rank: Width | None = None
    """Width that keys and values are compressed to."""
    qk_nope_head_dim: Width | None = None
    """Features of a head without position."""
    qk_rope_head_dim: Width | None = None
    """Features of a head that are turned."""
    v_head_dim: Width | None = None
    """Features of a head's values."""
    name_or_path: Annotated[Line, Field(alias="_name_or_path")] = ""
    """What the model is called here."""


@record
class Gpt2Config:
    """GPT-2."""

    vocab_size: Vocabulary
    """Tokens that the model knows."""
    n_positions: Positions
    """Rows of the position table."""
    n_embd: Width
    """Features of the residual stream."""
    n_layer: Layers
    """Blocks."""
    n_head: Heads
    """Heads of a block."""
    n_inner: Hidden | None = None
    """Inner features of the feed-forward module; absent: four times the width."""
    activation_function: Line = "gelu_new"
    """The feed-forward module's activation."""
    layer_norm_epsilon: Epsilon = 1e-5
    """What is added to a variance."""
    tie_word_embeddings: bool = True
    """Whether embedding and output projection are one parameter."""
    name_or_path: Annotated[Line, Field(alias="_name_or_path")] = ""
    """What the model is called here."""


@record
class NeoxConfig:
    """GPT-NeoX and Pythia."""

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
    max_position_embeddings: Positions = 2048
    """The longest sequence that positions are made for."""
    hidden_act: Line = "gelu"
    """The feed-forward module's activation."""
    rotary_pct: Share | None = None
    """The share of a head's features that is turned; absent: a quarter."""
    partial_rotary_factor: Share | None = None
    """The same in newer files."""
    rotary_emb_base: Base | None = None
    """The base of rotary positions."""
    rope_theta: Base | None = None
    """The same in newer files."""
    rope_scaling: Rope | None = None
    """How rotary frequencies are changed."""
    rope_parameters: Rope | None = None
    """Base, share and scaling, as newer files have them."""
    layer_norm_eps: Epsilon = 1e-5
    """What is added to a variance."""
    use_parallel_residual: bool = True
    """Whether attention and feed-forward module read the same residual stream."""
    attention_bias: bool = True
    """Biases of the projections of attention."""
    tie_word_embeddings: bool = False
    """Whether embedding and output projection are one parameter."""
    name_or_path: Annotated[Line, Field(alias="_name_or_path")] = ""
    """What the model is called here."""


@record
class FalconConfig:
    """Falcon 7B, 40B and 180B (newer ones are Llamas)."""

    vocab_size: Vocabulary
    """Tokens that the model knows."""
    hidden_size: Width
    """Features of the residual stream."""
    num_hidden_layers: Layers
    """Blocks."""
    num_attention_heads: Heads
    """Query heads of a block."""
    num_kv_heads: Heads | None = None
    """Heads of keys and values in the newer form; absent: as many as query heads."""
    ffn_hidden_size: Hidden | None = None
    """Inner features of the feed-forward module; absent: four times the width."""
    max_position_embeddings: Positions = 2048
    """The longest sequence that positions are made for."""
    activation: Line = "gelu"
    """The feed-forward module's activation."""
    layer_norm_epsilon: Epsilon = 1e-5
    """What is added to a variance."""
    multi_query: bool = True
    """Whether all query heads share one key and value (older form)."""
    new_decoder_architecture: bool = False
    """The newer form: groups of query heads, two normalisations side by side."""
    num_ln_in_parallel_attn: Annotated[int, Field(ge=1, le=2)] | None = None
    """Normalisations side by side in the newer form."""
    parallel_attn: bool = True
    """Whether attention and feed-forward module read the same residual stream."""
    bias: bool = False
    """Biases of all products."""
    rope_theta: Base | None = None
    """The base of rotary positions."""
    rope_scaling: Rope | None = None
    """How rotary frequencies are changed."""
    rope_parameters: Rope | None = None
    """Both of these, as newer files have them."""
    tie_word_embeddings: bool = True
    """Whether embedding and output projection are one parameter."""
    name_or_path: Annotated[Line, Field(alias="_name_or_path")] = ""
    """What the model is called here."""


@record
class BloomConfig:
    """BLOOM."""

    vocab_size: Vocabulary
    """Tokens that the model knows."""
    hidden_size: Width | None = None
    """Features of the residual stream."""
    n_embed: Width | None = None
    """The same in older files."""
    n_layer: Layers | None = None
    """Blocks."""
    num_hidden_layers: Layers | None = None
    """The same in some files."""
    n_head: Heads | None = None
    """Heads of a block."""
    num_attention_heads: Heads | None = None
    """The same in some files."""
    layer_norm_epsilon: Epsilon = 1e-5
    """What is added to a variance."""
    tie_word_embeddings: bool = True
    """Whether embedding and output projection are one parameter."""
    name_or_path: Annotated[Line, Field(alias="_name_or_path")] = ""
    """What the model is called here."""


@record
class OptConfig:
    """OPT."""

    vocab_size: Vocabulary
    """Tokens that the model knows."""
    hidden_size: Width
    """Features of the residual stream."""
    num_hidden_layers: Layers
    """Blocks."""
    num_attention_heads: Heads
    """Heads of a block."""
    ffn_dim: Hidden
    """Inner features of the feed-forward module."""
    max_position_embeddings: Positions = 2048
    """The longest sequence; the position table has two rows more."""
    word_embed_proj_dim: Width | None = None
    """Features of the embedding; where they are others, a product leads to the width."""
    do_layer_norm_before: bool = True
    """Whether normalisations stand before attention and feed-forward module, or after."""
    activation_function: Line = "relu"
    """The feed-forward module's activation."""
    enable_bias: bool = True
    """Biases of all products."""
    layer_norm_elementwise_affine: bool = True
    """Whether normalisations have parameters."""
    remove_final_layer_norm: Annotated[bool, Field(alias="_remove_final_layer_norm")] = False
    """Whether there is no normalisation before the output projection."""
    tie_word_embeddings: bool = True
    """Whether embedding and output projection are one parameter."""
    name_or_path: Annotated[Line, Field(alias="_name_or_path")] = ""
    """What the model is called here."""
