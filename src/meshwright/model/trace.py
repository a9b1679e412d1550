"""Builds the LayerGraph of any nn.Module by running each layer on fake tensors (no storage).

Every layer is run forward and backward with 2 rows and with 4 rows. The difference separates the
cost of a row from costs that do not depend on the number of rows (casts of weights, masks,
gradients of weights). Further runs, with the parameters that one of several tensor-parallel ranks
holds, show which part of the cost tensor parallelism divides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
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
    ROWS_OF_RUNS,
    LayerRun,
    RowCosts,
    costs_per_row,
)
from meshwright.model.graph import CrossingTensor, LayeredModel, LayerPart, cut
from meshwright.model.layer_record import layer_record, with_parameters
from meshwright.model.measure import TensorSpec, run_layer
from meshwright.model.spec import Layer, LayerGraph, Tied
from meshwright.model.spec import Tensor as Crossing
from meshwright.model.symbolic import linear_parameters
from meshwright.model.transformer.module_specs import ParameterSpec
from meshwright.techniques.tensor_parallel.model import dividing_axes, measured_widths


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
    batches = [tuple(_resized(tensor, rows) for tensor in inputs) for rows in ROWS_OF_RUNS]
    few, many = (cut(model, batch, precision) for batch in batches)
    shapes = [_shapes(cut_, batch) for cut_, batch in zip((few, many), batches, strict=True)]
    measured: dict[str, dict[int, RowCosts]] = {}
    layers: list[Layer] = []
    kept: set[tuple[str, int]] = set()
    for part, same in zip(few.layers, many.layers, strict=True):
        table = shard.splits(model, part.modules)
        table = {n: how for n, how in table.items() if _within(n, part.modules)}
        key = _structure(part, table, shapes[0])
        units = shard.tensor_units(model, part.modules)
        widths = measured_widths(units, table) if divided else (1,)
        known = measured.setdefault(key, {})
        new = [width for width in widths if width not in known]
        known |= _costs_by_width((part, same), shapes, precision, table, new)
        amounts = {width: known[width] for width in widths}
        kept |= {(name, len(layers)) for name, keeps in
                 zip(part.reads, amounts[1].keeps, strict=True) if keeps}  # fmt: skip
        flows = any(shapes[0][name][2] for name in part.reads)
        layers.append(_layer(part, few.tied, table, units, key, amounts, precision, flows=flows))
    return LayerGraph(
        name=name or type(model).__name__,
        sequence=sequence or (inputs[0].shape[1] if inputs[0].dim() > 1 else 1),
        precision=precision,
        layers=tuple(layers),
        tensors=_tensors(few, many, kept),
        tied=tuple(_tied(few, model, name) for name in few.tied),
    )


def _costs_by_width(
    parts: tuple[LayerPart, LayerPart],
    shapes: Sequence[dict[str, TensorSpec]],
    precision: Precision,
    table: dict[str, shard.Split],
    widths: Iterable[int],
) -> dict[int, RowCosts]:
    """Returns what a row of a layer costs on one rank, by tensor width; `parts` and `shapes` are
    those of a run with few rows and of one with many."""
    found = {}
    for width in widths:
        pairs = zip(parts, shapes, strict=True)
        runs = [_run(one, shape, precision, table, width) for one, shape in pairs]
        found[width] = costs_per_row(_alike(parts[0], runs))
    return found


def _run(
    part: LayerPart,
    shapes: dict[str, TensorSpec],
    precision: Precision,
    table: dict[str, shard.Split],
    width: int,
) -> LayerRun:
    try:
        return run_layer(part, shapes, precision, table, width)
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


def _alike(part: LayerPart, runs: list[LayerRun]) -> tuple[LayerRun, LayerRun]:
    steps = [len(one.births) for one in runs]
    if len(set(steps)) > 1:
        one, other = ROWS_OF_RUNS
        found = f"{steps[0]} tensors made with {one} rows, {steps[1]} with {other}"
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


def _shapes(layered: LayeredModel, batch: tuple[Tensor, ...]) -> dict[str, TensorSpec]:
    shapes: dict[str, TensorSpec] = {
        name: (tuple(tensor.shape), tensor.dtype, False)
        for name, tensor in zip(layered.inputs, batch, strict=True)
    }
    return shapes | {t.name: (t.shape, t.dtype, t.gradient) for t in layered.tensors}


def _within(name: str, modules: tuple[str, ...]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _structure(
    part: LayerPart, table: dict[str, shard.Split], shapes: dict[str, TensorSpec]
) -> str:
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
    amounts: dict[int, RowCosts],
    precision: Precision,
    *,
    flows: bool,
) -> Layer:
    """Makes the Layer of a part; `flows` tells if a gradient arrives from an earlier layer's
    output."""
    signature = hashlib.sha256(key.encode()).hexdigest()[:12]
    parameters = _parameters(part, table)
    record = layer_record(part.name, signature, units, amounts, parameters)
    return replace(
        with_parameters(record, [p for p in parameters if p.name not in tied]),
        constant_bytes=_constant_bytes(part, precision),
        has_backward=flows or any(p.requires_grad for p in part.module.parameters()),
    )


def _parameters(part: LayerPart, table: dict[str, shard.Split]) -> list[ParameterSpec]:
    """Lists the layer's parameters of floating-point numbers, tied ones included."""
    linear = {id(owner.get_parameter(name)) for owner, name in linear_parameters(part.module)}
    return [
        ParameterSpec(
            part.parameters[name],
            tuple(parameter.shape),
            table.get(name.rpartition(".")[0]),
            linear=id(parameter) in linear,
            trained=parameter.requires_grad,
        )
        for name, parameter in part.module.named_parameters()
        if parameter.is_floating_point()
    ]


def _constant_bytes(part: LayerPart, precision: Precision) -> float:
    """Counts the bytes of buffers and of frozen integers (quantized weights)."""
    frozen = [p for p in part.module.parameters() if not p.requires_grad]
    constants = [*part.module.buffers(), *(p for p in frozen if not p.is_floating_point())]
    width = 8 if precision == "fp64" else 4
    return float(
        sum(t.numel() * (width if t.is_floating_point() else t.element_size()) for t in constants)
    )


def _tensors(
    few: LayeredModel, many: LayeredModel, kept: set[tuple[str, int]]
) -> tuple[Crossing, ...]:
    def size(tensor: CrossingTensor) -> int:
        return prod(tensor.shape) * tensor.dtype.itemsize

    return tuple(
        Crossing(
            name=a.name,
            bytes=(size(b) - size(a)) / (ROWS_OF_RUNS[1] - ROWS_OF_RUNS[0]),
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
    split = shard.splits(model, modules).get(name.rpartition(".")[0])
    return Tied(
        name=name,
        layers=layers,
        parameters=parameter.numel() if parameter.requires_grad else 0,
        frozen_parameters=0 if parameter.requires_grad else parameter.numel(),
        divided=dividing_axes(ParameterSpec(name, tuple(parameter.shape), split)),
    )
