"""Counts the cost of a transformer's loss."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from meshwright.model.shard import Split, VocabularyLoss
from meshwright.model.transformer.counts import Counts
from meshwright.model.transformer.module_specs import ModuleSpec
from meshwright.model.transformer.tape import Sized


def loss(
    o: Counts, name: str, logits: Sized, targets: Sized, *, split: Split | None = None
) -> Sized:
    """Counts cross entropy, which saves the log-probabilities in full precision."""
    o.modules[name] = ModuleSpec("loss", split=split)
    if isinstance(split, VocabularyLoss):
        o.forward_all_reduce.extend([prod(targets.shape) * o.m] * 3)
    if isinstance(split, VocabularyLoss) and o.width > 1:
        return _divided_loss(o, logits, targets)
    x = o.cast_to(logits, o.m) if o.low else logits
    shape = x.shape

    def back(_: Sequence[Sized | None]) -> list[Sized | None]:
        return [o.tape.new(shape, o.m)]

    def back_to_logarithms(_: Sequence[Sized | None]) -> list[Sized | None]:
        return [o.tape.new(shape, o.m), None]

    logarithms = o.tape.record([x], shape, o.m, back)
    o.tape.keep(logarithms, [logarithms])
    weights = o.tape.new((), o.m)
    return o.tape.record([logarithms, targets], (), o.m, back_to_logarithms,
                            [logarithms, targets, weights])  # fmt: skip


def _divided_loss(o: Counts, logits: Sized, targets: Sized) -> Sized:
    """Counts cross entropy over a divided vocabulary, which saves the probabilities in full
    precision."""
    x = o.tape.new(logits.shape, o.m) if o.low else logits
    x = o.tape.new(logits.shape, o.m)
    shape, size = logits.shape, logits.size

    def back(_: Sequence[Sized | None]) -> list[Sized | None]:
        wide = o.tape.new(shape, o.m)
        return [o.tape.new(shape, size) if o.low else wide, None]

    made = o.tape.record([logits, targets], (), o.m, back)
    o.tape.keep(made, [x, targets])
    return made
