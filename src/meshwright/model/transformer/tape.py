"""Sizes of what a forward and its backward would make, keep and drop, operation by operation.

The lifetimes are Python's own: what nobody refers to any more ends, as a tensor does. Numbers and
events are those of `model.meter`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from math import prod


class Storage:
    """Bytes that are alive while something refers to them."""

    __slots__ = ("__weakref__", "number")

    def __init__(self, number: int) -> None:
        self.number = number


_FULL = 4
"""Bytes of a number in full precision beside half precision."""
NOWHERE = Storage(-1)
"""Where weights are, which nobody counts."""


class Sized:
    """What stands for a tensor: its shape, the bytes of a number, and where it is stored."""

    __slots__ = ("shape", "size", "source", "storage")

    def __init__(self, shape: tuple[int, ...], size: int, storage: Storage) -> None:
        self.shape = shape
        self.size = size
        self.storage = storage
        self.source: tuple[Step, int] | None = None
        """The operation that a gradient goes back to, and which of its outputs this is; None: no
        gradient."""

    @property
    def bytes(self) -> int:
        """Of all numbers, wherever they are stored."""
        return prod(self.shape) * self.size


Backward = Callable[[Sequence[Sized | None]], Sequence[Sized | None]]
"""From the outputs' gradients to those of the inputs, None where there is none."""


def seen_as(shape: Sequence[int]) -> Backward:
    """The gradient of a view, of a part, or of a sum that it is spread over, which copies nothing.
    Only the shape is held: what held the value itself would keep it alive."""
    whole = tuple(shape)

    def back(arrived: Sequence[Sized | None]) -> list[Sized | None]:
        return [each and Sized(whole, each.size, each.storage) for each in arrived]

    return back


class Step:
    """One operation, as its backward will need it."""

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
        """Of a weight: its gradient is not in its own precision."""
        self.gradients: list[Sized | None] = [None] * outputs


class Tape:
    """Storages in order of birth, and what happens to them."""

    def __init__(self) -> None:
        self.births: list[int] = []
        self.events: list[int] = []
        self.saved: set[int] = set()
        self.casts: set[int] = set()
        self.traffic = 0
        self._steps: list[Step] = []

    def new(self, shape: Sequence[int], size: int) -> Sized:
        """A tensor with a storage of its own."""
        number = len(self.births)
        self.births.append(prod(shape) * size)
        self.events.append(number + 1)
        storage = Storage(number)
        weakref.finalize(storage, self.events.append, -number - 1)
        return Sized(tuple(shape), size, storage)

    def cast(self, shape: Sequence[int], size: int, before: int) -> Sized:
        """A cast of a weight, whose gradient is cast back."""
        made = self.new(shape, size)

        def back(_: Sequence[Sized | None]) -> list[Sized | None]:
            self.new(shape, before)
            return []

        self._follow((), [made], back, ())
        return made

    def uncast(self, shape: Sequence[int], before: int) -> Sized:
        """A weight that is read as it is, but whose gradient comes in another precision: it is cast
        as soon as it is made, when what the operation kept has not been let go of."""
        made = Sized(tuple(shape), before, NOWHERE)
        step = Step((), (), None)
        step.cast_at_once = True
        made.source = (step, 0)
        return made

    def leaf(self, shape: Sequence[int], size: int, *, gradient: bool) -> Sized:
        """What a layer reads."""
        made = self.new(shape, size)
        if gradient:
            made.source = (Step((), (), None), 0)
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
        """The output of an operation that reads all inputs; `trained`: of weights of its own."""
        made = self.new(shape, size)
        self.traffic += sum(each.bytes for each in inputs) + made.bytes
        if trained or any(each.source for each in inputs):
            self._follow(inputs, [made], back, saved)
        return made

    def views(self, x: Sized, shapes: Sequence[Sequence[int]], back: Backward) -> list[Sized]:
        """Other looks at the same numbers, or at some of them."""
        made = [Sized(tuple(shape), x.size, x.storage) for shape in shapes]
        if x.source:
            self._follow((x,), made, back, ())
        return made

    def _follow(
        self, inputs: Sequence[Sized], made: list[Sized], back: Backward, saved: Sequence[Sized]
    ) -> None:
        step = Step(inputs, [Sized(s.shape, s.size, s.storage) for s in saved], back, len(made))
        for number, each in enumerate(made):
            each.source = (step, number)
        self.saved |= {each.storage.number for each in saved}
        self._steps.append(step)

    def keep(self, made: Sized, saved: Sequence[Sized]) -> None:
        """Let the operation that made a value keep more."""
        if made.source:
            step = made.source[0]
            step.saved = [*step.saved, *(Sized(s.shape, s.size, s.storage) for s in saved)]
            self.saved |= {each.storage.number for each in saved}

    def backward(self, results: Sequence[Sized]) -> None:
        """Gradients of all results, back through every operation in turn."""
        given = [self.new(each.shape, each.size) for each in results]
        for each, gradient in zip(results, given, strict=True):
            if each.source:
                step, number = each.source
                step.gradients[number] = gradient
        while self._steps:
            self._step_back(self._steps.pop())

    def _step_back(self, step: Step) -> None:
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
                # Summed into a third tensor, as long as the earlier one may be somebody else's.
                gradient = self.new(gradient.shape, gradient.size)
            earlier.gradients[number] = gradient
