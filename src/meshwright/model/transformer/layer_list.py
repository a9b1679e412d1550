"""Lists the layers of a transformer in order, with their inputs, and the tensors of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from meshwright.model.config import LanguageModel
from meshwright.model.transformer import encoder_decoder, forward
from meshwright.model.transformer.defaults import architecture_of
from meshwright.model.transformer.layer_operations import Operations, Value
from meshwright.records import record


@record
class LayerDescription:
    """Describes one layer of a transformer: its name, its inputs and its forward."""

    name: str
    """Name of the layer and of its module, such as `blocks.3`."""
    kind: str
    """Text that is equal for layers which compute the same."""
    compute: Callable[..., Value]
    """The forward: it takes Operations and the inputs of the layer."""
    reads: tuple[str, ...]
    """Names of its inputs: tensors of the batch, or earlier layers."""
    units: int
    """Number that a legal tensor-parallel width must divide; 0 means that every width is legal."""


@record
class Input:
    """Describes one tensor of a batch."""

    name: str
    shape: tuple[int, ...]
    """Its shape for one row."""
    index: bool = True
    """True for integers (token indices), false for floating point."""


def inputs_of(c: LanguageModel, sequence: int) -> tuple[Input, ...]:
    """Lists the tensors of a batch, for texts of `sequence` tokens."""
    a = architecture_of(c)
    text = (Input(name="tokens", shape=(sequence,)), Input(name="targets", shape=(sequence,)))
    if a.task == "image class":
        assert a.picture is not None
        pixels = Input(name="pixels", shape=(a.picture.channels, *a.picture.size), index=False)
        return (pixels, Input(name="targets", shape=()))
    if a.task == "speech to text":
        assert a.encoder is not None
        heard = Input(name="mels", shape=(a.mels, 2 * a.encoder.positions), index=False)
        return (heard, *text)
    if a.task == "text to text":
        return (Input(name="source", shape=(sequence,)), *text)
    return text


def tokens_of(c: LanguageModel, layer: str, sequence: int) -> int:
    """Gives the number of tokens in the output of a layer."""
    a = architecture_of(c)
    if a.picture is not None:
        return forward.patches_of(a.picture) + 1
    if layer.startswith("encoder") and a.task == "speech to text":
        assert a.encoder is not None
        return a.encoder.positions
    return sequence


def layers_of(c: LanguageModel) -> tuple[LayerDescription, ...]:
    """Lists the layers: embedding, blocks, head; in an encoder-decoder model, those of the encoder
    come first."""
    a = architecture_of(c)
    if a.encoder is not None:
        return (*_encoder(c), *_decoder(c))
    whole = bool(a.embedding_width) or a.picture is not None
    reads = "pixels" if a.picture is not None else "tokens"
    first = _layer("embedding", "embedding", forward.embedding, (reads,), 1 if whole else 0, c=c)
    blocks = [
        _layer(
            f"blocks.{number}", _kind(c, number), partial(forward.block, number=number),
            (f"blocks.{number - 1}" if number else "embedding",),
            forward.tensor_units(c, number), c=c,
        )
        for number in range(c.layers)
    ]  # fmt: skip
    whole = whole or a.head_transform
    last = _layer("head", "head", forward.head, (blocks[-1].name, "targets"), 1 if whole else 0,
                  c=c)  # fmt: skip
    return (first, *blocks, last)


def _layer(
    name: str, kind: str, function: Callable[..., Value], reads: tuple[str, ...], units: int,
    *, c: LanguageModel,
) -> LayerDescription:  # fmt: skip
    compute = partial(_computed, function=function, c=c)
    return LayerDescription(name=name, kind=kind, compute=compute, reads=reads, units=units)


def _computed(
    o: Operations, *values: Value, function: Callable[..., Value], c: LanguageModel
) -> Value:
    return function(o, c, *values)


def _encoder(c: LanguageModel) -> Iterator[LayerDescription]:
    a = architecture_of(c)
    assert a.encoder is not None
    spoken = a.task == "speech to text"
    before = "encoder_embedding"
    stem = encoder_decoder.embed_speech if spoken else encoder_decoder.embed_text
    yield _layer(before, before, stem, ("mels" if spoken else "source",), 1, c=c)
    for number in range(a.encoder.layers):
        name = f"encoder.{number}"
        yield _layer(name, "encoder", encoder_decoder.encoder_block, (before,), 1, c=c)
        before = name
    yield _layer("encoder_norm", "encoder norm", encoder_decoder.encoder_norm, (before,), 1, c=c)


def _decoder(c: LanguageModel) -> Iterator[LayerDescription]:
    before = "embedding"
    yield _layer(before, before, encoder_decoder.decoder_embedding, ("tokens",), 1, c=c)
    for number in range(c.layers):
        name = f"blocks.{number}"
        yield _layer(name, "block", encoder_decoder.decoder_block, (before, "encoder_norm"), 1, c=c)
        before = name
    yield _layer("head", "head", forward.head, (before, "targets"), 1, c=c)


def _kind(c: LanguageModel, number: int) -> str:
    """Gives the kind of a block, in which blocks of one model may differ: window, positions,
    experts."""
    a = architecture_of(c)
    window = a.windows[number] if a.windows else 0
    dense = a.mixture is None or number in a.mixture.dense
    return f"block window {window} unrotated {number in a.unrotated} dense {dense}"


def tied_parameters(c: LanguageModel) -> dict[str, str]:
    """Gives the parameters that are the same as an earlier one: name -> name of the first. Example:
    {"head.linear.weight": "embedding.tokens.weight"}."""
    a = architecture_of(c)
    table = "embedding.tokens.weight"
    tied = {}
    if a.task == "text to text":
        tied[table] = table = "encoder_embedding.tokens.weight"
        assert a.encoder is not None
        for part, layers in (("encoder", a.encoder.layers), ("blocks", c.layers)):
            first = f"{part}.0.attention.bias.weight"
            tied |= {f"{part}.{n}.attention.bias.weight": first for n in range(1, layers)}
    if c.tied:
        tied["head.linear.weight"] = table
    return tied
