"""Sizes of a language model (LanguageModel), and the models that are known by name (NAMED)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from meshwright.errors import Problem
from meshwright.model.transformer.spec import Architecture, AttentionKernel, Dropout
from meshwright.records import Name, record

# Limits of ten or more times what any published model has: a larger number is a mistake in the
# file, and would overflow later.
Vocabulary = Annotated[int, Field(ge=1, le=10**7)]
Positions = Annotated[int, Field(ge=1, le=2**30)]
Width = Annotated[int, Field(ge=1, le=10**6)]
Layers = Annotated[int, Field(ge=1, le=10_000)]
Heads = Annotated[int, Field(ge=1, le=10**5)]
Hidden = Annotated[int, Field(ge=1, le=10**7)]
Experts = Annotated[int, Field(ge=0, le=10**5)]
RotaryBase = Annotated[float, Field(gt=0, le=1e15)]
AttentionKind = Literal["fused", "unfused"]


@record
class LanguageModel:
    """Holds the sizes that define a model of one of the known families."""

    name: Name
    family: Name
    """The `model_type` of its config.json, or `u-transformer`."""
    vocabulary: Vocabulary
    positions: Positions
    """Longest sequence: the size of the position table, or the length that rotary positions were
    trained for."""
    width: Width
    """Number of features of the residual stream (hidden_size in most configs)."""
    layers: Layers
    """Number of blocks; in an encoder-decoder, blocks of the decoder."""
    heads: Heads
    """Number of query heads of a block."""
    kv_heads: Heads
    """Number of key-value heads of a block."""
    head: Width
    """Number of features of one head."""
    hidden: Hidden
    """Inner width of the feed-forward module, or of one expert."""
    tied: bool = False
    """True if the input embedding and the output projection are one parameter."""
    experts: Experts = 0
    """Number of experts of a block; 0 for a dense model."""
    chosen: Experts = 0
    """Number of experts that each token is routed to (top-k)."""
    rotary_base: RotaryBase = 10000.0
    """Base of the rotary frequencies (rope_theta)."""
    architecture: Architecture | None = None
    """What the blocks compute; None means that of the family's first paper, or a U-Transformer,
    whose layers are traced."""
    levels: Annotated[int, Field(ge=0, le=20)] = 0
    """Number of times that a U-Transformer's encoder shortens the sequence and doubles the width;
    `width` and `heads` are those at its ends, `layers` counts the blocks on each level and side."""
    attention: AttentionKind = "fused"
    """If attention is one kernel, or separate ones that write the scores to memory."""
    attention_dropout: Dropout = 0.0
    """Probability with which each attention weight is set to 0 in training."""

    @property
    def kernel(self) -> AttentionKernel:
        """Returns how the model computes attention."""
        return AttentionKernel(unfused=self.attention == "unfused", dropout=self.attention_dropout)


def _gpt2(name: str, width: int, layers: int, heads: int, **other: int) -> LanguageModel:
    return LanguageModel(
        name=name,
        family="gpt2",
        vocabulary=other.get("vocabulary", 50257),
        positions=1024,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head=width // heads,
        hidden=4 * width,
        tied=True,
    )


def _llama(  # noqa: PLR0913
    name: str,
    width: int,
    layers: int,
    heads: int,
    kv_heads: int,
    hidden: int,
    *,
    vocabulary: int = 32000,
    positions: int = 4096,
    rotary_base: float = 10000.0,
    experts: int = 0,
) -> LanguageModel:
    return LanguageModel(
        name=name,
        family="mixtral" if experts else "llama",
        vocabulary=vocabulary,
        positions=positions,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head=width // heads,
        hidden=hidden,
        experts=experts,
        chosen=2 if experts else 0,
        rotary_base=rotary_base,
    )


def _u_transformer(name: str, width: int, layers: int, heads: int, levels: int) -> LanguageModel:
    return LanguageModel(
        name=name,
        family="u-transformer",
        vocabulary=256,
        positions=1024,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head=width // heads,
        hidden=4 * width,
        levels=levels,
    )


_LLAMA_3 = {"vocabulary": 128256, "positions": 8192, "rotary_base": 5e5}

# Sizes come from the config.json that the authors published with each model. The tiny models are
# for quick trials and have a vocabulary of bytes. The U-Transformers are defined in this project,
# for pictures of 32 x 32 bytes, in the sizes that "On Optimizing the Communication of Model
# Parallelism" (arXiv 2211.05322) trains.
NAMED = {
    model.name: model
    for model in (
        _gpt2("gpt2", 768, 12, 12),
        _gpt2("gpt2-medium", 1024, 24, 16),
        _gpt2("gpt2-large", 1280, 36, 20),
        _gpt2("gpt2-xl", 1600, 48, 25),
        _llama("llama-2-7b", 4096, 32, 32, 32, 11008),
        _llama("llama-2-13b", 5120, 40, 40, 40, 13824),
        _llama("llama-2-70b", 8192, 80, 64, 8, 28672),
        _llama("llama-3-8b", 4096, 32, 32, 8, 14336, **_LLAMA_3),  # type: ignore[arg-type]
        _llama("llama-3-70b", 8192, 80, 64, 8, 28672, **_LLAMA_3),  # type: ignore[arg-type]
        _llama("mistral-7b", 4096, 32, 32, 8, 14336, positions=32768),
        _llama("mixtral-8x7b", 4096, 32, 32, 8, 14336, positions=32768, rotary_base=1e6, experts=8),
        _gpt2("gpt-tiny", 256, 8, 8, vocabulary=256),
        _llama("llama-tiny", 256, 8, 8, 4, 704, vocabulary=256),
        _llama("mixtral-tiny", 256, 4, 8, 4, 352, vocabulary=256, experts=4),
        _u_transformer("u-transformer-1b", 608, 2, 8, 3),
        _u_transformer("u-transformer-2b", 864, 2, 8, 3),
        _u_transformer("u-transformer-tiny", 64, 1, 4, 2),
    )
}


def size_problems(
    model: LanguageModel, source: str, fields: dict[str, str] | None = None
) -> Iterator[Problem]:
    """Yields a Problem for each pair of sizes that contradict each other; `fields` maps a size to
    its name in the file if that differs."""
    names = fields or {}

    def problem(field: str, wanted: str) -> Problem:
        return Problem(source, names.get(field, field), str(getattr(model, field)), wanted)

    if model.heads % model.kv_heads:
        yield problem("kv_heads", f"a divisor of the {model.heads} attention heads")
    if model.family == "gpt2" and model.width % model.heads:
        yield problem("heads", f"a divisor of the width {model.width}")
    turned = model.architecture.rotary if model.architecture else None
    if turned is not None and turned.features % 2:
        yield problem("head", "an even number: rotary positions turn pairs of features")
    if model.experts and not 1 <= model.chosen <= model.experts:
        yield problem("chosen", f"between 1 and the {model.experts} experts")
