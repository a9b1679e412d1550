"""Language models by their few numbers: GPT-2, Llama, Mistral, Mixtral and U-Transformers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from meshwright.errors import Problem
from meshwright.model.transformer.spec import Architecture
from meshwright.records import Name, record

# Ten and more times what any published model has; what is larger is a slip, and would overflow.
Vocabulary = Annotated[int, Field(ge=1, le=10**7)]
Positions = Annotated[int, Field(ge=1, le=2**30)]
Width = Annotated[int, Field(ge=1, le=10**6)]
Layers = Annotated[int, Field(ge=1, le=10_000)]
Heads = Annotated[int, Field(ge=1, le=10**5)]
Hidden = Annotated[int, Field(ge=1, le=10**7)]
Experts = Annotated[int, Field(ge=0, le=10**5)]
RotaryBase = Annotated[float, Field(gt=0, le=1e15)]


@record
class LanguageModel:
    """What defines a model of one of the families; all numbers are counts."""

    name: Name
    family: Name
    """The `model_type` of its config.json, or `u-transformer`."""
    vocabulary: Vocabulary
    positions: Positions
    """Longest sequence: the size of the position table, or (`rotary`) what it is made for."""
    width: Width
    layers: Layers
    heads: Heads
    kv_heads: Heads
    head: Width
    """Features of one head."""
    hidden: Hidden
    """Inner features of the feed-forward module, of one expert."""
    tied: bool = False
    """Input embedding and output projection are one parameter."""
    experts: Experts = 0
    chosen: Experts = 0
    """Experts that a token goes to."""
    rotary_base: RotaryBase = 10000.0
    architecture: Architecture | None = None
    """What its blocks are made of; none of a U-Transformer, whose layers are traced."""
    levels: Annotated[int, Field(ge=0, le=20)] = 0
    """Of a U-Transformer: how often its encoder shortens the sequence and doubles the width;
    `width` and `heads` are those of its ends, `layers` its blocks on each level of either side."""


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

# From the config.json that the authors published with each model; the tiny ones are for trying
# things out, with a vocabulary of bytes. The U-Transformers are of our own making, for pictures of
# 32 x 32 bytes, in the sizes that "On Optimizing the Communication of Model Parallelism"
# (arXiv 2211.05322) trains.
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


def problems_of(
    model: LanguageModel, source: str, fields: dict[str, str] | None = None
) -> Iterator[Problem]:
    """What is wrong between numbers that are each in their range; `fields` are their names in the
    file, where they differ."""
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
