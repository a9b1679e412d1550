"""Records of the Hugging Face `config.json` fields that are read, one record per set of names.

`families` says which fields of a record apply to a family. Every number has a limit of ten or more
times what a published model has.
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
    """Holds the config.json of Llama or a family that uses its field names."""

    vocab_size: Vocabulary
    """Number of tokens in the vocabulary."""
    hidden_size: Width
    """Number of features of the residual stream."""
    num_hidden_layers: Layers
    """Number of blocks."""
    num_attention_heads: Heads
    """Number of query heads of a block."""
    intermediate_size: Hidden
    """Inner width of the feed-forward module; in a mixture of experts, of dense blocks."""
    max_position_embeddings: Positions = 2048
    """Longest sequence that the positions were trained for."""
    num_key_value_heads: Heads | None = None
    """Number of key-value heads; if absent, that of query heads."""
    head_dim: Width | None = None
    """Number of features of a head; if absent, the width divided by the number of heads."""
    hidden_act: Line | None = None
    """Activation of the feed-forward module."""
    hidden_activation: Line | None = None
    """The same field in Gemma."""
    rms_norm_eps: Epsilon | None = None
    """Epsilon of the RMS normalisations."""
    layer_norm_eps: Epsilon | None = None
    """Epsilon of the layer normalisations."""
    tie_word_embeddings: bool | None = None
    """True if the embedding and the output projection are one parameter."""
    attention_bias: bool = False
    """True if the projections of attention have biases."""
    qkv_bias: bool | None = None
    """True if the projections to queries, keys and values have biases."""
    mlp_bias: bool = False
    """True if the feed-forward module has biases."""
    rope_theta: Base | None = None
    """Base of the rotary frequencies."""
    rope_scaling: Rope | None = None
    """Scaling of the rotary frequencies: linear, llama3, yarn or longrope, with its parameters."""
    rope_parameters: Rope | None = None
    """Both of these in one table, as in newer files."""
    rope_local_base_freq: Base | None = None
    """Base of the rotary frequencies in blocks with a sliding window."""
    rope_interleave: bool = True
    """True if neighbouring features are rotated as pairs (DeepSeek-V3)."""
    original_max_position_embeddings: Positions | None = None
    """Longest sequence of the original training, for longrope."""
    partial_rotary_factor: Share | None = None
    """Fraction of a head's features that is rotated."""
    sliding_window: Annotated[int, Field(ge=0, le=2**30)] | None = None
    """Number of tokens that a query attends to, its own included; 0 means all."""
    use_sliding_window: bool = False
    """True if sliding_window is used."""
    max_window_layers: Period | None = None
    """Index of the first block with a sliding window."""
    sliding_window_pattern: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """Period of blocks without a window: 6 means that blocks 5, 11, ... attend to all tokens."""
    layer_types: Kinds | None = None
    """The kind of each block: full_attention or sliding_attention."""
    no_rope_layers: Blocks | None = None
    """A number for each block, 0 if the block has no positions."""
    no_rope_layer_interval: Annotated[int, Field(ge=1, le=10_000)] = 4
    """Period of blocks without positions: 4 means blocks 3, 7, ..."""
    query_pre_attn_scalar: Cap | None = None
    """Number whose square root attention scores are divided by."""
    attn_logit_softcapping: Cap | None = None
    """Cap c of attention scores: c * tanh(score / c)."""
    final_logit_softcapping: Cap | None = None
    """Cap c of logits: c * tanh(logit / c)."""
    clip_qkv: Cap | None = None
    """Largest magnitude of queries, keys and values; larger ones are clamped."""
    num_local_experts: Experts = 0
    """Number of experts of a block (Mixtral; Qwen in newer files)."""
    num_experts: Experts | None = None
    """Number of experts of a block (Qwen)."""
    n_routed_experts: Experts | None = None
    """Number of experts of a block (DeepSeek)."""
    num_experts_per_tok: Experts = 0
    """Number of experts that each token is routed to."""
    moe_intermediate_size: Hidden | None = None
    """Inner width of one expert."""
    shared_expert_intermediate_size: Hidden | None = None
    """Inner width of the shared expert, which all tokens go through."""
    n_shared_experts: Experts | None = None
    """Inner width of the shared expert, in multiples of that of one expert."""
    norm_topk_prob: bool = False
    """True if the weights of the chosen experts are divided by their sum."""
    decoder_sparse_step: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Period of blocks with experts: 2 means blocks 1, 3, ..."""
    mlp_only_layers: Blocks = ()
    """Indices of dense blocks, which have no experts."""
    first_k_dense_replace: Period | None = None
    """Number of dense blocks before the first one with experts."""
    scoring_func: Line | None = None
    """Function that turns router logits into scores: softmax or sigmoid."""
    topk_method: Line | None = None
    """How experts are chosen: greedy, group_limited_greedy or noaux_tc."""
    n_group: Annotated[int, Field(ge=1, le=10**5)] | None = None
    """Number of groups that the experts are divided into."""
    topk_group: Annotated[int, Field(ge=1, le=10**5)] | None = None
    """Number of groups that a token's experts are chosen from."""
    routed_scaling_factor: Cap = 1.0
    """Factor that the weights of the chosen experts are multiplied by."""
    q_lora_rank: Width | None = None
    """Rank of the compressed queries."""
    kv_lora_rank: Width | None = None
    """Rank of the compressed keys and values."""
    qk_nope_head_dim: Width | None = None
    """Number of features of a head's query and key that are not rotated."""
    qk_rope_head_dim: Width | None = None
    """Number of features of a head's query and key that are rotated."""
    v_head_dim: Width | None = None
    """Number of features of a head's value."""
    name_or_path: Annotated[Line, Field(alias="_name_or_path")] = ""
    """Name of the model."""


@record
class Gpt2Config:
    """Holds the config.json of GPT-2."""

    vocab_size: Vocabulary
    """Number of tokens in the vocabulary."""
    n_positions: Positions
    """Number of rows of the position table, which is the longest sequence."""
    n_embd: Width
    """Number of features of the residual stream."""
    n_layer: Layers
    """Number of blocks."""
    n_head: Heads
    """Number of attention heads of a block."""
    n_inner: Hidden | None = None
    """Inner width of the feed-forward module; if absent, four times the width."""
    activation_function: Line = "gelu_new"
    """Activation of the feed-forward module."""
    layer_norm_epsilon: Epsilon = 1e-5
    """Epsilon of the layer normalisations."""
    tie_word_embeddings: bool = True
    """True if the embedding and the output projection are one parameter."""
    name_or_path: Annotated[Line, Field(alias="_name_or_path")] = ""
    """Name of the model."""


@record
class NeoxConfig:
    """Holds the config.json of GPT-NeoX and Pythia."""

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
    max_position_embeddings: Positions = 2048
    """Longest sequence that the positions were trained for."""
    hidden_act: Line = "gelu"
    """Activation of the feed-forward module."""
    rotary_pct: Share | None = None
    """Fraction of a head's features that is rotated; if absent, a quarter."""
    partial_rotary_factor: Share | None = None
    """The same field in newer files."""
    rotary_emb_base: Base | None = None
    """Base of the rotary frequencies."""
    rope_theta: Base | None = None
    """The same field in newer files."""
    rope_scaling: Rope | None = None
    """Scaling of the rotary frequencies."""
    rope_parameters: Rope | None = None
    """Base, fraction and scaling in one table, as in newer files."""
    layer_norm_eps: Epsilon = 1e-5
    """Epsilon of the layer normalisations."""
    use_parallel_residual: bool = True
    """True if attention and feed-forward module both read the block's input (parallel residual)."""
    attention_bias: bool = True
    """True if the projections of attention have biases."""
    tie_word_embeddings: bool = False
    """True if the embedding and the output projection are one parameter."""
    name_or_path: Annotated[Line, Field(alias="_name_or_path")] = ""
    """Name of the model."""


@record
class FalconConfig:
    """Holds the config.json of Falcon 7B, 40B and 180B (newer Falcons are Llamas)."""

    vocab_size: Vocabulary
    """Number of tokens in the vocabulary."""
    hidden_size: Width
    """Number of features of the residual stream."""
    num_hidden_layers: Layers
    """Number of blocks."""
    num_attention_heads: Heads
    """Number of query heads of a block."""
    num_kv_heads: Heads | None = None
    """Number of key-value heads in the newer form; if absent, that of query heads."""
    ffn_hidden_size: Hidden | None = None
    """Inner width of the feed-forward module; if absent, four times the width."""
    max_position_embeddings: Positions = 2048
    """Longest sequence that the positions were trained for."""
    activation: Line = "gelu"
    """Activation of the feed-forward module."""
    layer_norm_epsilon: Epsilon = 1e-5
    """Epsilon of the layer normalisations."""
    multi_query: bool = True
    """True if all query heads share one key-value head (older form)."""
    new_decoder_architecture: bool = False
    """True for the newer form, with grouped-query attention and two parallel normalisations."""
    num_ln_in_parallel_attn: Annotated[int, Field(ge=1, le=2)] | None = None
    """Number of parallel normalisations in the newer form."""
    parallel_attn: bool = True
    """True if attention and feed-forward module both read the block's input (parallel residual)."""
    bias: bool = False
    """True if all linear maps have biases."""
    rope_theta: Base | None = None
    """Base of the rotary frequencies."""
    rope_scaling: Rope | None = None
    """Scaling of the rotary frequencies."""
    rope_parameters: Rope | None = None
    """Both of these in one table, as in newer files."""
    tie_word_embeddings: bool = True
    """True if the embedding and the output projection are one parameter."""
    name_or_path: Annotated[Line, Field(alias="_name_or_path")] = ""
    """Name of the model."""


@record
class BloomConfig:
    """Holds the config.json of BLOOM."""

    vocab_size: Vocabulary
    """Number of tokens in the vocabulary."""
    hidden_size: Width | None = None
    """Number of features of the residual stream."""
    n_embed: Width | None = None
    """The same field in older files."""
    n_layer: Layers | None = None
    """Number of blocks."""
    num_hidden_layers: Layers | None = None
    """The same field in some files."""
    n_head: Heads | None = None
    """Number of attention heads of a block."""
    num_attention_heads: Heads | None = None
    """The same field in some files."""
    layer_norm_epsilon: Epsilon = 1e-5
    """Epsilon of the layer normalisations."""
    tie_word_embeddings: bool = True
    """True if the embedding and the output projection are one parameter."""
    name_or_path: Annotated[Line, Field(alias="_name_or_path")] = ""
    """Name of the model."""


@record
class OptConfig:
    """Holds the config.json of OPT."""

    vocab_size: Vocabulary
    """Number of tokens in the vocabulary."""
    hidden_size: Width
    """Number of features of the residual stream."""
    num_hidden_layers: Layers
    """Number of blocks."""
    num_attention_heads: Heads
    """Number of attention heads of a block."""
    ffn_dim: Hidden
    """Inner width of the feed-forward module."""
    max_position_embeddings: Positions = 2048
    """Longest sequence; the position table has two more rows."""
    word_embed_proj_dim: Width | None = None
    """Width of the embedding; if it is not hidden_size, linear maps convert between the two."""
    do_layer_norm_before: bool = True
    """True for normalisation before attention and feed-forward module, false for after them."""
    activation_function: Line = "relu"
    """Activation of the feed-forward module."""
    enable_bias: bool = True
    """True if all linear maps have biases."""
    layer_norm_elementwise_affine: bool = True
    """True if the normalisations have weights and biases."""
    remove_final_layer_norm: Annotated[bool, Field(alias="_remove_final_layer_norm")] = False
    """True if there is no normalisation before the output projection."""
    tie_word_embeddings: bool = True
    """True if the embedding and the output projection are one parameter."""
    name_or_path: Annotated[Line, Field(alias="_name_or_path")] = ""
    """Name of the model."""
