"""Counts what an autodiff tape does: which bytes a forward and its backward allocate, save and
free.

Lifetimes are those of Python objects: a storage is freed when nothing refers to it, like that of a
torch tensor. Storages are numbered, and events recorded, as in `model.meter`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from math import prod


class Storage:
    """Stands for the memory of one or more abstract tensors; it is allocated as long as something
    refers to it."""

    __slots__ = ("__weakref__", "number")

    def __init__(self, number: int) -> None:
        self.number = number


_FULL = 4
"""Number of bytes of a float32."""
NOWHERE = Storage(-1)
"""The storage of weights, which is not counted."""


class Sized:
    """Stands for a tensor of which only the shape, the number of bytes of an element, and the
    storage are known."""

    __slots__ = ("shape", "size", "source", "storage")

    def __init__(self, shape: tuple[int, ...], size: int, storage: Storage) -> None:
        self.shape = shape
        self.size = size
        self.storage = storage
        self.source: tuple[TapeEntry, int] | None = None
        """The operation that made this tensor, and the index of this output; None if the tensor
        needs no gradient."""

    @property
    def bytes(self) -> int:
        """Returns the size of the tensor in bytes, even if it is a view of another storage."""
        return prod(self.shape) * self.size


Backward = Callable[[Sequence[Sized | None]], Sequence[Sized | None]]
"""A backward: from gradients of the outputs to gradients of the inputs; None means no gradient."""


def seen_as(shape: Sequence[int]) -> Backward:
    """Makes a backward that returns the arrived gradient, seen with the shape of the input, without
    a copy: that of a view, a padding or a sum.

    It refers only to the shape, since a reference to the tensor would keep its storage allocated.
    """
    whole = tuple(shape)

    def back(arrived: Sequence[Sized | None]) -> list[Sized | None]:
        return [each and Sized(whole, each.size, each.storage) for each in arrived]

    return back


class TapeEntry:
    """Holds one recorded operation with everything that its backward needs."""

    __slots__ = ("back", "cast_at_once", "gradients", "inputs", "saved")

    def __init__(
        self,
        inputs: Sequence[Sized],
        saved: Sequence[Sized],
        back: Backward | None,
        outputs: int = 1,
    ) -> None:
        self.inputs = [each.source for each in inputs]
        self.saved = saved
        self.back = back
        self.cast_at_once = False
        """True for a weight whose gradient has another precision and is cast as soon as made."""
        self.gradients: list[Sized | None] = [None] * outputs


class Tape:
    """Records the operations, and in which order storages are allocated and released."""

    def __init__(self) -> None:
        self.births: list[int] = []
        """Bytes of each storage."""
        self.events: list[int] = []
        """Allocations and releases in order: n + 1 when storage n is allocated, -(n + 1) when it is
        freed."""
        self.saved: set[int] = set()
        """Storages that are saved for the backward."""
        self.casts: set[int] = set()
        """Storages of casts of weights which are cast once a step."""
        self.traffic = 0
        """Number of bytes that the operations recorded so far read and write."""
        self._steps: list[TapeEntry] = []

    def new(self, shape: Sequence[int], size: int) -> Sized:
        """Allocates a tensor with a storage of its own."""
        number = len(self.births)
        self.births.append(prod(shape) * size)
        self.events.append(number + 1)
        storage = Storage(number)
        weakref.finalize(storage, self.events.append, -number - 1)
        return Sized(tuple(shape), size, storage)

    def cast(self, shape: Sequence[int], size: int, before: int) -> Sized:
        """Casts a weight; the backward casts its gradient back to `before` bytes per element."""
        made = self.new(shape, size)

        def back(_: Sequence[Sized | None]) -> list[Sized | None]:
            self.new(shape, before)
            return []

        self._follow((), [made], back, ())
        return made

    def uncast(self, shape: Sequence[int], before: int) -> Sized:
        """Gives a weight that is read without a cast, but whose gradient has another precision.

        The gradient is cast as soon as it is made, while tensors that the operation saved are still
        allocated.
        """
        made = Sized(tuple(shape), before, NOWHERE)
        step = TapeEntry((), (), None)
        step.cast_at_once = True
        made.source = (step, 0)
        return made

    def leaf(self, shape: Sequence[int], size: int, *, gradient: bool) -> Sized:
        """Allocates an input of a layer."""
        made = self.new(shape, size)
        if gradient:
            made.source = (TapeEntry((), (), None), 0)
        return made

    def record(
        self,
        inputs: Sequence[Sized],
        shape: Sequence[int],
        size: int,
        back: Backward,
        saved: Sequence[Sized] = (),
        *,
        trained: bool = False,
    ) -> Sized:
        """Records an operation that reads all inputs, and gives its output. `trained` means that it
        has a backward even if no input needs a gradient, because it has weights."""
        made = self.new(shape, size)
        self.traffic += sum(each.bytes for each in inputs) + made.bytes
        if trained or any(each.source for each in inputs):
            self._follow(inputs, [made], back, saved)
        return made

    def views(self, x: Sized, shapes: Sequence[Sequence[int]], back: Backward) -> list[Sized]:
        """Makes views of one tensor, each of all its elements or of some, in the same storage."""
        made = [Sized(tuple(shape), x.size, x.storage) for shape in shapes]
        if x.source:
            self._follow((x,), made, back, ())
        return made

    def _follow(
        self, inputs: Sequence[Sized], made: list[Sized], back: Backward, saved: Sequence[Sized]
    ) -> None:
        step = TapeEntry(
            inputs, [Sized(s.shape, s.size, s.storage) for s in saved], back, len(made)
        )
        for number, each in enumerate(made):
            each.source = (step, number)
        self.saved |= {each.storage.number for each in saved}
        self._steps.append(step)

    def keep(self, made: Sized, saved: Sequence[Sized]) -> None:
        """Lets the operation that made a tensor save more tensors."""
        if made.source:
            step = made.source[0]
            step.saved = [*step.saved, *(Sized(s.shape, s.size, s.storage) for s in saved)]
            self.saved |= {each.storage.number for each in saved}

    def backward(self, results: Sequence[Sized]) -> None:
        """Runs the backward of every recorded operation in reverse order, from gradients of all
        results."""
        given = [self.new(each.shape, each.size) for each in results]
        for each, gradient in zip(results, given, strict=True):
            if each.source:
                step, number = each.source
                step.gradients[number] = gradient
        while self._steps:
            self._step_back(self._steps.pop())

    def _step_back(self, step: TapeEntry) -> None:
        arrived, step.gradients = step.gradients, []
        if step.back is None or all(each is None for each in arrived):
            return
        back, step.back = step.back, None
        made = list(back(arrived))
        arrived.clear()
        for number, (before, gradient) in enumerate(zip(step.inputs, made, strict=True)):
            if before is not None and before[0].cast_at_once and gradient is not None:
                self.new(gradient.shape, _FULL)
                made[number] = gradient = None
        step.saved = ()
        for before, gradient in zip(step.inputs, made, strict=True):
            if before is None or gradient is None:
                continue
            earlier, number = before
            if earlier.gradients[number] is not None:
                # The sum is a new tensor, since the earlier gradient may be used elsewhere.
                gradient = self.new(gradient.shape, gradient.size)
            earlier.gradients[number] = gradient
