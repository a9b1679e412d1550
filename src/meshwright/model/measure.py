"""One layer run forward and backward on fake tensors, and what that says about a row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from meshwright.cluster.spec import Precision
from meshwright.model import shard
from meshwright.model.graph import LayerPart
from meshwright.model.meter import FusedKernels, Meter, peak
from meshwright.model.symbolic import Fakes, autocast
from meshwright.records import record

ROWS = (2, 4)
"""Rows of the two runs whose difference is what a row costs."""

Shape = tuple[tuple[int, ...], torch.dtype, bool]
"""Shape, dtype, and whether a gradient flows back."""


@record
class Run:
    """One forward and backward of a layer."""

    flops: float
    attention_flops: float
    backward_flops: float
    traffic: float
    births: list[int]
    forward_events: list[int]
    backward_events: list[int]
    saved: set[int]
    outputs: set[int]
    forward_all_reduce: list[int]
    backward_all_reduce: list[int]


@record
class Amounts:
    """A layer's cost per row."""

    forward_flops: float
    attention_flops: float
    backward_flops: float
    traffic_bytes: float
    saved_bytes: float
    workspace_bytes: float
    forward_all_reduce_bytes: tuple[float, ...]
    backward_all_reduce_bytes: tuple[float, ...]


def _weights(
    part: LayerPart, fakes: Fakes, table: dict[str, shard.Split], width: int
) -> dict[str, Tensor]:
    """Stand-ins for the parameters of tensor rank 0 of `width`."""
    state = fakes.state(part.module)
    for name, how in table.items() if width > 1 else ():
        module = part.module.get_submodule(name)
        for parameter, tensor in module.named_parameters(recurse=False):
            ranges = shard.held(how, parameter, tuple(tensor.shape), width, 0)
            if ranges is not None:
                shape = list(tensor.shape)
                shape[ranges.dim] = sum(last - first for first, last in ranges.ranges)
                fake = fakes.empty(tuple(shape), tensor.dtype, tensor.requires_grad)
                state[f"{name}.{parameter}"] = fake
    return state


def run(
    part: LayerPart,
    shapes: dict[str, Shape],
    precision: Precision,
    table: dict[str, shard.Split],
    width: int,
) -> Run:
    """A layer on stand-ins of the tensors it reads, as tensor rank 0 of `width` has it."""
    fakes = Fakes(precision)
    state = _weights(part, fakes, table, width)
    given = [fakes.empty(*shapes[name]) for name in part.reads]
    meter = Meter(state)
    meter.numbers(given)
    saved: set[int] = set()

    def keep(tensor: Tensor) -> Tensor:
        saved.update(meter.numbers(tensor))
        return tensor

    sums: tuple[list[int], list[int]] = ([], [])
    hooks = [
        _count_sums(part.module.get_submodule(name), how, *sums) for name, how in table.items()
    ]
    hooking = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with fakes.mode, autocast(precision), FusedKernels(), meter, hooking:
        made = functional_call(part.module, state, tuple(given))
    for hook in hooks:
        hook.remove()
    forward = (meter.flops, meter.attention_flops, meter.traffic, list(meter.events))
    outputs = [tensor for tensor in made if tensor.requires_grad]
    wanted = [t for t in (*given, *state.values()) if t.requires_grad]
    with fakes.mode, meter:
        grads = [torch.empty_like(tensor) for tensor in outputs]
        if outputs:
            torch.autograd.grad(outputs, wanted, grads, allow_unused=True)
    return Run(
        flops=forward[0],
        attention_flops=forward[1],
        backward_flops=meter.flops + meter.attention_flops - forward[0] - forward[1],
        traffic=forward[2],
        births=meter.births,
        forward_events=forward[3],
        backward_events=meter.events,
        saved=saved,
        outputs=meter.numbers(made) - saved,
        forward_all_reduce=sums[0],
        backward_all_reduce=sums[1],
    )


def _count_sums(
    module: nn.Module, how: shard.Split, forward: list[int], backward: list[int]
) -> Any:
    """Note the sizes of what the tensor ranks sum, when the module runs."""

    def note(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(how, (shard.Row, shard.Vocabulary)):
            forward.append(output.numel() * output.element_size())
        elif isinstance(how, shard.VocabularyLoss):
            # Maximum, sum of exponentials and the target's logit of each token.
            forward.extend([args[1].numel() * output.element_size()] * 3)
        else:
            backward.append(args[0].numel() * args[0].element_size())

    return module.register_forward_hook(note)


def per_row(runs: list[Run]) -> Amounts:
    """The amounts that grow with the rows, from runs with `ROWS` rows.

    Workspace: the most bytes alive at any moment beyond the saved ones.
    """
    few, many = runs
    rows = ROWS[1] - ROWS[0]
    sizes = [(b - a) / rows for a, b in zip(few.births, many.births, strict=True)]
    saved = sum(sizes[number] for number in few.saved)
    forward_peak = peak(few.forward_events, sizes, set())
    backward_peak = peak(few.backward_events, sizes, few.outputs)

    def slope(name: str) -> float:
        return float((getattr(many, name) - getattr(few, name)) / rows)

    def slopes(name: str) -> tuple[float, ...]:
        pairs = zip(getattr(few, name), getattr(many, name), strict=True)
        return tuple((b - a) / rows for a, b in pairs)

    return Amounts(
        forward_flops=slope("flops"),
        attention_flops=slope("attention_flops"),
        backward_flops=slope("backward_flops"),
        traffic_bytes=slope("traffic"),
        saved_bytes=saved,
        workspace_bytes=max(forward_peak, backward_peak, saved) - saved,
        forward_all_reduce_bytes=slopes("forward_all_reduce"),
        backward_all_reduce_bytes=slopes("backward_all_reduce"),
    )
