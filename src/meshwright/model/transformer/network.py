"""The layers of a transformer in order, and what each of them reads."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from meshwright.model.config import LanguageModel
from meshwright.model.transformer import forward
from meshwright.model.transformer.operations import Operations, Value
from meshwright.model.transformer.usual import made_of
from meshwright.records import record


@record
class LayerOf:
    """One layer of a network."""

    name: str
    kind: str
    """Layers of one kind compute the same."""
    compute: Callable[..., Value]
    """Takes Operations and what is read."""
    reads: tuple[str, ...]
    """Inputs of the batch, or layers."""
    units: int
    """Tensor widths that divide it are legal; 0: every one."""


def inputs_of(c: LanguageModel) -> tuple[str, ...]:
    """What a batch of the model is made of."""
    return ("tokens", "targets")


def layers_of(c: LanguageModel) -> tuple[LayerOf, ...]:
    """Embedding, blocks, head."""
    a = made_of(c)
    first = LayerOf(
        name="embedding", kind="embedding", compute=partial(_embedding, c=c), reads=("tokens",),
        units=1 if a.embedding_width else 0,
    )  # fmt: skip
    blocks = [
        LayerOf(
            name=f"blocks.{number}",
            kind=_kind(c, number),
            compute=partial(_block, c=c, number=number),
            reads=(f"blocks.{number - 1}" if number else "embedding",),
            units=forward.tensor_units(c, number),
        )
        for number in range(c.layers)
    ]
    last = LayerOf(
        name="head", kind="head", compute=partial(_head, c=c), reads=(blocks[-1].name, "targets"),
        units=1 if a.embedding_width or a.head_transform else 0,
    )  # fmt: skip
    return (first, *blocks, last)


def _embedding(o: Operations, tokens: Value, *, c: LanguageModel) -> Value:
    return forward.embedding(o, c, tokens)


def _block(o: Operations, x: Value, *, c: LanguageModel, number: int) -> Value:
    return forward.block(o, c, number, x)


def _head(o: Operations, x: Value, targets: Value, *, c: LanguageModel) -> Value:
    return forward.head(o, c, x, targets)


def _kind(c: LanguageModel, number: int) -> str:
    """What tells a block from others: its window, its positions, its experts."""
    a = made_of(c)
    window = a.windows[number] if a.windows else 0
    dense = a.mixture is None or number in a.mixture.dense
    return f"block window {window} unrotated {number in a.unrotated} dense {dense}"


def tied_parameters(c: LanguageModel) -> dict[str, str]:
    """Parameters that are another one's: own name -> the name of the first."""
    return {"head.linear.weight": "embedding.tokens.weight"} if c.tied else {}
