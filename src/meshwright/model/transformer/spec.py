"""Describes the architecture of a transformer: what its layers compute. Sizes are in
`model.config`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from meshwright.records import record

Width = Annotated[int, Field(ge=1, le=10**6)]
Hidden = Annotated[int, Field(ge=1, le=10**7)]
Heads = Annotated[int, Field(ge=1, le=10**5)]
Experts = Annotated[int, Field(ge=1, le=10**5)]
Window = Annotated[int, Field(ge=0, le=2**30)]
Factor = Annotated[float, Field(gt=0, le=1e15)]
Epsilon = Annotated[float, Field(gt=0, lt=1)]
Dropout = Annotated[float, Field(ge=0, lt=1)]

NormKind = Literal["rms", "layer"]
NormPlace = Literal["before", "after", "both", "output"]
Position = Literal["learned", "rotary", "alibi", "relative", "sinusoidal", "none"]
Activation = Literal["silu", "gelu", "gelu-tanh", "quick-gelu", "relu", "relu-squared"]
Task = Literal["next token", "masked tokens", "image class", "text to text", "speech to text"]


@record
class AttentionKernel:
    """Says how attention is computed: by one fused kernel, or by a product, a softmax and a product
    that write their results to memory. What is computed is the same."""

    unfused: bool = False
    dropout: Dropout = 0.0
    """Probability with which each attention weight is set to 0 in training."""


FUSED = AttentionKernel()


@record
class Norm:
    """Describes how features are normalised: by RMS or by layer normalisation."""

    kind: NormKind
    epsilon: Epsilon = 1e-5
    weight: bool = True
    bias: bool = False
    """True if a layer normalisation has an offset."""
    one_added: bool = False
    """True if the gain is 1 + weight (Gemma)."""


@record
class Scaling:
    """Says how rotary frequencies are scaled for sequences longer than those of the original
    training."""

    kind: Literal["linear", "llama3", "yarn", "longrope"]
    factor: Factor = 1.0
    original: Annotated[int, Field(ge=1, le=2**30)] = 1
    """Longest sequence of the original training."""
    low: float = 1.0
    """Low frequency factor (llama3) or beta_slow (yarn)."""
    high: float = 1.0
    """High frequency factor (llama3) or beta_fast (yarn)."""
    magnitude: float = 1.0
    """Factor that cosines and sines are multiplied by."""
    truncated: bool = True
    """True if the ends of yarn's ramp are rounded to whole indices of pairs."""
    short: tuple[float, ...] = ()
    """Divisor of each frequency in sequences of up to `original` tokens (longrope)."""
    long: tuple[float, ...] = ()
    """Divisor of each frequency in longer sequences (longrope)."""


@record
class Rotary:
    """Describes a rotary position embedding (Su et al. 2021)."""

    base: Factor = 10000.0
    features: Width
    """Number of a head's features that are rotated: the first ones; the rest is unchanged."""
    adjacent: bool = False
    """True if features 2i and 2i + 1 form a pair (GPT-J, DeepSeek), false if i and i + half do."""
    scaling: Scaling | None = None


@record
class Latent:
    """Gives the sizes of multi-head latent attention (DeepSeek-V2, section 2.1)."""

    query_rank: Annotated[int, Field(ge=0, le=10**6)] = 0
    """Rank of the compressed queries; 0 if they are not compressed."""
    key_value_rank: Width
    """Rank of the compressed keys and values."""
    plain: Width
    """Number of features of a head's query and key that are not rotated."""
    rotary: Width
    """Number of features of a head's query and key that are rotated; those of the key are shared
    by all heads."""
    value: Width
    """Number of features of a head's value."""


@record
class Mixture:
    """Describes a mixture of experts. LanguageModel has the number of `experts`, and the number
    `chosen` of those that each token is routed to."""

    score: Literal["softmax", "sigmoid"] = "softmax"
    """Function that turns router logits into scores."""
    normalised: bool = True
    """True if the weights of the chosen experts are divided by their sum."""
    scale: Factor = 1.0
    """Factor that these weights are multiplied by."""
    groups: Experts = 1
    """Number of groups that the experts are divided into (DeepSeek-V2, V3)."""
    groups_chosen: Experts = 1
    """Number of groups, those with the best score, from which a token's experts are chosen."""
    group_score: Literal["best", "two best"] = "best"
    """A group's score: the best score among its experts, or the sum of its two best."""
    balanced: bool = False
    """True if a bias, which gradients do not train, is added to the scores to choose experts."""
    shared: Annotated[int, Field(ge=0, le=10**7)] = 0
    """Inner width of the shared expert, which all tokens go through; 0 if there is none."""
    shared_gate: bool = False
    """True if the shared expert's output is multiplied by a gate of its own (Qwen2-MoE)."""
    dense: tuple[Annotated[int, Field(ge=0, le=10_000)], ...] = ()
    """Indices of blocks that have a plain feed-forward module instead of experts."""
    dense_hidden: Hidden = 1
    """Inner width of the feed-forward module in those blocks."""


@record
class Encoder:
    """Gives the sizes of the encoder of an encoder-decoder model (T5, Whisper)."""

    layers: Annotated[int, Field(ge=1, le=10_000)]
    heads: Heads
    hidden: Hidden
    positions: Annotated[int, Field(ge=1, le=2**30)]
    """Length of the encoder's sequence: frames of speech after the convolutions, or the length that
    the model was trained on."""


@record
class Picture:
    """Says how pictures are cut into patches, and how many classes they are assigned to."""

    size: tuple[Width, Width]
    patch: tuple[Width, Width]
    channels: Width = 3
    classes: Annotated[int, Field(ge=1, le=10**7)]


@record
class Architecture:
    """Describes what the blocks of a transformer compute, and the layers before and after them.

    The order of operations in a block depends on `place`:

        before: x + attention(norm(x))        after: norm(x + attention(x))
        output: x + norm(attention(x))        both:  x + norm(attention(norm(x)))
    """

    task: Task = "next token"
    norm: Norm
    place: NormPlace = "before"
    """Place of a block's normalisations: before attention and feed-forward module, after their sum
    with the residual stream, at the output of each, or both before and at the output."""
    parallel: Literal["", "one norm", "two norms"] = ""
    """If not empty, attention and feed-forward module both read the block's input, behind one
    common normalisation or one each."""
    last_norm: bool = True
    """True if the last block's output is normalised before the output projection."""
    embedding_norm: bool = False
    """True if the embedding is normalised."""
    position: Position
    position_offset: Annotated[int, Field(ge=0, le=100)] = 0
    """Number of rows of the position table before that of the first position (OPT)."""
    segments: Annotated[int, Field(ge=0, le=10**6)] = 0
    """Number of rows of the segment table (BERT)."""
    rotary: Rotary | None = None
    local_rotary: Rotary | None = None
    """Rotary positions of blocks with a window, if they differ (Gemma 3)."""
    unrotated: tuple[Annotated[int, Field(ge=0, le=10_000)], ...] = ()
    """Indices of blocks without positions (SmolLM3)."""
    windows: tuple[Window, ...] = ()
    """Number of tokens that a query attends to in each block, its own included; 0 means all. If
    empty, every block attends to all tokens."""
    activation: Activation
    gated: bool
    """True if the feed-forward module computes down(activation(gate(x)) * up(x))."""
    query_bias: bool = False
    """True if the projections to queries, keys and values have biases."""
    key_bias: bool | None = None
    """The same for the keys, if they differ (Whisper)."""
    out_bias: bool = False
    """True if the projection of attention's output has a bias."""
    feed_bias: bool = False
    """True if the linear maps of the feed-forward module have biases."""
    head_bias: bool = False
    """True if the output projection has a bias."""
    head_transform: bool = False
    """True if a linear map, activation and normalisation precede the output projection (BERT)."""
    query_norm: Literal["", "head", "all"] = ""
    """If not empty, queries and keys are normalised, head by head or all heads together."""
    score_scale: Factor | None = None
    """Factor of attention scores; None means 1 / sqrt(features of a head)."""
    score_cap: Factor | None = None
    """Cap c of attention scores: c * tanh(score / c)."""
    logit_cap: Factor | None = None
    """Cap c of logits: c * tanh(logit / c)."""
    clamp: Factor | None = None
    """Largest magnitude of queries, keys and values; larger ones are clamped (OLMo)."""
    embedding_scale: Factor | None = None
    """Factor that embeddings are multiplied by."""
    embedding_width: Annotated[int, Field(ge=0, le=10**6)] = 0
    """Width of embedding and output projection, if it is not that of the blocks (OPT-350m); 0 means
    the same width."""
    logit_scale: Factor | None = None
    """Factor that the input of the output projection is multiplied by."""
    buckets: Annotated[int, Field(ge=0, le=10**6)] = 0
    """Number of relative-position biases of each head."""
    reach: Annotated[int, Field(ge=0, le=2**30)] = 0
    """Distance from which on all positions have the last relative-position bias."""
    latent: Latent | None = None
    mixture: Mixture | None = None
    encoder: Encoder | None = None
    picture: Picture | None = None
    mels: Annotated[int, Field(ge=0, le=10**5)] = 0
    """Number of mel features of a frame of speech."""
