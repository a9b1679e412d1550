"""Forward and backward of one micro-batch over the layers that a rank holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from meshwright.cluster.spec import Precision
from meshwright.model.graph import LOSS, LayerPart, autocast
from meshwright.runtime.build import BuiltStage
from meshwright.runtime.casts import Casts
from meshwright.runtime.seeds import generator_of, layer_seed

Rows = Callable[[int, int], tuple[Tensor, ...]]
"""[first, last) to the batch tensors of those rows of the step's global batch."""


class Stage:
    """A rank's layers, and what their backwards still need."""

    def __init__(
        self, built: BuiltStage, precision: Precision, device: torch.device, seed: int
    ) -> None:
        self.parts = built.parts
        self.casts = Casts([part.module for part in built.parts], precision)
        self.incoming = built.incoming
        self.outgoing = built.outgoing
        self.precision: Precision = precision
        self.device = device
        self.seed = seed
        self.inputs = built.inputs
        self.reads = _read_from_batch(built)
        self.makes_loss = LOSS in self.parts[-1].writes
        self._results = (LOSS,) if self.makes_loss else tuple(t.name for t in self.outgoing)
        self._done_after = _last_reads(built, self._results)
        self._generator = generator_of(device)
        self._recomputed = built.recomputed
        self._kept: dict[int, tuple[list[Tensor], list[Tensor]]] = {}

    def read(self, rows: Rows, first: int, last: int) -> dict[str, Tensor]:
        """The batch tensors that these layers read, on their device."""
        if not self.reads:
            return {}
        batch = dict(zip(self.inputs, rows(first, last), strict=True))
        return {name: self._on_device(batch[name]) for name in self.reads}

    def _on_device(self, tensor: Tensor) -> Tensor:
        double = self.precision == "fp64" and tensor.is_floating_point()
        dtype = torch.float64 if double else tensor.dtype
        return tensor.to(self.device, dtype, non_blocking=True)

    def forward(
        self,
        micro_batch: int,
        received: Sequence[Tensor],
        batch: Mapping[str, Tensor],
        *,
        step: int,
        first_row: int,
    ) -> list[Tensor]:
        """The tensors of the outgoing cut, or the loss alone on the last stage.

        `first_row` is the place of this slice in the global batch. Each layer draws its random
        numbers from a seed of its own; the generator is afterwards as it was.
        """
        leaves = [
            tensor.requires_grad_() if crossing.gradient else tensor
            for tensor, crossing in zip(received, self.incoming, strict=True)
        ]
        values = dict(batch)
        values.update((c.name, leaf) for c, leaf in zip(self.incoming, leaves, strict=True))
        state = self._generator.get_state()
        with autocast(self.precision, self.device.type):
            each = zip(self.parts, self._recomputed, self._done_after, strict=True)
            for part, again, done in each:
                seed = layer_seed(self.seed, step, part.name, first_row)
                read = [values[name] for name in part.reads]
                made = (
                    self._run_again_later(part, seed, read)
                    if again
                    else self._run(part, seed, read)
                )
                values.update(zip(part.writes, made, strict=True))
                for name in done:
                    del values[name]
        self._generator.set_state(state)
        results = [values[name] for name in self._results]
        self._kept[micro_batch] = (leaves, results)
        return results

    def _run(self, part: LayerPart, seed: int, read: Sequence[Tensor]) -> tuple[Tensor, ...]:
        self._generator.manual_seed(seed)
        made: tuple[Tensor, ...] = part.module(*read)
        return made

    def _run_again_later(
        self, part: LayerPart, seed: int, read: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Keeps `read` alone; the backward runs the layer again, with the same random numbers."""
        return checkpoint(  # type: ignore[no-any-return]
            self._run, part, seed, read, use_reentrant=False, preserve_rng_state=False
        )

    def backward(
        self, micro_batch: int, gradients: Sequence[Tensor], weight: float
    ) -> list[Tensor | None]:
        """Accumulates the parameters' gradients; gives those of the incoming tensors.

        `gradients` are those of the outgoing tensors that have one; on the last stage `weight`,
        the loss's share of the global mean, stands for them.
        """
        leaves, results = self._kept.pop(micro_batch)
        roots = [tensor for tensor in results if tensor.requires_grad]
        if roots:
            given = self._given(results, gradients, weight)
            del results
            state = self._generator.get_state() if any(self._recomputed) else None
            torch.autograd.backward(roots, given)
            if state is not None:
                self._generator.set_state(state)
        return [leaf.grad for leaf, c in zip(leaves, self.incoming, strict=True) if c.gradient]

    def _given(
        self, results: Sequence[Tensor], gradients: Sequence[Tensor], weight: float
    ) -> list[Tensor]:
        """The gradients of those results that require one here."""
        if self.makes_loss:
            return [torch.full_like(results[0], weight)]
        by_name = dict(zip((t.name for t in self.outgoing if t.gradient), gradients, strict=True))
        pairs = zip(self._results, results, strict=True)
        return [by_name[name] for name, tensor in pairs if tensor.requires_grad]


def _read_from_batch(built: BuiltStage) -> tuple[str, ...]:
    read = {name for part in built.parts for name in part.reads}
    return tuple(name for name in built.inputs if name in read)


def _last_reads(built: BuiltStage, results: Sequence[str]) -> list[list[str]]:
    """For each layer the tensors that nobody needs after it."""
    seen = set(results)
    done: list[list[str]] = []
    for part in reversed(built.parts):
        names = dict.fromkeys((*part.reads, *part.writes))
        done.append([name for name in names if name not in seen])
        seen.update(names)
    return done[::-1]
