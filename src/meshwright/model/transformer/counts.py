"""What is counted of a layer, and the operations that others are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

from meshwright.model.shard import (
    Column,
    Row,
    Split,
    VocabularyHead,
    held,
)
from meshwright.model.transformer.made import Made, Parameter
from meshwright.model.transformer.spec import Activation
from meshwright.model.transformer.tape import NOWHERE, Sized, Tape


@dataclass(slots=True)
class Counts:
    """What one tensor rank of `width` does for a layer."""

    a: int
    m: int
    width: int = 1
    tape: Tape = field(default_factory=Tape)
    parameters: list[Parameter] = field(default_factory=list)
    modules: dict[str, Made] = field(default_factory=dict)
    constants: int = 0
    """Numbers that are held and not trained, beside parameters."""
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

    def parameter(
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

    def weight_cast(self, shape: tuple[int, ...], *, linear: bool) -> Sized:
        """A weight as it is read: itself, or a cast."""
        if not self.low:
            return Sized(shape, self.m, NOWHERE)
        made = self.tape.cast(shape, self.a, self.m)
        if linear:
            self.tape.casts.add(made.storage.number)
        return made

    def kept(self, *values: Sized) -> list[Sized]:
        """Those that are no weights themselves."""
        return [each for each in values if each.storage is not NOWHERE]

    def weight_gradients(self, shapes: Sequence[tuple[int, ...]]) -> list[Sized | None]:
        """As the weights were read: those of casts are handed on, others added to what there is."""
        made = [self.tape.new(shape, self.a) for shape in shapes]
        return list(made) if self.low else [None] * len(shapes)

    def elementwise(self, inputs: Sequence[Sized], saved: Sequence[Sized]) -> Sized:
        """An output like the first input; in the backward one of each input's size."""
        x = inputs[0]
        new = self.tape.new

        def back(_: Sequence[Sized | None]) -> list[Sized | None]:
            return [new(shape, size) for shape, size in shapes]

        shapes = [(each.shape, each.size) for each in inputs]
        return self.tape.record(inputs, x.shape, x.size, back, saved)

    def linear(
        self, name: str, x: Sized, inputs: int, outputs: int, *, bias: bool = False,
        split: Split | None = None,
    ) -> Sized:  # fmt: skip
        """2 tokens inputs outputs FLOPs, and twice that back."""
        self.modules[name] = Made("linear", (inputs, outputs), bias, split)
        own = self.parameter(f"{name}.weight", (outputs, inputs), split, linear=True)
        shapes = [own]
        if bias:
            shapes.append(self.parameter(f"{name}.bias", (outputs,), split, linear=True))
        weights = [self.weight_cast(each, linear=True) for each in shapes]
        work = 2 * prod(x.shape[:-1]) * own[0] * own[1]
        self.flops += work
        shape, size = x.shape, x.size
        wanted = x.source is not None
        if isinstance(split, Column | VocabularyHead):
            self.backward_all_reduce.append(x.bytes)

        def back(_: Sequence[Sized | None]) -> list[Sized | None]:
            self.flops += 2 * work if wanted else work
            before = self.tape.new(shape, size) if wanted else None
            return [before, *self.weight_gradients(shapes)]

        made = self.tape.record([x, *weights], (*shape[:-1], own[0]), self.a, back,
                                self.kept(x, weights[0]), trained=True)  # fmt: skip
        self.tape.traffic -= sum(each.bytes for each in weights)
        if isinstance(split, Row):
            self.forward_all_reduce.append(made.bytes)
        return made

    def cast_to(self, x: Sized, size: int) -> Sized:
        """A cast."""
        shape, before = x.shape, x.size

        def back(_: Sequence[Sized | None]) -> list[Sized | None]:
            return [self.tape.new(shape, before)]

        return self.tape.record([x], shape, size, back)

    def parts(self, x: Sized, sizes: Sequence[int]) -> list[Sized]:
        """Views; their gradients are put together into one."""
        own = [x.shape[-1] * size // sum(sizes) for size in sizes]
        shape, size = x.shape, x.size

        def back(_: Sequence[Sized | None]) -> list[Sized | None]:
            return [self.tape.new(shape, size)]

        return self.tape.views(x, [(*shape[:-1], each) for each in own], back)

    def joined_along(self, x: Sized, y: Sized, dim: int) -> Sized:
        """Copies, one behind the other in a dimension; the gradient's parts are views."""
        size, left, right = x.size, x.shape, y.shape

        def back(arrived: Sequence[Sized | None]) -> list[Sized | None]:
            whole = arrived[0]
            assert whole is not None
            return [Sized(shape, size, whole.storage) for shape in (left, right)]

        shape = (*left[:dim], left[dim] + right[dim], *left[dim + 1 :])
        return self.tape.record([x, y], shape, size, back)

    def copied(self, x: Sized, shape: tuple[int, ...]) -> Sized:
        """Another layout of the same numbers."""
        before, size = x.shape, x.size
        return self.tape.record([x], shape, size, lambda _: [self.tape.new(before, size)])

    def activate(self, kind: Activation, x: Sized) -> Sized:
        """Keeps its input (ReLU its output); two are made of others."""
        if kind == "quick-gelu":
            gate = self.elementwise([self.scaled(x, 1.702)], [])
            self.tape.keep(gate, [gate])
            return self.product(x, gate)
        if not kind.startswith("relu"):
            return self.elementwise([x], [x])
        made = self.elementwise([x], [])
        self.tape.keep(made, [made])
        return made if kind == "relu" else self._squared(made)

    def _squared(self, x: Sized) -> Sized:
        """Keeps its input, which is copied and doubled before the gradient is multiplied by it."""
        shape, size = x.shape, x.size

        def back(_: Sequence[Sized | None]) -> list[Sized | None]:
            copied, doubled, before = (self.tape.new(shape, size) for _ in range(3))
            del copied, doubled
            return [before]

        return self.tape.record([x], shape, size, back, [x])

    def product(self, x: Sized, y: Sized) -> Sized:
        """Keeps both."""
        return self.elementwise([x, y], [x, y])

    def capped(self, x: Sized, cap: float) -> Sized:
        """A quotient, a hyperbolic tangent, which is kept, and a product."""
        low = self.elementwise([x], [])
        low = self.elementwise([low], [])
        self.tape.keep(low, [low])
        return self.elementwise([low], [])

    def scaled(self, x: Sized, factor: float) -> Sized:
        """Keeps nothing."""
        return self.elementwise([x], [])
