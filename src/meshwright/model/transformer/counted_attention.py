"""Counts the cost of attention in all its variants, as `model.zoo.attention` computes them."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from meshwright.model.transformer.counts import Counts
from meshwright.model.transformer.spec import AttentionKernel
from meshwright.model.transformer.tape import Sized, seen_as


def count_attention(
    o: Counts, q: Sized, k: Sized, v: Sized, *, window: int, cap: float | None, masked: bool,
    alibi: bool, bias: Sized | None, kernel: AttentionKernel,
) -> Sized:  # fmt: skip
    """Counts attention of queries, keys and values, each (rows, heads, tokens, head)."""
    tokens, reads = q.shape[2], k.shape[2]
    if window and window < tokens:
        return _windowed(o, q, k, v, window, cap, kernel)
    if cap is None and bias is None and not kernel.unfused:
        mask = None
        if alibi:
            mask = o.tape.new((1, q.shape[1], tokens, reads), o.a)
        if v.shape[3] == q.shape[3]:
            return fused(o, q, k, v, mask)
        wide = _padded(o, v, q.shape[3])
        return _narrowed(o, fused(o, q, k, wide, mask), v.shape[3])
    mask = o.tape.new((1, 1, tokens, reads), o.a) if masked else bias
    if alibi:
        mask = o.tape.new((1, q.shape[1], tokens, reads), o.a)
    if masked and bias is not None:
        hidden = o.tape.new((1, 1, tokens, reads), 1)
        o.tape.keep(bias, [hidden])
    made = unfused(o, q, k, v, mask, cap, dropout=kernel.dropout > 0)
    return o.copied(made, made.shape)


def fused(o: Counts, q: Sized, k: Sized, v: Sized, mask: Sized | None = None) -> Sized:
    """Counts a fused kernel: 2 * pairs * (head + value) FLOPs, with five products in the backward
    for two in the forward. It saves its inputs, its output and one number per query."""
    rows, heads, tokens, head = q.shape
    value = v.shape[3]
    pairs = rows * heads * tokens * k.shape[2]
    o.attention_flops += 2 * pairs * (head + value)
    shapes = [(each.shape, each.size) for each in (q, k, v)]

    def back(_: Sequence[Sized | None]) -> list[Sized | None]:
        o.attention_flops += 2 * pairs * (3 * head + 2 * value)
        return [o.tape.new(shape, size) for shape, size in shapes]

    made = o.tape.record([q, k, v], (rows, heads, tokens, value), q.size, back, [q, k, v])
    sums = o.tape.new((rows, heads, tokens), o.m)
    o.tape.traffic += sums.bytes
    o.tape.keep(made, [made, sums, *([mask] if mask else [])])
    return made


def _padded(o: Counts, x: Sized, width: int) -> Sized:
    """Counts the padding of values to the width of queries."""
    return o.tape.record([x], (*x.shape[:3], width), x.size, seen_as(x.shape))


def _narrowed(o: Counts, x: Sized, width: int) -> Sized:
    """Counts the copy of the first `width` features, which the next product reads."""
    shape, size = x.shape, x.size
    part = o.tape.views(x, [(*shape[:3], width)], lambda _: [o.tape.new(shape, size)])[0]
    return o.copied(part, part.shape)


def matmul(o: Counts, x: Sized, y: Sized, shape: tuple[int, ...], inner: int) -> Sized:
    """Counts a batch of matrix products, which save both factors."""
    work = 2 * prod(shape) * inner
    o.attention_flops += work
    o.unfused_flops += work
    shapes = [(each.shape, each.size) for each in (x, y)]

    def back(_: Sequence[Sized | None]) -> list[Sized | None]:
        o.attention_flops += 2 * work
        return [o.tape.new(each, size) for each, size in shapes]

    return o.tape.record([x, y], shape, o.a, back, [x, y])


def unfused(
    o: Counts, q: Sized, k: Sized, v: Sized, mask: Sized | None, cap: float | None, *,
    dropout: bool, in_order: str = "",
) -> Sized:  # fmt: skip
    """Counts attention with explicit scores. Saved are what the cap saves, the softmax in full
    precision, what the second product reads, and the mask of a dropout, one byte per score.
    Products copy what they read, unless its elements are in order in memory, as `in_order` says:
    "kv" for keys and values."""
    rows, heads, tokens, head = q.shape
    reads, value = k.shape[2], v.shape[3]
    if k.shape[1] < heads:
        k, v = (_spread(o, each, heads) for each in (k, v))
    elif "kv" not in in_order:
        k, v = (o.copied(each, each.shape) for each in (k, v))
    q = o.elementwise([q], [])
    if "q" not in in_order:
        q = o.copied(q, q.shape)
    x = matmul(o, q, k, (rows, heads, tokens, reads), head)
    if cap is not None:
        x = o.capped(x, cap)
    if mask is not None:
        x = o.elementwise([x], [])
    if o.low:
        x = o.cast_to(x, o.m)
    x = o.elementwise([x], [])
    o.tape.keep(x, [x])
    if o.low:
        x = o.cast_to(x, o.a)
    if dropout:
        x = _dropped(o, x)
    return matmul(o, x, v, (rows, heads, tokens, value), reads)


def _dropped(o: Counts, x: Sized) -> Sized:
    """Counts a dropout, which saves its mask."""
    made = o.elementwise([x], [])
    mask = o.tape.new(x.shape, 1)
    o.tape.traffic += mask.bytes
    o.tape.keep(made, [mask])
    return made


def _spread(o: Counts, x: Sized, heads: int) -> Sized:
    """Counts the repetition of each key-value head for all query heads that it serves."""
    rows, _, reads, head = x.shape
    made = o.copied(x, (rows, heads, reads, head))
    o.tape.traffic += made.bytes - x.bytes
    return made


def _windowed(
    o: Counts, q: Sized, k: Sized, v: Sized, window: int, cap: float | None, kernel: AttentionKernel
) -> Sized:
    """Counts attention in pieces of the window's length, each of which attends to itself and to the
    piece before it."""
    rows, heads, tokens, head = q.shape
    short = -tokens % window
    if short:
        q, k, v = (_lengthened(o, each, tokens + short) for each in (q, k, v))
    later = (tokens + short) // window - 1
    own_q, own_k, own_v = (_piece(o, each, window) for each in (q, k, v))
    own = o.copied(_piece(o, q, later * window), (rows * later, heads, window, head))
    keys, values = (
        _overlapping(o, each, (rows * later, each.shape[1], 2 * window, each.shape[3]))
        for each in (k, v)
    )
    mask = o.tape.new((1, 1, window, 2 * window), o.a)
    if cap is None and not kernel.unfused:
        one, rest = fused(o, own_q, own_k, own_v), fused(o, own, keys, values, mask)
    else:
        causal = o.tape.new((1, 1, window, window), o.a)
        drops = kernel.dropout > 0
        padded = "qkv" if short else ""
        one = unfused(o, own_q, own_k, own_v, causal, cap, dropout=drops, in_order=padded)
        rest = unfused(o, own, keys, values, mask, cap, dropout=drops, in_order="kv")
        rest = o.copied(rest, rest.shape)
    value = v.shape[3]
    rest = o.tape.views(rest, [(rows, heads, later * window, value)], list)[0]
    made = o.joined_along(one, rest, 2)
    if short:
        made = _piece(o, made, tokens)
        made = o.copied(made, made.shape)
    return made


def _lengthened(o: Counts, x: Sized, tokens: int) -> Sized:
    """Counts the padding of a sequence to a whole number of pieces."""
    rows, heads, _, head = x.shape
    return o.tape.record([x], (rows, heads, tokens, head), x.size, seen_as(x.shape))


def _piece(o: Counts, x: Sized, tokens: int) -> Sized:
    """Counts a view of some tokens, which costs nothing; its gradient is as large as x."""
    shape, size = x.shape, x.size
    return o.tape.views(x, [(*shape[:2], tokens, shape[3])], lambda _: [o.tape.new(shape, size)])[0]


def _overlapping(o: Counts, x: Sized, shape: tuple[int, ...]) -> Sized:
    made = o.copied(x, shape)
    o.tape.traffic += made.bytes - x.bytes
    return made
