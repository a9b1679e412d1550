"""Counts the cost of operations in first layers: positions, segments, patches, convolutions; and of
relative-position biases."""

from __future__ import annotations

from collections.abc import Sequence

from meshwright.model.transformer.counts import Counts
from meshwright.model.transformer.module_specs import INDEX_BYTES, ModuleSpec
from meshwright.model.transformer.tape import Sized


def positions(o: Counts, name: str, x: Sized, entries: int, offset: int, *, frozen: bool) -> Sized:
    """Counts the addition of position embeddings: the looked-up table has one row per token, for
    any number of rows in the batch."""
    tokens, width = x.shape[1], x.shape[2]
    o.modules[name] = ModuleSpec("sines" if frozen else "table", (entries + offset, width))
    own = o.parameter(f"{name}.weight", (entries + offset, width), trained=not frozen)
    table = o.tape.new((tokens, width), o.m)
    if o.low:
        table = o.tape.new((tokens, width), o.a)
    saved = [] if frozen else [o.tape.new((tokens,), INDEX_BYTES)]
    shape, size = x.shape, x.size

    def back(arrived: Sequence[Sized | None]) -> list[Sized | None]:
        if not frozen:
            narrow = o.tape.new((tokens, width), o.a)
            if o.low:
                narrow = o.tape.new((tokens, width), o.m)
            o.tape.new(own, o.m)
            del narrow
        return [arrived[0]]

    made = o.tape.record([x], shape, size, back, saved, trained=not frozen)
    del table
    return made


def added_row(o: Counts, name: str, x: Sized, entries: int) -> Sized:
    """Counts the addition of one row of a table to every token."""
    o.modules[name] = ModuleSpec("table", (entries, x.shape[-1]))
    own = o.parameter(f"{name}.weight", (entries, x.shape[-1]))

    def back(arrived: Sequence[Sized | None]) -> list[Sized | None]:
        o.tape.new(own, o.m)
        return [arrived[0]]

    return o.tape.record([x], x.shape, x.size, back, trained=True)


def prepended(o: Counts, name: str, x: Sized) -> Sized:
    """Counts one more token, a parameter, before the tokens of every row."""
    rows, tokens, width = x.shape
    o.modules[name] = ModuleSpec("row", (1, 1, width))
    o.parameter(f"{name}.weight", (1, 1, width))
    size = x.size
    o.tape.traffic += rows * width * size

    def back(arrived: Sequence[Sized | None]) -> list[Sized | None]:
        return [arrived[0]]

    return o.tape.record([x], (rows, tokens + 1, width), size, back, trained=True)


def patches(o: Counts, pixels: Sized, patch: tuple[int, int]) -> Sized:
    """Counts the copy that reorders the pixels of pictures into patches."""
    rows, channels, height, width = pixels.shape
    tokens = (height // patch[0]) * (width // patch[1])
    made = o.copied(pixels, (rows, tokens, channels * patch[0] * patch[1]))
    return o.cast_to(made, o.a) if o.low else made


def convolution(o: Counts, name: str, x: Sized, inputs: int, outputs: int, *, stride: int) -> Sized:
    """Counts 6 * tokens * inputs * outputs FLOPs, and twice that in the backward."""
    rows, _, before = x.shape
    tokens = before // stride
    o.modules[name] = ModuleSpec("convolution", (inputs, outputs, stride))
    shapes = [
        o.parameter(f"{name}.weight", (outputs, inputs, 3)),
        o.parameter(f"{name}.bias", (outputs,)),
    ]
    if o.low and x.size != o.a:
        x = o.cast_to(x, o.a)
    weights = [o.weight_cast(each, linear=False) for each in shapes]
    work = 2 * rows * tokens * inputs * outputs * 3
    o.flops += work
    shape, size, wanted = x.shape, x.size, x.source is not None

    def back(_: Sequence[Sized | None]) -> list[Sized | None]:
        o.flops += 2 * work if wanted else work
        arrived = o.tape.new(shape, size) if wanted else None
        return [arrived, *o.weight_gradients(shapes)]

    made = o.tape.record([x, *weights], (rows, outputs, tokens), o.a, back,
                            o.kept(x, weights[0]), trained=True)  # fmt: skip
    o.tape.traffic -= sum(each.bytes for each in weights)
    return made


def relative_bias(o: Counts, name: str, x: Sized, heads: int, buckets: int) -> Sized:
    """Counts a relative-position bias: one number for each head and pair of tokens, for any number
    of rows in the batch."""
    o.modules[name] = ModuleSpec("table", (buckets, heads))
    own = o.parameter(f"{name}.weight", (buckets, heads))
    tokens = x.shape[1]
    index = o.tape.new((tokens, tokens), INDEX_BYTES)
    shape = (1, heads, tokens, tokens)
    before = o.tape.traffic

    def back(_: Sequence[Sized | None]) -> list[Sized | None]:
        o.tape.new(own, o.m)
        return [None]

    made = o.tape.record([index], shape, o.m, back, [index], trained=True)
    made = o.cast_to(made, o.a) if o.low else made
    o.tape.traffic = before
    return made
