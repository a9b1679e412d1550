"""Counts the FLOPs, the bytes moved and the bytes saved of all operations of transformers, without
torch.

Each operation counts what the module of `model.zoo.described` does, kernel by kernel, as
`model.meter` measures it: attention and RMS normalisation are fused, and nothing else is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meshwright.model.config import LanguageModel
from meshwright.model.shard import (
    Split,
    Vocabulary,
)
from meshwright.model.transformer import counted_loss, counted_stems
from meshwright.model.transformer.counted_attention import count_attention
from meshwright.model.transformer.counted_experts import count_experts
from meshwright.model.transformer.counts import Counts
from meshwright.model.transformer.module_specs import ModuleSpec
from meshwright.model.transformer.spec import FUSED, AttentionKernel, Norm, Rotary
from meshwright.model.transformer.tape import Backward, Sized


@dataclass(slots=True)
class Counted(Counts):
    """Implements `layer_operations.Operations`: it counts what rank 0 of `width` tensor-parallel
    ranks does."""

    def embedding(
        self, name: str, index: Sized, entries: int, width: int, *, split: Split | None = None
    ) -> Sized:
        """Counts a look-up: no FLOPs, and a gradient as large as the table."""
        self.modules[name] = ModuleSpec("table", (entries, width), split=split)
        own = self.parameter(f"{name}.weight", (entries, width), split)
        shape = (*index.shape, width)

        def back(_: Sequence[Sized | None]) -> list[Sized | None]:
            self.tape.new(own, self.m)
            return [None]

        made = self.tape.record([index], shape, self.m, back, [index], trained=True)
        if self.low:
            made = self.cast_to(made, self.a)
        if isinstance(split, Vocabulary):
            self.forward_all_reduce.append(made.bytes)
        return made

    def positions(self, name: str, x: Sized, entries: int, offset: int, *, frozen: bool) -> Sized:
        """Counts the addition of position embeddings."""
        return counted_stems.positions(self, name, x, entries, offset, frozen=frozen)

    def added_row(self, name: str, x: Sized, entries: int) -> Sized:
        """Counts the addition of one row of a table to every token."""
        return counted_stems.added_row(self, name, x, entries)

    def prepended(self, name: str, x: Sized) -> Sized:
        """Counts one more token before the tokens of every row."""
        return counted_stems.prepended(self, name, x)

    def norm(self, name: str, x: Sized, width: int, norm: Norm) -> Sized:
        """Counts a normalisation, which saves its input and two statistics of each vector (one for
        RMS)."""
        self.modules[name] = ModuleSpec("norm", (width,), norm=norm)
        gain = [self.tape.new((width,), self.m)] if norm.one_added and not self.low else []
        names = [n for n, there in (("weight", norm.weight), ("bias", norm.bias)) if there]
        own = [self.parameter(f"{name}.{each}", (width,)) for each in names]
        weights = [self.weight_cast(each, linear=False) for each in own]
        vectors = x.shape[:-1]
        shape, size = x.shape, x.size

        def back(_: Sequence[Sized | None]) -> list[Sized | None]:
            return [self.tape.new(shape, size), *self.weight_gradients(own)]

        made = self.tape.record([x, *weights], shape, size, back,
                                [*self.kept(x, *weights), *gain], trained=bool(own))  # fmt: skip
        if norm.kind == "rms":
            statistics = [self.tape.new(vectors, 4)]
        else:
            statistics = [self.tape.new((*vectors, 1), size) for _ in range(2)]
            self.tape.traffic += sum(each.bytes for each in statistics)
        self.tape.keep(made, statistics)
        return made

    def heads(self, x: Sized, head: int) -> Sized:
        """Counts nothing: features are divided into heads by a view, without a copy."""
        rows, tokens, features = x.shape
        return self.tape.views(x, [(rows, features // head, tokens, head)], _same)[0]

    def merged(self, x: Sized) -> Sized:
        """Counts nothing: attention gives its output in this order, so that a view is enough."""
        rows, heads, tokens, head = x.shape
        return self.tape.views(x, [(rows, tokens, heads * head)], _same)[0]

    def rotate(self, x: Sized, rotary: Rotary) -> Sized:
        """Counts four products, a sum and a difference of halves of the features, and their
        concatenation. The tables of cosines and sines are saved."""
        turned = rotary.features
        half = (*x.shape[:3], turned // 2)
        tables = [self.tape.new((x.shape[2], turned // 2), self.a) for _ in range(2)]
        shape, size = x.shape, x.size
        new = self.tape.new
        products = [new(half, size) for _ in range(6)]
        self.tape.traffic += 14 * products[0].bytes

        def back(_: Sequence[Sized | None]) -> list[Sized | None]:
            halves = [new(half, size) for _ in range(4)]
            del halves
            return [new(shape, size)]

        made = self.tape.record([x], shape, size, back, tables)
        del products
        return made

    def attention(
        self, q: Sized, k: Sized, v: Sized, *, causal: bool, window: int = 0,
        scale: float | None = None, cap: float | None = None, alibi: int = 0,
        bias: Sized | None = None, kernel: AttentionKernel = FUSED,
    ) -> Sized:  # fmt: skip
        """Counts one fused kernel, or explicit products if these are chosen, or the variant has no
        such kernel."""
        return count_attention(
            self, q, k, v, window=window, cap=cap, masked=causal, alibi=alibi > 0,
            bias=bias, kernel=kernel,
        )  # fmt: skip

    def experts(self, name: str, x: Sized, c: LanguageModel) -> Sized:
        """Counts a mixture of experts, in which each token goes through its chosen experts."""
        return count_experts(self, name, x, c)

    def joined(self, x: Sized, y: Sized) -> Sized:
        """Counts a concatenation of the last dimension."""
        return self.joined_along(x, y, 3)

    def common_head(self, x: Sized, like: Sized) -> Sized:
        """Counts a copy of the common head to every head; the gradient is summed over the heads."""
        wide = self.tape.views(x, [(*like.shape[:3], x.shape[3])], self._summed(x))[0]
        return self.joined_along(like, wide, 3)

    def _summed(self, x: Sized) -> Backward:
        shape, size = x.shape, x.size
        return lambda _: [self.tape.new(shape, size)]

    def gated(self, gate: Sized, x: Sized) -> Sized:
        """Counts a sigmoid, whose output is saved, and its product with x."""
        share = self.elementwise([gate], [])
        self.tape.keep(share, [share])
        return self.elementwise([x, share], [x, share])

    def added(self, x: Sized, y: Sized) -> Sized:
        """Counts a sum, which saves nothing; both inputs share one gradient."""

        def back(arrived: Sequence[Sized | None]) -> list[Sized | None]:
            return [arrived[0], arrived[0]]

        return self.tape.record([x, y], x.shape, x.size, back)

    def clamped(self, x: Sized, limit: float) -> Sized:
        """Counts an elementwise operation that saves its input."""
        return self.elementwise([x], [x])

    def patches(self, pixels: Sized, patch: tuple[int, int]) -> Sized:
        """Counts the copy that reorders the pixels of pictures into patches."""
        return counted_stems.patches(self, pixels, patch)

    def convolution(self, name: str, x: Sized, inputs: int, outputs: int, *, stride: int) -> Sized:
        """Counts 6 * tokens * inputs * outputs FLOPs, and twice that in the backward."""
        return counted_stems.convolution(self, name, x, inputs, outputs, stride=stride)

    def turned(self, x: Sized) -> Sized:
        """Counts nothing: a transposition is a view, without a copy."""
        rows, features, tokens = x.shape
        return self.tape.views(x, [(rows, tokens, features)], _same)[0]

    def first_token(self, x: Sized) -> Sized:
        """Counts a view, which costs nothing; its gradient is as large as x."""
        shape, size = x.shape, x.size
        return self.tape.views(x, [(shape[0], shape[2])], lambda _: [self.tape.new(shape, size)])[0]

    def relative_bias(
        self, name: str, x: Sized, heads: int, buckets: int, reach: int, *, both_ways: bool
    ) -> Sized:
        """Counts a relative-position bias: one number for each head and pair of tokens."""
        return counted_stems.relative_bias(self, name, x, heads, buckets)

    def loss(
        self, name: str, logits: Sized, targets: Sized, *, split: Split | None = None
    ) -> Sized:
        """Counts cross entropy, which saves the log-probabilities in full precision."""
        return counted_loss.loss(self, name, logits, targets, split=split)


def _same(arrived: Sequence[Sized | None]) -> Sequence[Sized | None]:
    return list(arrived)
