"""Runs micro-batches forward and backward through the layers of one stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from meshwright.cluster.spec import Precision
from meshwright.model.graph import LOSS, autocast
from meshwright.runtime.build_stages import BuiltStage
from meshwright.runtime.debug import NonFiniteCheck
from meshwright.runtime.low_precision_weights import LowPrecisionWeights
from meshwright.runtime.seeds import generator_of, layer_seed, rows_seed
from meshwright.techniques.backward_split.runtime.deferring import (
    DeferredGradients,
    DeferWeightGradients,
    backward_weights,
)

RowReader = Callable[[int, int], tuple[Tensor, ...]]
"""Function from (first, last) to the batch tensors of rows [first, last) of the step's global
batch."""


@dataclass(slots=True, kw_only=True)
class _MicroBatchState:
    """Keeps what one micro-batch needs between its forward and its backward."""

    leaves: list[Tensor]
    """The tensors received from the previous stage."""
    batch: Mapping[str, Tensor]
    step: int
    first_row: int
    split: bool
    """True if its backward comes in two parts."""
    results: list[Tensor] = field(default_factory=list)
    deferred: DeferredGradients | None = None


@dataclass(slots=True, kw_only=True)
class _StageLayer:
    """Holds one layer as a forward runs it."""

    name: str
    seed: int
    """The layer's part of the seeds of its forwards."""
    module: Callable[..., Any]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    unneeded: tuple[str, ...]
    """Names of the tensors that are not needed after it."""
    repeats_forward: bool
    """True if the backward runs its forward again (recomputation)."""


class StageModule:
    """Runs the layers of one stage, and keeps what the backwards of its micro-batches still
    need."""

    def __init__(
        self,
        built: BuiltStage,
        precision: Precision,
        device: torch.device,
        seed: int,
        *,
        compile: bool = False,
    ) -> None:
        self.parts = built.parts
        # Compiled code casts weights itself.
        self.casts = LowPrecisionWeights(
            [] if compile else [part.module for part in built.parts], precision
        )
        self.incoming = built.incoming
        self.outgoing = built.outgoing
        self.precision: Precision = precision
        self.device = device
        self.tracer: NonFiniteCheck | None = None
        """Checks every layer for non-finite values, in debug mode."""
        self.between_layers: Callable[[], None] | None = None
        """Called between layers, in forwards and backwards."""
        self.inputs = built.inputs
        self.reads = _read_from_batch(built)
        self.makes_loss = LOSS in self.parts[-1].writes
        self.parameters = frozenset(one.name for one in built.local_parameters)
        self._parameters = [
            one.parameter for one in built.local_parameters if one.parameter.requires_grad
        ]
        self._results = (LOSS,) if self.makes_loss else tuple(t.name for t in self.outgoing)
        self._ends = [n for n, crossing in enumerate(built.outgoing) if crossing.gradient]
        """Indices of the results whose gradients come back."""
        self._received = tuple(crossing.name for crossing in built.incoming)
        self._layers = _layers(built, self._results, seed, compile=compile)
        self._deferring = DeferWeightGradients(self._parameters)
        self._arithmetic = autocast(precision, device.type)
        self._generator = generator_of(device)
        self._passes: dict[int, _MicroBatchState] = {}
        self._root: tuple[float, Tensor] | None = None
        """The last weight of a loss, and the root gradient made for it."""

    def read(self, rows: RowReader, first: int, last: int) -> dict[str, Tensor]:
        """Returns the batch tensors that these layers read, on their device."""
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
        split: bool = False,
    ) -> list[Tensor]:
        """Runs a micro-batch forward; returns the tensors of the outgoing cut, or the loss alone on
        the last stage.

        `first_row` is the index of the micro-batch's first row in the global batch. Each layer
        seeds the random generator anew, and leaves it as its own draws have left it. `split`: the
        backward will come in two parts.
        """
        leaves = [
            tensor.requires_grad_() if crossing.gradient else tensor
            for tensor, crossing in zip(received, self.incoming, strict=True)
        ]
        own = _MicroBatchState(
            leaves=leaves, batch=batch, step=step, first_row=first_row, split=split
        )
        self._passes[micro_batch] = own
        if self.tracer is not None:
            self.tracer.begin(own.step, (micro_batch,))
        if split:
            own.deferred = self._deferring.begin()
            with self._deferring:
                own.results = self._run(own)
        else:
            own.results = self._run(own)
        return own.results

    def _run(self, own: _MicroBatchState) -> list[Tensor]:
        values = {**own.batch, **dict(zip(self._received, own.leaves, strict=True))}
        of_rows = rows_seed(own.step, own.first_row)
        with self._arithmetic:
            for layer in self._layers:
                reads = [values[name] for name in layer.reads]
                if self.tracer is not None:
                    reads = self.tracer.read(layer.name, reads)
                run = self._run_again_later if layer.repeats_forward else self._run_layer
                made = run(layer.module, layer.seed ^ of_rows, reads, own.split)
                if self.tracer is not None:
                    self.tracer.made(layer.name, made)
                if self.between_layers is not None:
                    _call_around(self.between_layers, made)
                values.update(zip(layer.writes, made, strict=True))
                for name in layer.unneeded:
                    del values[name]
        return [values[name] for name in self._results]

    def _run_layer(
        self, module: Callable[..., Any], seed: int, reads: Sequence[Tensor], _: bool = False
    ) -> tuple[Tensor, ...]:
        self._generator.manual_seed(seed)
        made: tuple[Tensor, ...] = module(*reads)
        return made

    def _run_again_later(
        self, module: Callable[..., Any], seed: int, reads: Sequence[Tensor], split: bool
    ) -> tuple[Tensor, ...]:
        """Runs a layer with activation checkpointing: keeps only `reads`, and the backward runs the
        layer again with the same random numbers.

        In a split backward the first part does that; what the second part needs is kept from there.
        """

        def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
            return nullcontext(), DeferWeightGradients(self._parameters) if split else nullcontext()

        return checkpoint(  # type: ignore[no-any-return]
            self._run_layer, module, seed, reads,
            use_reentrant=False, preserve_rng_state=False, context_fn=contexts,
        )  # fmt: skip

    def backward(
        self, micro_batch: int, gradients: Sequence[Tensor], weight: float
    ) -> list[Tensor | None]:
        """Accumulates the parameters' gradients, and returns those of the incoming tensors.

        `gradients` are those of the outgoing tensors that have one. On the last stage `weight`, the
        loss's share of the global mean, is used as the root gradient instead.
        """
        own = self._passes.pop(micro_batch)
        if self.tracer is not None:
            self.tracer.begin(own.step, (micro_batch,))
        self._run_back(own, gradients, weight)
        return self._of_leaves(own)

    def backward_input(
        self, micro_batch: int, gradients: Sequence[Tensor], weight: float
    ) -> list[Tensor | None]:
        """Runs the first part of a backward: returns the gradients of the incoming tensors.

        It runs on the first stage too, although no rank waits for its gradients: in most schedules
        the second parts come late, and work that is left to them lengthens the step.
        """
        own = self._passes[micro_batch]
        if self.tracer is not None:
            self.tracer.begin(own.step, (micro_batch,))
        self._run_back(own, gradients, weight)
        found = self._of_leaves(own)
        own.leaves, own.batch = [], {}
        return found

    def backward_weight(self, micro_batches: Sequence[int]) -> None:
        """Runs the second part: accumulates the parameters' gradients of some micro-batches at
        once."""
        passes = [self._passes.pop(micro_batch) for micro_batch in micro_batches]
        if self.tracer is not None:
            self.tracer.begin(passes[0].step, micro_batches)
        backward_weights([own.deferred for own in passes if own.deferred is not None])

    def completed_parameters(self, micro_batches: Sequence[int]) -> list[nn.Parameter]:
        """Returns the parameters whose gradients the first part of these micro-batches' backward
        has completed."""
        passes = [self._passes[micro_batch] for micro_batch in micro_batches]
        deferred = {
            one for own in passes if own.deferred is not None for one in own.deferred.parameters()
        }
        return [parameter for parameter in self._parameters if id(parameter) not in deferred]

    def kept_bytes(self, micro_batch: int) -> int | None:
        """Returns the bytes that the first part of a backward has left for the second; None: all
        that the forward saved."""
        deferred = self._passes[micro_batch].deferred
        return None if deferred is None else deferred.kept_bytes()

    def _run_back(self, own: _MicroBatchState, gradients: Sequence[Tensor], weight: float) -> None:
        results, own.results = own.results, []
        roots: list[Tensor] = []
        given: list[Tensor] = []
        if not self.makes_loss:
            for n, gradient in zip(self._ends, gradients, strict=True):
                if results[n].requires_grad:
                    roots.append(results[n])
                    given.append(gradient)
        elif results[0].requires_grad:
            roots.append(results[0])
            given.append(self._gradient_of_loss(results[0], weight))
        del results
        if roots:
            torch.autograd.backward(roots, given)

    def _gradient_of_loss(self, loss: Tensor, weight: float) -> Tensor:
        if self._root is None or self._root[0] != weight:
            self._root = weight, torch.full_like(loss, weight)
        return self._root[1]

    def _of_leaves(self, own: _MicroBatchState) -> list[Tensor | None]:
        return [leaf.grad for leaf in own.leaves if leaf.requires_grad]


def _call_around(call: Callable[[], None], made: Sequence[Tensor]) -> None:
    """Calls a function after a layer's forward, and again before its backward."""
    call()
    for tensor in made:
        if tensor.requires_grad:
            tensor.register_hook(lambda _: call())  # type: ignore[no-untyped-call]


def _read_from_batch(built: BuiltStage) -> tuple[str, ...]:
    read = {name for part in built.parts for name in part.reads}
    return tuple(name for name in built.inputs if name in read)


def _layers(
    built: BuiltStage, results: Sequence[str], seed: int, *, compile: bool
) -> list[_StageLayer]:
    seen = set(results)
    found: list[_StageLayer] = []
    for part, again in zip(reversed(built.parts), reversed(built.recomputed), strict=True):
        names = dict.fromkeys((*part.reads, *part.writes))
        found.append(
            _StageLayer(
                name=part.name,
                seed=layer_seed(seed, part.name),
                module=torch.compile(part.module) if compile else part.module,
                reads=part.reads,
                writes=part.writes,
                unneeded=tuple(name for name in names if name not in seen),
                repeats_forward=again,
            )
        )
        seen.update(names)
    return found[::-1]
