"""Declares the abstract operations in which `forward` describes the layers of transformers.

There are two implementations: `counted.Counted` counts the cost of each operation, without torch,
and `model.zoo.described.TorchOperations` computes it. Values have the shape (rows, tokens,
features) unless a docstring says otherwise. A `name` is that of the submodule with the operation's
parameters, such as `attention.out`. Sizes that are passed are those of the undivided model; under
tensor parallelism, the shapes of values show what a rank holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from meshwright.model.config import LanguageModel
from meshwright.model.shard import Split
from meshwright.model.transformer.spec import (
    FUSED,
    Activation,
    AttentionKernel,
    Norm,
    Rotary,
)

Value = Any
"""A torch tensor, or an abstract tensor of the counter."""


class Operations(Protocol):
    """Declares the operations that the forward of a layer may call."""

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
        """Computes x W^T, plus a bias if asked for."""

    def embedding(
        self, name: str, index: Value, entries: int, width: int, *, split: Split | None = None
    ) -> Value:
        """Looks up rows of a table by index: (rows, tokens) to (rows, tokens, width)."""

    def positions(self, name: str, x: Value, entries: int, offset: int, *, frozen: bool) -> Value:
        """Adds rows of a position table to x, from row `offset` on. A frozen table consists of
        sines and cosines and is not trained."""

    def added_row(self, name: str, x: Value, entries: int) -> Value:
        """Adds the first row of a segment table to every token: all are of the first segment."""

    def prepended(self, name: str, x: Value) -> Value:
        """Puts one more token, which is a parameter, before the others."""

    def norm(self, name: str, x: Value, width: int, norm: Norm) -> Value:
        """Normalises the last dimension."""

    def parts(self, x: Value, sizes: Sequence[int]) -> list[Value]:
        """Cuts the last dimension in the proportions of `sizes`."""

    def heads(self, x: Value, head: int) -> Value:
        """Reshapes (rows, tokens, heads * head) to (rows, heads, tokens, head)."""

    def merged(self, x: Value) -> Value:
        """Reshapes (rows, heads, tokens, head) to (rows, tokens, heads * head)."""

    def rotate(self, x: Value, rotary: Rotary) -> Value:
        """Applies rotary position embedding to (rows, heads, tokens, head)."""

    def common_head(self, x: Value, like: Value) -> Value:
        """Appends the one head of x to each head of `like`: (rows, 1, tokens, a) and (rows, heads,
        tokens, b) to (rows, heads, tokens, b + a)."""

    def joined(self, x: Value, y: Value) -> Value:
        """Concatenates two values along the last dimension."""

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
        kernel: AttentionKernel = FUSED,
    ) -> Value:
        """Computes scaled dot-product attention of values from `heads`. `alibi` is the number of
        heads of the undivided layer with ALiBi slopes (0: none); `bias` is added to the scores."""

    def relative_bias(
        self, name: str, x: Value, heads: int, buckets: int, reach: int, *, both_ways: bool
    ) -> Value:
        """Gives T5's learned bias for each head and distance, as (1, heads, tokens, tokens)."""

    def activate(self, kind: Activation, x: Value) -> Value:
        """Applies an activation to each element."""

    def product(self, x: Value, y: Value) -> Value:
        """Multiplies x and y element by element."""

    def added(self, x: Value, y: Value) -> Value:
        """Adds x and y element by element."""

    def scaled(self, x: Value, factor: float) -> Value:
        """Multiplies x by a constant."""

    def clamped(self, x: Value, limit: float) -> Value:
        """Clamps each element to the range from -limit to limit."""

    def capped(self, x: Value, cap: float) -> Value:
        """Computes cap * tanh(x / cap)."""

    def gated(self, gate: Value, x: Value) -> Value:
        """Computes sigmoid(gate) * x, where `gate` has one feature per token."""

    def experts(self, name: str, x: Value, c: LanguageModel) -> Value:
        """Applies a mixture of experts, without its shared expert."""

    def patches(self, pixels: Value, patch: tuple[int, int]) -> Value:
        """Cuts pictures (rows, channels, height, width) into patches: (rows, patches, channels *
        patch height * patch width)."""

    def convolution(self, name: str, x: Value, inputs: int, outputs: int, *, stride: int) -> Value:
        """Convolves three neighbouring tokens, with bias: (rows, inputs, tokens) to (rows, outputs,
        tokens / stride)."""

    def turned(self, x: Value) -> Value:
        """Transposes (rows, features, tokens) to (rows, tokens, features)."""

    def first_token(self, x: Value) -> Value:
        """Takes the first token: (rows, tokens, features) to (rows, features)."""

    def loss(
        self, name: str, logits: Value, targets: Value, *, split: Split | None = None
    ) -> Value:
        """Computes the mean cross entropy of logits and target indices."""
