"""The operations that transformers are made of: what `forward` calls, and two rooms carry out.

`counted.Counted` notes what each costs, without torch; `model.zoo.described` computes it. Values
have a `shape` of (rows, tokens, features) unless a docstring says otherwise. Names are those of the
parameters' modules inside a layer, `attention.out`. Sizes that are passed are of the whole model;
where tensor ranks divide a layer, what a rank holds is seen from the shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from meshwright.model.config import LanguageModel
from meshwright.model.shard import Split
from meshwright.model.transformer.spec import Activation, Norm, Rotary

Value = Any
"""A tensor, or what stands for one."""


class Operations(Protocol):
    """What a layer's forward is written in."""

    def linear(
        self,
        name: str,
        x: Value,
        inputs: int,
        outputs: int,
        *,
        bias: bool = False,
        split: Split | None = None,
    ) -> Value:
        """x W^T, and a bias."""

    def embedding(
        self, name: str, index: Value, entries: int, width: int, *, split: Split | None = None
    ) -> Value:
        """Rows of a table."""

    def positions(self, name: str, x: Value, entries: int, offset: int, *, frozen: bool) -> Value:
        """Rows of a table of positions added to x, from row `offset` on; a frozen one is made of
        sines and not trained."""

    def added_row(self, name: str, x: Value, entries: int) -> Value:
        """The first row of a table added to every token: all tokens are of one segment."""

    def prepended(self, name: str, x: Value) -> Value:
        """One more token, which is a parameter, before the others."""

    def norm(self, name: str, x: Value, width: int, norm: Norm) -> Value:
        """The last dimension normalised."""

    def parts(self, x: Value, sizes: Sequence[int]) -> list[Value]:
        """The last dimension cut in the proportions of `sizes`."""

    def heads(self, x: Value, head: int) -> Value:
        """(rows, tokens, heads * head) as (rows, heads, tokens, head)."""

    def merged(self, x: Value) -> Value:
        """The inverse of `heads`."""

    def rotate(self, x: Value, rotary: Rotary) -> Value:
        """Positions turned into the features of (rows, heads, tokens, head)."""

    def common_head(self, x: Value, like: Value) -> Value:
        """One head beside each of the heads of `like`: (rows, 1, tokens, a) and (rows, heads,
        tokens, b) to (rows, heads, tokens, b + a)."""

    def joined(self, x: Value, y: Value) -> Value:
        """Two values one behind the other in the last dimension."""

    def attention(
        self,
        q: Value,
        k: Value,
        v: Value,
        *,
        causal: bool,
        window: int = 0,
        scale: float | None = None,
        cap: float | None = None,
        alibi: int = 0,
        bias: Value = None,
    ) -> Value:
        """Scaled dot-product attention of values from `heads`; `alibi` is the number of heads of
        the whole layer where scores fall with the distance, `bias` is added to scores."""

    def relative_bias(
        self, name: str, x: Value, heads: int, buckets: int, reach: int, *, both_ways: bool
    ) -> Value:
        """A learned bias for each head and distance (T5): (1, heads, tokens, tokens)."""

    def activate(self, kind: Activation, x: Value) -> Value:
        """An activation, element by element."""

    def product(self, x: Value, y: Value) -> Value:
        """x times y, element by element."""

    def added(self, x: Value, y: Value) -> Value:
        """x plus y."""

    def scaled(self, x: Value, factor: float) -> Value:
        """x times a constant."""

    def clamped(self, x: Value, limit: float) -> Value:
        """x within plus or minus `limit`."""

    def capped(self, x: Value, cap: float) -> Value:
        """cap * tanh(x / cap)."""

    def gated(self, gate: Value, x: Value) -> Value:
        """sigmoid(gate) x, the gate having one feature."""

    def experts(self, name: str, x: Value, c: LanguageModel) -> Value:
        """A mixture of experts without its shared one."""

    def patches(self, pixels: Value, patch: tuple[int, int]) -> Value:
        """Pictures (rows, channels, height, width) as tokens of channels * patch features."""

    def convolution(self, name: str, x: Value, inputs: int, outputs: int, *, stride: int) -> Value:
        """Along tokens, over three neighbours, with bias."""

    def turned(self, x: Value) -> Value:
        """(rows, features, tokens) as (rows, tokens, features)."""

    def first_token(self, x: Value) -> Value:
        """(rows, tokens, features) to (rows, features)."""

    def loss(
        self, name: str, logits: Value, targets: Value, *, split: Split | None = None
    ) -> Value:
        """Mean cross entropy."""
