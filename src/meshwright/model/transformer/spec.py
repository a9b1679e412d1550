"""What a transformer is made of, beyond the sizes that `model.config` has of every model."""

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

NormKind = Literal["rms", "layer"]
NormPlace = Literal["before", "after", "both", "output"]
Position = Literal["learned", "rotary", "alibi", "relative", "sinusoidal", "none"]
Activation = Literal["silu", "gelu", "gelu-tanh", "quick-gelu", "relu", "relu-squared"]
Task = Literal["next token", "masked tokens", "image class", "text to text", "speech to text"]


@record
class Norm:
    """A normalisation of features."""

    kind: NormKind
    epsilon: Epsilon = 1e-5
    weight: bool = True
    bias: bool = False
    """A layer normalisation's offset."""
    one_added: bool = False
    """The gain is 1 + weight (Gemma)."""


@record
class Scaling:
    """How rotary frequencies are changed for sequences longer than those of the first training."""

    kind: Literal["linear", "llama3", "yarn", "longrope"]
    factor: Factor = 1.0
    original: Annotated[int, Field(ge=1, le=2**30)] = 1
    """Positions of the first training."""
    low: float = 1.0
    """llama3: low frequency factor. yarn: beta slow."""
    high: float = 1.0
    """llama3: high frequency factor. yarn: beta fast."""
    magnitude: float = 1.0
    """What cosines and sines are multiplied by."""
    truncated: bool = True
    """yarn: the borders between frequencies are whole numbers."""
    short: tuple[float, ...] = ()
    """longrope: divisors of each frequency up to `original` positions, and beyond."""
    long: tuple[float, ...] = ()


@record
class Rotary:
    """Rotary positions (Su et al. 2021)."""

    base: Factor = 10000.0
    features: Width
    """Features of a head that are turned, the first ones; the rest stays."""
    adjacent: bool = False
    """Features 2i and 2i + 1 are a pair (GPT-J, DeepSeek), not i and i + half."""
    scaling: Scaling | None = None


@record
class Latent:
    """Multi-head latent attention (DeepSeek-V2, section 2.1)."""

    query_rank: Annotated[int, Field(ge=0, le=10**6)] = 0
    """Width to which queries are compressed; 0: they are not."""
    key_value_rank: Width
    plain: Width
    """Features of a head's query and key that know no position."""
    rotary: Width
    """Features that are turned; the key's are common to all heads."""
    value: Width
    """Features of a head's value."""


@record
class Mixture:
    """Experts, of which each token goes to `LanguageModel.chosen` of `LanguageModel.experts`."""

    score: Literal["softmax", "sigmoid"] = "softmax"
    normalised: bool = True
    """Shares of the chosen experts are divided by their sum."""
    scale: Factor = 1.0
    """What shares are multiplied by."""
    groups: Experts = 1
    groups_chosen: Experts = 1
    """Experts stand in groups, of which the best are looked at (DeepSeek-V2, V3)."""
    group_score: Literal["best", "two best"] = "best"
    balanced: bool = False
    """A bias that is not trained by gradients is added to scores where experts are chosen."""
    shared: Annotated[int, Field(ge=0, le=10**7)] = 0
    """Inner width of the expert that all tokens go to; 0: there is none."""
    shared_gate: bool = False
    """The shared expert's output is multiplied by a gate of its own (Qwen2-MoE)."""
    dense: tuple[Annotated[int, Field(ge=0, le=10_000)], ...] = ()
    """Blocks that have a plain feed-forward module instead."""
    dense_hidden: Hidden = 1
    """Inner width of those."""


@record
class Encoder:
    """What stands before a decoder, or alone."""

    layers: Annotated[int, Field(ge=1, le=10_000)]
    heads: Heads
    hidden: Hidden
    positions: Annotated[int, Field(ge=1, le=2**30)]
    """Of its input where that has one length: frames of speech, patches of a picture."""


@record
class Picture:
    """Pictures that are cut into patches, and what they are told apart as."""

    size: tuple[Width, Width]
    patch: tuple[Width, Width]
    channels: Width = 3
    classes: Annotated[int, Field(ge=1, le=10**7)]


@record
class Architecture:
    """What the blocks of a transformer compute, and what stands before and behind them."""

    task: Task = "next token"
    norm: Norm
    place: NormPlace = "before"
    """Of a block's normalisations: before attention and feed-forward module, after their sum with
    the residual stream, both before and behind each, or behind each ("output")."""
    parallel: Literal["", "one norm", "two norms"] = ""
    """Attention and feed-forward module read the same residual stream."""
    last_norm: bool = True
    embedding_norm: bool = False
    position: Position
    position_offset: Annotated[int, Field(ge=0, le=100)] = 0
    """Rows of the position table before the first position (OPT)."""
    segments: Annotated[int, Field(ge=0, le=10**6)] = 0
    """Rows of the table of segments (BERT)."""
    rotary: Rotary | None = None
    local_rotary: Rotary | None = None
    """Of blocks with a window, where they have their own (Gemma 3)."""
    unrotated: tuple[Annotated[int, Field(ge=0, le=10_000)], ...] = ()
    """Blocks without positions (SmolLM3)."""
    windows: tuple[Window, ...] = ()
    """For each block how many tokens attention reaches back, itself counted; 0: all. None given:
    all blocks reach all."""
    activation: Activation
    gated: bool
    query_bias: bool = False
    """Of the projections to queries, keys and values."""
    key_bias: bool | None = None
    """Of keys, where it is another (Whisper)."""
    out_bias: bool = False
    feed_bias: bool = False
    head_bias: bool = False
    head_transform: bool = False
    """A product, activation and normalisation before the output projection (BERT)."""
    query_norm: Literal["", "head", "all"] = ""
    """Queries and keys are normalised head by head, or all heads together."""
    score_scale: Factor | None = None
    """What scores are multiplied by; none given: one over the square root of a head's features."""
    score_cap: Factor | None = None
    """Scores become cap * tanh(score / cap)."""
    logit_cap: Factor | None = None
    clamp: Factor | None = None
    """Queries, keys and values are clamped to plus or minus this (OLMo)."""
    embedding_scale: Factor | None = None
    """What embeddings are multiplied by."""
    embedding_width: Annotated[int, Field(ge=0, le=10**6)] = 0
    """Of the tables where it is not that of the blocks (OPT-350m); 0: the same."""
    logit_scale: Factor | None = None
    """What the last layer's input is multiplied by."""
    buckets: Annotated[int, Field(ge=0, le=10**6)] = 0
    reach: Annotated[int, Field(ge=0, le=2**30)] = 0
    """Relative positions: how many biases each head has, and the distance of the last."""
    latent: Latent | None = None
    mixture: Mixture | None = None
    encoder: Encoder | None = None
    picture: Picture | None = None
    mels: Annotated[int, Field(ge=0, le=10**5)] = 0
    """Features of a frame of speech."""
