"""Counts the cost of a layer, and defines the basic operations that add to it.

`counted.Counted` extends it to all operations that a layer's description may call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

from meshwright.layout.shares import own_share
from meshwright.layout.tiles import shape_of
from meshwright.model.shard import Column, Row, Split, VocabularyHead, tile_of
from meshwright.model.transformer.module_specs import ModuleSpec, ParameterSpec
from meshwright.model.transformer.spec import Activation
from meshwright.model.transformer.tape import NOWHERE, Sized, Tape


@dataclass(slots=True)
class Counts:
    """Adds up the cost of a layer on rank 0 of `width` tensor-parallel ranks."""

    a: int
    """Number of bytes of an activation."""
    m: int
    """Number of bytes of a weight, and of what is computed in full precision."""
    width: int = 1
    tape: Tape = field(default_factory=Tape)
    parameters: list[ParameterSpec] = field(default_factory=list)
    modules: dict[str, ModuleSpec] = field(default_factory=dict)
    """Submodules of the layer by name."""
    constants: int = 0
    """Number of elements of buffers, which are held but not trained."""
    splits: dict[str, Split] = field(default_factory=dict)
    """How tensor parallelism divides modules inside a module of `modules`, by qualified name."""
    flops: int = 0
    attention_flops: int = 0
    unfused_flops: int = 0
    """The part of `attention_flops` that is not in a fused kernel."""
    forward_all_reduce: list[int] = field(default_factory=list)
    """Bytes of each tensor-parallel all-reduce in the forward."""
    backward_all_reduce: list[int] = field(default_factory=list)
    """Bytes of each tensor-parallel all-reduce in the backward."""

    @property
    def low(self) -> bool:
        """True if the precision is 16-bit, so that weights are cast before they are read."""
        return self.a != self.m

    def parameter(
        self, name: str, shape: tuple[int, ...], split: Split | None = None, *,
        linear: bool = False, trained: bool = True,
    ) -> tuple[int, ...]:  # fmt: skip
        """Notes a parameter and gives the shape of the part that this rank holds."""
        self.parameters.append(ParameterSpec(name, shape, split, linear=linear, trained=trained))
        if split is None or self.width == 1:
            return shape
        return shape_of(tile_of(split, name.rpartition(".")[2], shape, own_share(self.width, 0)))

    def weight_cast(self, shape: tuple[int, ...], *, linear: bool) -> Sized:
        """Gives a weight as operations read it: the weight itself, or its cast in 16 bits."""
        if not self.low:
            return Sized(shape, self.m, NOWHERE)
        made = self.tape.cast(shape, self.a, self.m)
        if linear:
            self.tape.casts.add(made.storage.number)
        return made

    def kept(self, *values: Sized) -> list[Sized]:
        """Leaves out uncast weights, which need not be saved for the backward."""
        return [each for each in values if each.storage is not NOWHERE]

    def weight_gradients(self, shapes: Sequence[tuple[int, ...]]) -> list[Sized | None]:
        """Allocates the gradients of weights and gives those that are passed on to a cast. Without
        casts, they are added to the accumulated gradients at once, and None is passed on."""
        made = [self.tape.new(shape, self.a) for shape in shapes]
        return list(made) if self.low else [None] * len(shapes)

    def elementwise(self, inputs: Sequence[Sized], saved: Sequence[Sized]) -> Sized:
        """Counts an elementwise operation: the output has the first input's size, and the backward
        makes a gradient of each input's size."""
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
        """Counts 2 * tokens * inputs * outputs FLOPs, and twice that in the backward."""
        self.modules[name] = ModuleSpec("linear", (inputs, outputs), bias, split)
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
        """Counts a cast to numbers of `size` bytes; the backward casts the gradient back."""
        shape, before = x.shape, x.size

        def back(_: Sequence[Sized | None]) -> list[Sized | None]:
            return [self.tape.new(shape, before)]

        return self.tape.record([x], shape, size, back)

    def parts(self, x: Sized, sizes: Sequence[int]) -> list[Sized]:
        """Makes views of parts of the last dimension; their gradients are joined into one."""
        own = [x.shape[-1] * size // sum(sizes) for size in sizes]
        shape, size = x.shape, x.size

        def back(_: Sequence[Sized | None]) -> list[Sized | None]:
            return [self.tape.new(shape, size)]

        return self.tape.views(x, [(*shape[:-1], each) for each in own], back)

    def joined_along(self, x: Sized, y: Sized, dim: int) -> Sized:
        """Counts a concatenation along `dim`; the gradients are views of the output's gradient."""
        size, left, right = x.size, x.shape, y.shape

        def back(arrived: Sequence[Sized | None]) -> list[Sized | None]:
            whole = arrived[0]
            assert whole is not None
            return [Sized(shape, size, whole.storage) for shape in (left, right)]

        shape = (*left[:dim], left[dim] + right[dim], *left[dim + 1 :])
        return self.tape.record([x, y], shape, size, back)

    def copied(self, x: Sized, shape: tuple[int, ...]) -> Sized:
        """Counts a copy of the same numbers into another shape or memory layout."""
        before, size = x.shape, x.size
        return self.tape.record([x], shape, size, lambda _: [self.tape.new(before, size)])

    def activate(self, kind: Activation, x: Sized) -> Sized:
        """Counts an activation, which saves its input (ReLU saves its output). Quick-GELU and
        squared ReLU consist of two or more operations."""
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
        """Counts a square, which saves its input; the backward makes two temporaries of it."""
        shape, size = x.shape, x.size

        def back(_: Sequence[Sized | None]) -> list[Sized | None]:
            copied, doubled, before = (self.tape.new(shape, size) for _ in range(3))
            del copied, doubled
            return [before]

        return self.tape.record([x], shape, size, back, [x])

    def product(self, x: Sized, y: Sized) -> Sized:
        """Counts an elementwise product, which saves both factors."""
        return self.elementwise([x, y], [x, y])

    def capped(self, x: Sized, cap: float) -> Sized:
        """Counts a division, a hyperbolic tangent, whose output is saved, and a product."""
        low = self.elementwise([x], [])
        low = self.elementwise([low], [])
        self.tape.keep(low, [low])
        return self.elementwise([low], [])

    def scaled(self, x: Sized, factor: float) -> Sized:
        """Counts a product with a constant, which saves nothing."""
        return self.elementwise([x], [])
