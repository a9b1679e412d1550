"""Builds the LayerGraph of any nn.Module by running each layer on fake tensors (no storage).

Every layer is run forward and backward with 2 rows and with 4 rows. The difference separates the
cost of a row from costs that do not depend on the number of rows (casts of weights, masks,
gradients of weights). Further runs, with the parameters that one of several tensor-parallel ranks
holds, show which part of the cost tensor parallelism divides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node, map_arg

from meshwright.cluster.spec import Precision
from meshwright.errors import ModelError, Problem
from meshwright.model import shard
from meshwright.model.amounts import (
    ROWS,
    Amounts,
    Run,
    first_width,
    per_row,
    widths_run,
    worst_moments,
)
from meshwright.model.graph import CrossingTensor, LayeredModel, LayerPart, cut
from meshwright.model.measure import Shape, run
from meshwright.model.spec import Layer, LayerGraph, Tied
from meshwright.model.spec import Tensor as Crossing
from meshwright.model.symbolic import linear_parameters


def trace(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    precision: Precision = "fp32",
    sequence: int | None = None,
    name: str | None = None,
    *,
    divided: bool = True,
) -> LayerGraph:
    """Builds the LayerGraph of a model whose forward takes a batch and returns its mean loss.

    `inputs` is an example batch: dimension 0 of every tensor counts rows. Model and inputs may be
    on the meta device. `sequence` is by default the second dimension of the first input. Traffic is
    the sum of what all operations of the forward read and write; only attention and RMS
    normalisation are counted as fused. FLOPs are those of matrix products. Parameters that need no
    gradient are counted as frozen. `divided=False` skips the runs for tensor parallelism, which
    take most of the time; the amounts that it divides are then 0. Raises ModelError.
    """
    _check_rows(model, inputs)
    batches = [tuple(_resized(tensor, rows) for tensor in inputs) for rows in ROWS]
    few, many = (cut(model, batch, precision) for batch in batches)
    shapes = [_shapes(cut_, batch) for cut_, batch in zip((few, many), batches, strict=True)]
    measured: dict[tuple[str, int], Amounts] = {}
    layers: list[Layer] = []
    kept: set[tuple[str, int]] = set()
    for part, same in zip(few.layers, many.layers, strict=True):
        table = shard.splits(model, part.modules)
        table = {n: how for n, how in table.items() if _within(n, part.modules)}
        key = _structure(part, table, shapes[0])

        units = shard.tensor_units(model, part.modules)
        widths = widths_run(units, table) if divided else (1,)
        for width in widths:
            if (key, width) not in measured:
                pairs = zip((part, same), shapes, strict=True)
                runs = [_run(one, shape, precision, table, width) for one, shape in pairs]
                measured[key, width] = per_row(_alike(part, runs))
        amounts = {width: measured[key, width] for width in widths}
        kept |= {(name, len(layers)) for name, keeps in
                 zip(part.reads, amounts[1].keeps, strict=True) if keeps}  # fmt: skip
        layer = _layer(part, few.tied, table, units, key, amounts)
        flows = any(p.requires_grad for p in part.module.parameters()) or any(
            shapes[0][name][2] for name in part.reads
        )
        layers.append(_with_frozen(layer, part, few.tied, table, precision, flows=flows))
    return LayerGraph(
        name=name or type(model).__name__,
        sequence=sequence or (inputs[0].shape[1] if inputs[0].dim() > 1 else 1),
        precision=precision,
        layers=tuple(layers),
        tensors=_tensors(few, many, kept),
        tied=tuple(_tied(few, model, name) for name in few.tied),
    )


def _run(
    part: LayerPart,
    shapes: dict[str, Shape],
    precision: Precision,
    table: dict[str, shard.Split],
    width: int,
) -> Run:
    try:
        return run(part, shapes, precision, table, width)
    except RuntimeError as failure:
        if width == 1:
            raise
        # The undivided layer has just run, so the tensor_split table does not fit the module.
        raise ModelError(
            Problem(
                part.name,
                "tensor_split",
                f"a layer that fails with the parameters of one of {width} tensor ranks "
                f"({str(failure).splitlines()[0][:120]})",
                "every Column's output to meet a Row inside the layer, sizes taken from tensors",
                "mend the table, or set tensor_units = 1 to leave the layer whole",
            )
        ) from failure


def _alike(part: LayerPart, runs: list[Run]) -> tuple[Run, Run]:
    steps = [len(one.births) for one in runs]
    if len(set(steps)) > 1:
        found = f"{steps[0]} tensors made with {ROWS[0]} rows, {steps[1]} with {ROWS[1]}"
        wanted = "the same steps for every number of rows"
        mend = "take out what branches on the number of rows"
        raise ModelError(Problem(part.name, "forward", found, wanted, mend))
    few, many = runs
    return few, many


def _check_rows(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    found = {tensor.shape[0] if tensor.dim() else 0 for tensor in inputs}
    if len(found) != 1 or 0 in found:
        sizes = ", ".join(str(tuple(tensor.shape)) for tensor in inputs)
        raise ModelError(
            Problem(
                type(model).__name__,
                "inputs",
                f"tensors of shapes {sizes}" if inputs else "no tensors",
                "tensors whose dimension 0 is the row of the batch",
            )
        )


def _resized(tensor: Tensor, rows: int) -> Tensor:
    return torch.empty((rows, *tensor.shape[1:]), dtype=tensor.dtype, device="meta")


def _shapes(layered: LayeredModel, batch: tuple[Tensor, ...]) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {
        name: (tuple(tensor.shape), tensor.dtype, False)
        for name, tensor in zip(layered.inputs, batch, strict=True)
    }
    return shapes | {t.name: (t.shape, t.dtype, t.gradient) for t in layered.tensors}


def _within(name: str, modules: tuple[str, ...]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _structure(part: LayerPart, table: dict[str, shard.Split], shapes: dict[str, Shape]) -> str:
    """Describes a layer as text; layers with the same computation and shapes give the same text."""
    short = {name: str(number) for number, name in enumerate(part.modules)}

    def local(name: str) -> str:
        owner = next((m for m in part.modules if name == m or name.startswith(f"{m}.")), "")
        return short[owner] + name[len(owner) :] if owner else name

    assert isinstance(part.module, GraphModule)
    order = {node: number for number, node in enumerate(part.module.graph.nodes)}
    number: Callable[[Node], Any] = order.__getitem__
    steps = [
        (n.op, local(str(getattr(n.target, "__name__", n.target))),
         str(map_arg(n.args, number)), str(map_arg(n.kwargs, number)))
        for n in order if n.op != "placeholder"
    ]  # fmt: skip
    modules = [
        (local(name), type(module).__qualname__, _settings(module), _own_shapes(module))
        for leaf in part.modules
        for name, module in part.module.get_submodule(leaf).named_modules(prefix=leaf)
    ]
    splits = sorted((local(name), str(how)) for name, how in table.items())
    return str((steps, modules, splits, [shapes[name] for name in part.reads]))


def _settings(module: nn.Module) -> str:
    plain = (int, float, str, bool, tuple)
    return str(sorted((k, v) for k, v in vars(module).items() if isinstance(v, plain)))


def _own_shapes(module: nn.Module) -> str:
    named = module.named_parameters(recurse=False)
    return str([(name, tuple(p.shape), p.requires_grad) for name, p in named])


def _layer(
    part: LayerPart,
    tied: dict[str, tuple[int, ...]],
    table: dict[str, shard.Split],
    units: int,
    key: str,
    amounts: dict[int, Amounts],
) -> Layer:
    whole = amounts[1]
    share = amounts.get(first_width(units, table), whole)
    own = _numbers(part, lambda name: name not in tied)
    split = _numbers(part, lambda name: name not in tied, table)
    left = _share_held(part, table, first_width(units, table))

    def divided(full: float, rest: float) -> float:
        return (full - rest) / (1 - left) if left < 1 else 0.0

    flops = whole.forward_flops + whole.attention_flops
    return Layer(
        name=part.name,
        signature=hashlib.sha256(key.encode()).hexdigest()[:12],
        forward_flops=whole.forward_flops,
        attention_flops=whole.attention_flops,
        backward_flops=whole.backward_flops,
        traffic_bytes=whole.traffic_bytes,
        parameters=own,
        saved_bytes=whole.saved_bytes,
        workspace_bytes=whole.workspace_bytes,
        fixed_saved_bytes=whole.fixed_saved_bytes,
        cast_parameters=_cast(part, tied),
        moments=worst_moments({1: whole}),
        tensor_moments=worst_moments({w: a for w, a in amounts.items() if w > 1})
        if share is not whole
        else (),
        tensor_units=units,
        split_parameters=split,
        split_flops=divided(flops, share.forward_flops + share.attention_flops),
        split_saved_bytes=divided(whole.saved_bytes, share.saved_bytes),
        forward_all_reduce_bytes=whole.forward_all_reduce_bytes,
        backward_all_reduce_bytes=whole.backward_all_reduce_bytes,
    )


def _with_frozen(
    layer: Layer,
    part: LayerPart,
    tied: dict[str, tuple[int, ...]],
    table: dict[str, shard.Split],
    precision: Precision,
    *,
    flows: bool,
) -> Layer:
    """Adds frozen parameters and constants to a layer; `flows` tells if it has a backward."""
    frozen = [p for p in part.module.parameters() if not p.requires_grad]
    constants = [*part.module.buffers(), *(p for p in frozen if not p.is_floating_point())]
    width = 8 if precision == "fp64" else 4
    return replace(
        layer,
        frozen_parameters=_numbers(part, lambda name: name not in tied, trained=False),
        split_frozen=_numbers(part, lambda name: name not in tied, table, trained=False),
        cast_frozen=_cast(part, tied, trained=False),
        constant_bytes=float(
            sum(
                t.numel() * (width if t.is_floating_point() else t.element_size())
                for t in constants
            )
        ),
        has_backward=flows,
    )


def _numbers(
    part: LayerPart,
    wanted: Callable[[str], bool],
    table: dict[str, shard.Split] | None = None,
    *,
    trained: bool = True,
) -> int:
    """Counts the numbers in the wanted parameters that are trained (or frozen, if not `trained`);
    with a table, only those that the table divides."""
    return sum(
        parameter.numel()
        for name, parameter in part.module.named_parameters()
        if parameter.requires_grad is trained
        and parameter.is_floating_point()
        and wanted(part.parameters[name])
        and (table is None or _is_divided(name, parameter, table))
    )


def _cast(part: LayerPart, tied: dict[str, tuple[int, ...]], *, trained: bool = True) -> int:
    """Counts the layer's own numbers, trained or frozen, that 16-bit precision casts every step."""
    linear = {id(owner.get_parameter(name)) for owner, name in linear_parameters(part.module)}
    named = part.module.named_parameters()
    return sum(
        parameter.numel()
        for name, parameter in named
        if id(parameter) in linear
        and parameter.requires_grad is trained
        and part.parameters[name] not in tied
    )


def _is_divided(name: str, parameter: Tensor, table: dict[str, shard.Split]) -> bool:
    module, _, own = name.rpartition(".")
    how = table.get(module)
    return how is not None and shard.held(how, own, tuple(parameter.shape), 2, 0) is not None


def _share_held(part: LayerPart, table: dict[str, shard.Split], width: int) -> float:
    """Gives the share of the divided weights that rank 0 of `width` holds: 1 / width, or slightly
    more if the vocabulary is not a multiple of `width`."""
    full = held = 0
    for name, parameter in part.module.named_parameters():
        module, _, own = name.rpartition(".")
        shape = tuple(parameter.shape)
        ranges = shard.held(table[module], own, shape, width, 0) if module in table else None
        if ranges is not None:
            full += shape[ranges.dim]
            held += sum(last - first for first, last in ranges.ranges)
    return held / full if full else 1.0


def _tensors(
    few: LayeredModel, many: LayeredModel, kept: set[tuple[str, int]]
) -> tuple[Crossing, ...]:
    def size(tensor: CrossingTensor) -> int:
        return prod(tensor.shape) * tensor.dtype.itemsize

    return tuple(
        Crossing(
            name=a.name,
            bytes=(size(b) - size(a)) / (ROWS[1] - ROWS[0]),
            producer=a.producer,
            consumers=a.consumers,
            gradient=a.gradient,
            kept=(a.name, a.consumers[0]) in kept,
        )
        for a, b in zip(few.tensors, many.tensors, strict=True)
    )


def _tied(layered: LayeredModel, model: nn.Module, name: str) -> Tied:
    layers = layered.tied[name]
    parameter = model.get_parameter(name)
    modules = tuple(m for layer in layers for m in layered.layers[layer].modules)
    return Tied(
        name=name,
        layers=layers,
        parameters=parameter.numel() if parameter.requires_grad else 0,
        frozen_parameters=0 if parameter.requires_grad else parameter.numel(),
        split=_is_divided(name, parameter, shard.splits(model, modules)),
    )
