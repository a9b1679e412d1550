"""Counts the cost of a mixture of experts, as `model.zoo.experts` computes it."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from meshwright.model.config import LanguageModel
from meshwright.model.shard import Column, Row, Split
from meshwright.model.transformer.counts import Counts
from meshwright.model.transformer.defaults import architecture_of
from meshwright.model.transformer.module_specs import INDEX_BYTES, ModuleSpec
from meshwright.model.transformer.tape import Sized, seen_as


def count_experts(o: Counts, name: str, x: Sized, c: LanguageModel) -> Sized:
    """Counts a mixture of experts: tokens are sorted by expert, go through their experts, and are
    put back in order."""
    rows, sequence, width = x.shape
    tokens = rows * sequence
    hidden = c.hidden
    new, k = o.tape.new, c.chosen
    flat = o.tape.views(x, [(tokens, width)], seen_as(x.shape))[0]
    logits = o.linear(f"{name}.router", flat, width, c.experts)
    share = _shares(o, logits, c)
    order, counts = _sorted(o, tokens, c)
    picked = _picked(o, flat, order)
    gate_up = _grouped(o, f"{name}.gate_up", picked, c.experts, width, 2 * hidden,
                       Column(parts=(hidden, hidden)), counts)  # fmt: skip
    own = gate_up.shape[-1] // 2
    gate, up = o.parts(gate_up, (own, own))
    inner = o.product(o.activate(architecture_of(c).activation, gate), up)
    y = _grouped(o, f"{name}.down", inner, c.experts, hidden, width, Row(), counts)
    back = new((tokens * k,), INDEX_BYTES)
    o.tape.traffic += 2 * back.bytes
    again = _picked(o, y, back)
    again = o.tape.views(again, [(tokens, k, width)], seen_as(y.shape))[0]
    if o.low:
        share = o.cast_to(share, o.a)
    weighted = _weighted(o, again, share)
    summed = o.tape.record([weighted], (tokens, width), o.a, seen_as(weighted.shape))
    whole = o.tape.views(summed, [x.shape], seen_as((tokens, width)))[0]
    # The router is a submodule of the experts' module, not one of its own.
    del o.modules[f"{name}.router"]
    o.modules[name] = ModuleSpec("experts", model=c)
    o.splits[f"{name}.gate_up"] = Column(parts=(hidden, hidden))
    o.splits[f"{name}.down"] = Row()
    return whole


def _weighted(o: Counts, x: Sized, share: Sized) -> Sized:
    """Counts the product of expert outputs and their weights. The gradient of the weights is a sum
    over a temporary as large as x."""
    shape, narrow, size = x.shape, share.shape, x.size

    def back(_: Sequence[Sized | None]) -> list[Sized | None]:
        before, product = o.tape.new(shape, size), o.tape.new(shape, size)
        summed = o.tape.new(narrow, size)
        del product
        return [before, summed]

    return o.tape.record([x, share], shape, size, back, [x, share])


def _shares(o: Counts, logits: Sized, c: LanguageModel) -> Sized:
    mixture = architecture_of(c).mixture
    assert mixture is not None
    tokens, k = logits.shape[0], c.chosen
    expert = o.tape.new((tokens, k), INDEX_BYTES)
    if mixture.score == "softmax" and mixture.normalised and mixture.groups == 1:
        shape, size = logits.shape, logits.size
        best = o.tape.record(
            [logits], (tokens, k), o.a, lambda _: [o.tape.new(shape, size)], [expert]
        )
        o.tape.traffic += expert.bytes
        if o.low:
            best = o.cast_to(best, o.m)
        share = o.elementwise([best], [])
        o.tape.keep(share, [share])
    else:
        if o.low:
            logits = o.cast_to(logits, o.m)
        scores = o.elementwise([logits], [])
        o.tape.keep(scores, [scores])
        o.tape.traffic += scores.bytes + tokens * k * (o.m + INDEX_BYTES)
        if mixture.balanced:
            o.constants += c.experts
            o.tape.traffic += 2 * scores.bytes
        if mixture.groups > 1:
            o.tape.traffic += 4 * scores.bytes
        shape, size = scores.shape, scores.size
        share = o.tape.record(
            [scores], (tokens, k), o.m, lambda _: [o.tape.new(shape, size)], [expert]
        )
        o.tape.traffic += expert.bytes
        if mixture.normalised:
            total = o.tape.new((tokens, 1), o.m)
            o.tape.traffic += share.bytes + 3 * total.bytes
            share = o.elementwise([share], [share, total])
            o.tape.traffic += total.bytes
    return share if mixture.scale == 1.0 else o.elementwise([share], [])


def _sorted(o: Counts, tokens: int, c: LanguageModel) -> tuple[Sized, Sized]:
    """Counts the sorting of tokens by expert and the counting of the tokens of each expert."""
    k = c.chosen
    order = o.tape.new((tokens * k,), INDEX_BYTES)
    counts = o.tape.new((c.experts,), INDEX_BYTES)
    o.tape.traffic += tokens * k * (8 * INDEX_BYTES + 2 * c.experts)
    return order, counts


def _picked(o: Counts, x: Sized, index: Sized) -> Sized:
    """Counts the selection of rows of x by index."""
    shape, size = x.shape, x.size
    made = o.tape.record(
        [x], (index.shape[0], shape[-1]), size, lambda _: [o.tape.new(shape, size)], [index]
    )
    o.tape.traffic += index.bytes
    return made


def _grouped(
    o: Counts, name: str, x: Sized, experts: int, inputs: int, outputs: int, split: Split,
    counts: Sized,
) -> Sized:  # fmt: skip
    """Counts the product of each row with its expert's weight; weights are cast expert by
    expert."""
    own = o.parameter(f"{name}.weight", (experts, outputs, inputs), split)
    work = 2 * prod(x.shape[:-1]) * own[1] * own[2]
    o.flops += work
    shape, size = x.shape, x.size
    if isinstance(split, Column):
        o.backward_all_reduce.append(x.bytes)

    def back(_: Sequence[Sized | None]) -> list[Sized | None]:
        o.flops += 2 * work
        before = o.tape.new(shape, size)
        gradient = o.tape.new(own, o.a)
        return [before, gradient] if o.low else [before]

    weights = [o.tape.uncast(own, o.m)] if o.low else []
    made = o.tape.record([x, *weights], (*shape[:-1], own[1]), o.a, back, [x, counts],
                         trained=True)  # fmt: skip
    o.tape.traffic -= sum(each.bytes for each in weights)
    if isinstance(split, Row):
        o.forward_all_reduce.append(made.bytes)
    return made
