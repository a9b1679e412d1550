"""The operations of transformers as counts: FLOPs, bytes moved, bytes kept; no torch.

Each one notes what the module of `model.zoo.described` does, kernel by kernel, as `model.meter`
reads it off a run: attention and RMS normalisation are fused, all else is not. a is the bytes of
an activation, m of a weight and of what is computed in full precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Literal

from meshwright.model.config import LanguageModel
from meshwright.model.shard import (
    Column,
    Row,
    Split,
    Vocabulary,
    VocabularyHead,
    VocabularyLoss,
    held,
)
from meshwright.model.transformer.counted_attention import attend
from meshwright.model.transformer.counted_experts import routed
from meshwright.model.transformer.spec import Activation, Norm, Rotary
from meshwright.model.transformer.tape import NOWHERE, Backward, Sized, Tape

INDEX = 8
"""Bytes of a token index."""


@dataclass(slots=True)
class Parameter:
    """One parameter that a layer has."""

    name: str
    shape: tuple[int, ...]
    split: Split | None = None
    linear: bool = False
    """Cast once a step in low precision."""
    trained: bool = True


@dataclass(slots=True)
class Made:
    """A module that a layer needs."""

    kind: Literal["linear", "table", "row", "norm", "experts", "convolution", "loss"]
    sizes: tuple[int, ...] = ()
    bias: bool = False
    split: Split | None = None
    norm: Norm | None = None
    model: LanguageModel | None = None


@dataclass(slots=True)
class Counted:
    """What one tensor rank of `width` does for a layer."""

    a: int
    m: int
    width: int = 1
    tape: Tape = field(default_factory=Tape)
    parameters: list[Parameter] = field(default_factory=list)
    modules: dict[str, Made] = field(default_factory=dict)
    splits: dict[str, Split] = field(default_factory=dict)
    """How modules inside a module of `modules` are divided."""
    flops: int = 0
    attention_flops: int = 0
    forward_all_reduce: list[int] = field(default_factory=list)
    backward_all_reduce: list[int] = field(default_factory=list)

    @property
    def low(self) -> bool:
        """Whether weights are cast to be read."""
        return self.a != self.m

    def _parameter(
        self, name: str, shape: tuple[int, ...], split: Split | None = None, *,
        linear: bool = False, trained: bool = True,
    ) -> tuple[int, ...]:  # fmt: skip
        """Note a parameter; the shape of what this rank holds of it."""
        self.parameters.append(Parameter(name, shape, split, linear=linear, trained=trained))
        ranges = None
        if split is not None and self.width > 1:
            ranges = held(split, name.rpartition(".")[2], shape, self.width, 0)
        if ranges is None:
            return shape
        own = list(shape)
        own[ranges.dim] = sum(last - first for first, last in ranges.ranges)
        return tuple(own)

    def _cast(self, shape: tuple[int, ...], *, linear: bool) -> Sized:
        """A weight as it is read: itself, or a cast."""
        if not self.low:
            return Sized(shape, self.m, NOWHERE)
        made = self.tape.cast(shape, self.a, self.m)
        if linear:
            self.tape.casts.add(made.storage.number)
        return made

    def _kept(self, *values: Sized) -> list[Sized]:
        """Those that are no weights themselves."""
        return [each for each in values if each.storage is not NOWHERE]

    def _weight_gradients(self, shapes: Sequence[tuple[int, ...]]) -> list[Sized | None]:
        """As the weights were read: those of casts are handed on, others added to what there is."""
        made = [self.tape.new(shape, self.a) for shape in shapes]
        return list(made) if self.low else [None] * len(shapes)

    def elementwise(
        self, inputs: Sequence[Sized], saved: Sequence[Sized], kernels: int = 1
    ) -> Sized:
        """An output like the first input; in the backward one of each input's size."""
        x = inputs[0]
        new = self.tape.new

        def back(_: Sequence[Sized | None]) -> list[Sized | None]:
            for _ in range(kernels - 1):
                new(x_shape, x_size)
            return [new(shape, size) for shape, size in shapes]

        x_shape, x_size = x.shape, x.size
        shapes = [(each.shape, each.size) for each in inputs]
        return self.tape.record(inputs, x_shape, x_size, back, saved)

    def linear(
        self, name: str, x: Sized, inputs: int, outputs: int, *, bias: bool = False,
        split: Split | None = None,
    ) -> Sized:  # fmt: skip
        """2 tokens inputs outputs FLOPs, and twice that back."""
        self.modules[name] = Made("linear", (inputs, outputs), bias, split)
        own = self._parameter(f"{name}.weight", (outputs, inputs), split, linear=True)
        shapes = [own]
        if bias:
            shapes.append(self._parameter(f"{name}.bias", (outputs,), split, linear=True))
        weights = [self._cast(each, linear=True) for each in shapes]
        work = 2 * prod(x.shape[:-1]) * own[0] * own[1]
        self.flops += work
        shape, size = x.shape, x.size
        wanted = x.source is not None
        if isinstance(split, Column | VocabularyHead):
            self.backward_all_reduce.append(x.bytes)

        def back(_: Sequence[Sized | None]) -> list[Sized | None]:
            self.flops += 2 * work if wanted else work
            before = self.tape.new(shape, size) if wanted else None
            return [before, *self._weight_gradients(shapes)]

        made = self.tape.record([x, *weights], (*shape[:-1], own[0]), self.a, back,
                                self._kept(x, weights[0]), trained=True)  # fmt: skip
        self.tape.traffic -= sum(each.bytes for each in weights)
        if isinstance(split, Row):
            self.forward_all_reduce.append(made.bytes)
        return made

    def embedding(
        self, name: str, index: Sized, entries: int, width: int, *, split: Split | None = None
    ) -> Sized:
        """No FLOPs; the table's gradient is as large as the table."""
        self.modules[name] = Made("table", (entries, width), split=split)
        own = self._parameter(f"{name}.weight", (entries, width), split)
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

    def cast_to(self, x: Sized, size: int) -> Sized:
        """A cast."""
        shape, before = x.shape, x.size

        def back(_: Sequence[Sized | None]) -> list[Sized | None]:
            return [self.tape.new(shape, before)]

        return self.tape.record([x], shape, size, back)

    def positions(self, name: str, x: Sized, entries: int, offset: int, *, frozen: bool) -> Sized:
        """As many rows as there are tokens, whatever the rows of the batch."""
        tokens, width = x.shape[1], x.shape[2]
        self.modules[name] = Made("table", (entries + offset, width))
        own = self._parameter(f"{name}.weight", (entries + offset, width), trained=not frozen)
        table = self.tape.new((tokens, width), self.m)
        if self.low:
            table = self.tape.new((tokens, width), self.a)
        saved = [self.tape.new((tokens,), INDEX)]
        shape, size = x.shape, x.size

        def back(arrived: Sequence[Sized | None]) -> list[Sized | None]:
            if not frozen:
                narrow = self.tape.new((tokens, width), self.a)
                if self.low:
                    narrow = self.tape.new((tokens, width), self.m)
                self.tape.new(own, self.m)
                del narrow
            return [arrived[0]]

        made = self.tape.record([x], shape, size, back, saved, trained=not frozen)
        del table
        return made

    def added_row(self, name: str, x: Sized, entries: int) -> Sized:
        """One row, whatever the rows of the batch."""
        self.modules[name] = Made("table", (entries, x.shape[-1]))
        own = self._parameter(f"{name}.weight", (entries, x.shape[-1]))

        def back(arrived: Sequence[Sized | None]) -> list[Sized | None]:
            self.tape.new(own, self.m)
            return [arrived[0]]

        return self.tape.record([x], x.shape, x.size, back, trained=True)

    def prepended(self, name: str, x: Sized) -> Sized:
        """One token more in every row."""
        rows, tokens, width = x.shape
        self.modules[name] = Made("row", (1, 1, width))
        self._parameter(f"{name}.weight", (1, 1, width))
        size = x.size
        self.tape.traffic += rows * width * size

        def back(arrived: Sequence[Sized | None]) -> list[Sized | None]:
            return [arrived[0]]

        return self.tape.record([x], (rows, tokens + 1, width), size, back, trained=True)

    def norm(self, name: str, x: Sized, width: int, norm: Norm) -> Sized:
        """A layer normalisation keeps mean and deviation of each vector, the other one number."""
        self.modules[name] = Made("norm", (width,), norm=norm)
        gain = [self.tape.new((width,), self.m)] if norm.one_added and not self.low else []
        names = [n for n, there in (("weight", norm.weight), ("bias", norm.bias)) if there]
        own = [self._parameter(f"{name}.{each}", (width,)) for each in names]
        weights = [self._cast(each, linear=False) for each in own]
        vectors = x.shape[:-1]
        shape, size = x.shape, x.size

        def back(_: Sequence[Sized | None]) -> list[Sized | None]:
            return [self.tape.new(shape, size), *self._weight_gradients(own)]

        made = self.tape.record([x, *weights], shape, size, back,
                                [*self._kept(x, *weights), *gain], trained=bool(own))  # fmt: skip
        if norm.kind == "rms":
            statistics = [self.tape.new(vectors, 4)]
        else:
            statistics = [self.tape.new((*vectors, 1), size) for _ in range(2)]
            self.tape.traffic += sum(each.bytes for each in statistics)
        self.tape.keep(made, statistics)
        return made

    def parts(self, x: Sized, sizes: Sequence[int]) -> list[Sized]:
        """Views; their gradients are put together into one."""
        own = [x.shape[-1] * size // sum(sizes) for size in sizes]
        shape, size = x.shape, x.size

        def back(_: Sequence[Sized | None]) -> list[Sized | None]:
            return [self.tape.new(shape, size)]

        return self.tape.views(x, [(*shape[:-1], each) for each in own], back)

    def heads(self, x: Sized, head: int) -> Sized:
        """A view."""
        rows, tokens, features = x.shape
        return self.tape.views(x, [(rows, features // head, tokens, head)], _same)[0]

    def merged(self, x: Sized) -> Sized:
        """A view: attention gives its output in this order."""
        rows, heads, tokens, head = x.shape
        return self.tape.views(x, [(rows, tokens, heads * head)], _same)[0]

    def rotate(self, x: Sized, rotary: Rotary) -> Sized:
        """Four products, a sum and a difference of halves, put together; tables are kept."""
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
        bias: Sized | None = None,
    ) -> Sized:  # fmt: skip
        """By one kernel, or by products where no kernel has what is asked for."""
        return attend(self, q, k, v, window=window, cap=cap, masked=causal, alibi=alibi > 0,
                      bias=bias)  # fmt: skip

    def experts(self, name: str, x: Sized, c: LanguageModel) -> Sized:
        """Only those that tokens go to are computed."""
        return routed(self, name, x, c)

    def joined(self, x: Sized, y: Sized) -> Sized:
        """Copies; the gradient's parts are views."""
        return self._joined(x, y, x.shape, y.shape)

    def common_head(self, x: Sized, like: Sized) -> Sized:
        """Copied beside each head; its gradients are summed."""
        wide = self.tape.views(x, [(*like.shape[:3], x.shape[3])], self._summed(x))[0]
        return self._joined(like, wide, like.shape, wide.shape)

    def _summed(self, x: Sized) -> Backward:
        shape, size = x.shape, x.size
        return lambda _: [self.tape.new(shape, size)]

    def _joined(self, x: Sized, y: Sized, left: tuple[int, ...], right: tuple[int, ...]) -> Sized:
        size = x.size

        def back(arrived: Sequence[Sized | None]) -> list[Sized | None]:
            whole = arrived[0]
            assert whole is not None
            return [Sized(shape, size, whole.storage) for shape in (left, right)]

        return self.tape.record([x, y], (*left[:3], left[3] + right[3]), size, back)

    def joined_tokens(self, x: Sized, y: Sized) -> Sized:
        """Two values one behind the other in their tokens."""
        size, left, right = x.size, x.shape, y.shape

        def back(arrived: Sequence[Sized | None]) -> list[Sized | None]:
            whole = arrived[0]
            assert whole is not None
            return [Sized(shape, size, whole.storage) for shape in (left, right)]

        shape = (*left[:2], left[2] + right[2], left[3])
        return self.tape.record([x, y], shape, size, back)

    def copied(self, x: Sized, shape: tuple[int, ...]) -> Sized:
        """Another layout of the same numbers."""
        before, size = x.shape, x.size
        return self.tape.record([x], shape, size, lambda _: [self.tape.new(before, size)])

    def gated(self, gate: Sized, x: Sized) -> Sized:
        """A sigmoid, which is kept, times x."""
        share = self.elementwise([gate], [])
        self.tape.keep(share, [share])
        return self.elementwise([x, share], [x, share])

    def activate(self, kind: Activation, x: Sized) -> Sized:
        """Keeps its input (ReLU its output)."""
        made = self.elementwise([x], [] if kind == "relu" else [x])
        if kind == "relu":
            self.tape.keep(made, [made])
        return made

    def product(self, x: Sized, y: Sized) -> Sized:
        """Keeps both."""
        return self.elementwise([x, y], [x, y])

    def added(self, x: Sized, y: Sized) -> Sized:
        """Keeps nothing; both get the same gradient."""

        def back(arrived: Sequence[Sized | None]) -> list[Sized | None]:
            return [arrived[0], arrived[0]]

        return self.tape.record([x, y], x.shape, x.size, back)

    def scaled(self, x: Sized, factor: float) -> Sized:
        """Keeps nothing."""
        return self.elementwise([x], [])

    def clamped(self, x: Sized, limit: float) -> Sized:
        """Keeps its input."""
        return self.elementwise([x], [x])

    def capped(self, x: Sized, cap: float) -> Sized:
        """A quotient, a hyperbolic tangent, which is kept, and a product."""
        low = self.elementwise([x], [])
        low = self.elementwise([low], [])
        self.tape.keep(low, [low])
        return self.elementwise([low], [])

    def patches(self, pixels: Sized, patch: tuple[int, int]) -> Sized:
        """Copied into another order."""
        rows, channels, height, width = pixels.shape
        tokens = (height // patch[0]) * (width // patch[1])
        made = self.copied(pixels, (rows, tokens, channels * patch[0] * patch[1]))
        return self.cast_to(made, self.a) if self.low else made

    def convolution(
        self, name: str, x: Sized, inputs: int, outputs: int, *, stride: int
    ) -> Sized:
        """6 tokens inputs outputs FLOPs."""
        rows, _, before = x.shape
        tokens = before // stride
        self.modules[name] = Made("convolution", (inputs, outputs, stride))
        shapes = [
            self._parameter(f"{name}.weight", (outputs, inputs, 3)),
            self._parameter(f"{name}.bias", (outputs,)),
        ]
        if self.low and x.size != self.a:
            x = self.cast_to(x, self.a)
        weights = [self._cast(each, linear=False) for each in shapes]
        work = 2 * rows * tokens * inputs * outputs * 3
        self.flops += work
        shape, size, wanted = x.shape, x.size, x.source is not None

        def back(_: Sequence[Sized | None]) -> list[Sized | None]:
            self.flops += 2 * work if wanted else work
            arrived = self.tape.new(shape, size) if wanted else None
            return [arrived, *self._weight_gradients(shapes)]

        made = self.tape.record([x, *weights], (rows, outputs, tokens), self.a, back,
                                self._kept(x, weights[0]), trained=True)  # fmt: skip
        self.tape.traffic -= sum(each.bytes for each in weights)
        return made

    def turned(self, x: Sized) -> Sized:
        """A view."""
        rows, features, tokens = x.shape
        return self.tape.views(x, [(rows, tokens, features)], _same)[0]

    def first_token(self, x: Sized) -> Sized:
        """A view, whose gradient is as large as x."""
        shape, size = x.shape, x.size
        return self.tape.views(
            x, [(shape[0], shape[2])], lambda _: [self.tape.new(shape, size)]
        )[0]

    def relative_bias(
        self, name: str, x: Sized, heads: int, buckets: int, reach: int, *, both_ways: bool
    ) -> Sized:
        """One number for each head and pair of tokens, whatever the rows of the batch."""
        self.modules[name] = Made("table", (buckets, heads))
        own = self._parameter(f"{name}.weight", (buckets, heads))
        tokens = x.shape[1]
        index = self.tape.new((tokens, tokens), INDEX)
        shape = (1, heads, tokens, tokens)
        before = self.tape.traffic

        def back(_: Sequence[Sized | None]) -> list[Sized | None]:
            self.tape.new(own, self.m)
            return [None]

        made = self.tape.record([index], shape, self.m, back, [index], trained=True)
        made = self.cast_to(made, self.a) if self.low else made
        self.tape.traffic = before
        return made

    def loss(
        self, name: str, logits: Sized, targets: Sized, *, split: Split | None = None
    ) -> Sized:
        """Logarithms of probabilities in full precision are kept."""
        self.modules[name] = Made("loss", split=split)
        if isinstance(split, VocabularyLoss):
            self.forward_all_reduce.extend([prod(targets.shape) * self.m] * 3)
        if isinstance(split, VocabularyLoss) and self.width > 1:
            return self._divided_loss(logits, targets)
        x = self.cast_to(logits, self.m) if self.low else logits
        shape = x.shape

        def back(_: Sequence[Sized | None]) -> list[Sized | None]:
            return [self.tape.new(shape, self.m)]

        def back_to_logarithms(_: Sequence[Sized | None]) -> list[Sized | None]:
            return [self.tape.new(shape, self.m), None]

        logarithms = self.tape.record([x], shape, self.m, back)
        self.tape.keep(logarithms, [logarithms])
        weights = self.tape.new((), self.m)
        return self.tape.record([logarithms, targets], (), self.m, back_to_logarithms,
                                [logarithms, targets, weights])  # fmt: skip

    def _divided_loss(self, logits: Sized, targets: Sized) -> Sized:
        """Over a divided vocabulary: probabilities in full precision are kept."""
        x = self.tape.new(logits.shape, self.m) if self.low else logits
        x = self.tape.new(logits.shape, self.m)
        shape, size = logits.shape, logits.size

        def back(_: Sequence[Sized | None]) -> list[Sized | None]:
            wide = self.tape.new(shape, self.m)
            return [self.tape.new(shape, size) if self.low else wide, None]

        made = self.tape.record([logits, targets], (), self.m, back)
        self.tape.keep(made, [x, targets])
        return made


def _same(arrived: Sequence[Sized | None]) -> Sequence[Sized | None]:
    return list(arrived)
