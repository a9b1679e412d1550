"""Runs one layer forward and backward on fake tensors and records what that would cost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from meshwright.cluster.spec import Precision
from meshwright.layout.shares import own_share
from meshwright.layout.tiles import shape_of
from meshwright.model import shard
from meshwright.model.amounts import LayerRun
from meshwright.model.graph import LayerPart
from meshwright.model.meter import DividedCrossEntropy, FusedKernels, Meter
from meshwright.model.symbolic import Fakes, autocast, linear_parameters

TensorSpec = tuple[tuple[int, ...], torch.dtype, bool]
"""Shape and dtype of a tensor, and True if it needs a gradient."""


def _weights(
    part: LayerPart, fakes: Fakes, table: dict[str, shard.Split], width: int
) -> dict[str, Tensor]:
    """Gives fake tensors for the parameters that rank 0 of `width` tensor-parallel ranks holds."""
    state = fakes.state(part.module)
    for name, how in table.items() if width > 1 else ():
        module = part.module.get_submodule(name)
        for parameter, tensor in module.named_parameters(recurse=False):
            if shard.divided_dim(how, parameter) is not None:
                tile = shard.tile_of(how, parameter, tuple(tensor.shape), own_share(width, 0))
                fake = fakes.empty(shape_of(tile), tensor.dtype, tensor.requires_grad)
                state[f"{name}.{parameter}"] = fake
    return state


def _meter(part: LayerPart, fakes: Fakes, state: dict[str, Tensor]) -> Meter:
    """Makes a Meter that does not count weights or the buffers that accumulate their gradients."""
    with fakes.mode:
        for tensor in state.values():
            tensor.grad = torch.empty_like(tensor) if tensor.requires_grad else None
    linear = {id(owner.get_parameter(name)) for owner, name in linear_parameters(part.module)}
    named = part.module.named_parameters(remove_duplicate=False)
    cast_once = [state[name] for name, parameter in named if id(parameter) in linear]
    return Meter([state, [tensor.grad for tensor in state.values()]], cast_once)


def run_layer(
    part: LayerPart,
    shapes: dict[str, TensorSpec],
    precision: Precision,
    table: dict[str, shard.Split],
    width: int,
) -> LayerRun:
    """Runs a layer on fake inputs, as rank 0 of `width` tensor-parallel ranks."""
    fakes = Fakes(precision)
    state = _weights(part, fakes, table, width)
    given = [fakes.empty(*shapes[name]) for name in part.reads]
    meter = _meter(part, fakes, state)
    read = [meter.numbers(tensor) for tensor in given]
    saved: set[int] = set()

    def keep(tensor: Tensor) -> Tensor:
        saved.update(meter.numbers(tensor))
        return tensor

    sums: tuple[list[int], list[int]] = ([], [])
    hooking = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with (
        _divided_modules(part, table, width, sums),
        fakes.mode, autocast(precision), FusedKernels(), meter, hooking,
    ):  # fmt: skip
        made = functional_call(part.module, state, tuple(given))
    forward = (meter.flops, meter.attention_flops, meter.traffic, list(meter.events))
    unfused = meter.unfused_flops
    outputs = [tensor for tensor in made if tensor.requires_grad]
    with fakes.mode, meter:
        grads = [torch.empty_like(tensor) for tensor in outputs]
        if outputs:
            torch.autograd.backward(outputs, grads)
    return LayerRun(
        flops=forward[0],
        attention_flops=forward[1],
        unfused_flops=unfused,
        backward_flops=meter.flops + meter.attention_flops - forward[0] - forward[1],
        traffic=forward[2],
        births=meter.births,
        forward_events=forward[3],
        backward_events=meter.events,
        saved=saved,
        outputs=meter.numbers(made) - saved,
        casts=meter.casts,
        keeps=tuple(numbers <= saved for numbers in read),
        forward_all_reduce=sums[0],
        backward_all_reduce=sums[1],
    )


@contextmanager
def _divided_modules(
    part: LayerPart, table: dict[str, shard.Split], width: int, sums: tuple[list[int], list[int]]
) -> Iterator[None]:
    """Counts the sums that the divided modules of a layer ask for, and lets a loss over a divided
    vocabulary compute what one of `width` ranks does."""
    modules = {name: part.module.get_submodule(name) for name in table}
    hooks = [_count_sums(modules[name], how, *sums) for name, how in table.items()]
    losses = [
        modules[name]
        for name, how in table.items()
        if width > 1 and isinstance(how, shard.VocabularyLoss)
    ]
    for module in losses:
        module.forward = _divided_loss
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in losses:
            del module.forward


def _divided_loss(logits: Tensor, targets: Tensor) -> Any:
    flat = logits.flatten(0, -2), targets.flatten()
    return DividedCrossEntropy.apply(*flat)  # type: ignore[no-untyped-call]


def _count_sums(
    module: nn.Module, how: shard.Split, forward: list[int], backward: list[int]
) -> Any:
    """Adds a hook that notes the sizes of the module's tensor-parallel all-reduces when it runs."""

    def note(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(how, (shard.Row, shard.Vocabulary)):
            forward.append(output.numel() * output.element_size())
        elif isinstance(how, shard.VocabularyLoss):
            # The maximum, the sum of exponentials and the target's logit of each token.
            forward.extend([args[1].numel() * output.element_size()] * 3)
        elif args[0].requires_grad:
            backward.append(args[0].numel() * args[0].element_size())

    return module.register_forward_hook(note)
