"""What the ends of transformers cost: positions, segments, patches, convolutions."""

from __future__ import annotations

from collections.abc import Sequence

from meshwright.model.transformer.counts import Counts
from meshwright.model.transformer.made import INDEX, Made
from meshwright.model.transformer.tape import Sized


def positions(o: Counts, name: str, x: Sized, entries: int, offset: int, *, frozen: bool) -> Sized:
    """As many rows as there are tokens, whatever the rows of the batch."""
    tokens, width = x.shape[1], x.shape[2]
    o.modules[name] = Made("sines" if frozen else "table", (entries + offset, width))
    own = o.parameter(f"{name}.weight", (entries + offset, width), trained=not frozen)
    table = o.tape.new((tokens, width), o.m)
    if o.low:
        table = o.tape.new((tokens, width), o.a)
    saved = [] if frozen else [o.tape.new((tokens,), INDEX)]
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
    """One row, whatever the rows of the batch."""
    o.modules[name] = Made("table", (entries, x.shape[-1]))
    own = o.parameter(f"{name}.weight", (entries, x.shape[-1]))

    def back(arrived: Sequence[Sized | None]) -> list[Sized | None]:
        o.tape.new(own, o.m)
        return [arrived[0]]

    return o.tape.record([x], x.shape, x.size, back, trained=True)


def prepended(o: Counts, name: str, x: Sized) -> Sized:
    """One token more in every row."""
    rows, tokens, width = x.shape
    o.modules[name] = Made("row", (1, 1, width))
    o.parameter(f"{name}.weight", (1, 1, width))
    size = x.size
    o.tape.traffic += rows * width * size

    def back(arrived: Sequence[Sized | None]) -> list[Sized | None]:
        return [arrived[0]]

    return o.tape.record([x], (rows, tokens + 1, width), size, back, trained=True)


def patches(o: Counts, pixels: Sized, patch: tuple[int, int]) -> Sized:
    """Copied into another order."""
    rows, channels, height, width = pixels.shape
    tokens = (height // patch[0]) * (width // patch[1])
    made = o.copied(pixels, (rows, tokens, channels * patch[0] * patch[1]))
    return o.cast_to(made, o.a) if o.low else made


def convolution(o: Counts, name: str, x: Sized, inputs: int, outputs: int, *, stride: int) -> Sized:
    """6 tokens inputs outputs FLOPs."""
    rows, _, before = x.shape
    tokens = before // stride
    o.modules[name] = Made("convolution", (inputs, outputs, stride))
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
    """One number for each head and pair of tokens, whatever the rows of the batch."""
    o.modules[name] = Made("table", (buckets, heads))
    own = o.parameter(f"{name}.weight", (buckets, heads))
    tokens = x.shape[1]
    index = o.tape.new((tokens, tokens), INDEX)
    shape = (1, heads, tokens, tokens)
    before = o.tape.traffic

    def back(_: Sequence[Sized | None]) -> list[Sized | None]:
        o.tape.new(own, o.m)
        return [None]

    made = o.tape.record([index], shape, o.m, back, [index], trained=True)
    made = o.cast_to(made, o.a) if o.low else made
    o.tape.traffic = before
    return made
