"""Builds the LayerGraph of a transformer by counting its operations, without torch.

The result matches that of `model.trace` on the module of the zoo.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

from meshwright.cluster.spec import Precision
from meshwright.model.amounts import (
    ROWS_OF_RUNS,
    LayerRun,
    RowCosts,
    costs_per_row,
)
from meshwright.model.config import LanguageModel
from meshwright.model.layer_record import layer_record, with_parameters
from meshwright.model.shard import Split
from meshwright.model.spec import Layer, LayerGraph, Tensor, Tied
from meshwright.model.transformer.counted import Counted
from meshwright.model.transformer.defaults import architecture_of
from meshwright.model.transformer.layer_list import (
    LayerDescription,
    inputs_of,
    layers_of,
    tied_parameters,
    tokens_of,
)
from meshwright.model.transformer.module_specs import INDEX_BYTES, ParameterSpec
from meshwright.model.transformer.tape import Sized
from meshwright.records import fingerprint
from meshwright.techniques.tensor_parallel.model import dividing_axes, measured_widths

SIZES: Mapping[Precision, tuple[int, int]] = {
    "fp64": (8, 8),
    "fp32": (4, 4),
    "tf32": (4, 4),
    "fp16": (2, 4),
    "bf16": (2, 4),
}
"""Number of bytes of an activation and of a weight."""


@dataclass(frozen=True, slots=True)
class CountedJob:
    """Holds a model, and the sequence length and precision for which its costs are counted."""

    model: LanguageModel
    sequence: int
    precision: Precision


@dataclass(frozen=True, slots=True)
class CountedLayer:
    """Holds the cost of a layer as it was counted."""

    layer: Layer
    keeps: tuple[bool, ...]
    """For each input of the layer, True if it is saved for the backward."""
    output_bytes: float
    """Size of the output per row."""
    parameters: tuple[ParameterSpec, ...]


def counted_graph(c: LanguageModel, sequence: int, precision: Precision) -> LayerGraph:
    """Builds the LayerGraph of a GPT-2, Llama, Mixtral or any model with an architecture."""
    job = CountedJob(c, sequence, precision)
    layers = layers_of(c)
    known: dict[str, CountedLayer] = {}
    for layer in layers:
        if layer.kind not in known:
            known[layer.kind] = _counted(layer, job)
    found = [known[layer.kind] for layer in layers]
    own = _owned(layers, found, c)
    return LayerGraph(
        name=c.name,
        sequence=sequence,
        precision=precision,
        layers=tuple(
            with_parameters(replace(each.layer, name=layer.name), own[number])
            for number, (layer, each) in enumerate(zip(layers, found, strict=True))
        ),
        tensors=_tensors(layers, found),
        tied=_tied(layers, found, c),
    )


def _tensors(layers: tuple[LayerDescription, ...], found: list[CountedLayer]) -> tuple[Tensor, ...]:
    readers = [
        tuple(n for n, each in enumerate(layers) if layer.name in each.reads) for layer in layers
    ]
    kept = [dict(zip(layer.reads, each.keeps, strict=True)) for layer, each in
            zip(layers, found, strict=True)]  # fmt: skip
    return tuple(
        Tensor(
            name=layer.name,
            bytes=found[number].output_bytes,
            producer=number,
            consumers=readers[number],
            kept=kept[readers[number][0]][layer.name],
        )
        for number, layer in enumerate(layers[:-1])
    )


def layer_inputs(
    o: Counted, layer: LayerDescription, c: LanguageModel, rows: int, sequence: int
) -> list[Sized]:
    """Makes the abstract inputs of a layer."""
    batch = {each.name: each for each in inputs_of(c, sequence)}
    given = []
    for name in layer.reads:
        if name in batch:
            own = batch[name]
            size = INDEX_BYTES if own.index else o.m
            given.append(o.tape.leaf((rows, *own.shape), size, gradient=False))
        else:
            shape = (rows, tokens_of(c, name, sequence), c.width)
            given.append(o.tape.leaf(shape, o.a, gradient=True))
    return given


def _run(
    layer: LayerDescription, job: CountedJob, rows: int, width: int
) -> tuple[LayerRun, Counted, int]:
    """Counts forward and backward on rank 0 of `width` tensor-parallel ranks. Also gives the
    counter, and the bytes of the output."""
    a, m = SIZES[job.precision]
    o = Counted(a=a, m=m, width=width)
    given = layer_inputs(o, layer, job.model, rows, job.sequence)
    result = layer.compute(o, *given)
    flops, attention, traffic = o.flops, o.attention_flops, o.tape.traffic
    events = list(o.tape.events)
    outputs = {result.storage.number} - o.tape.saved
    o.tape.backward([result])
    run = LayerRun(
        flops=flops,
        attention_flops=attention,
        backward_flops=o.flops + o.attention_flops - flops - attention,
        traffic=traffic,
        births=o.tape.births,
        forward_events=events,
        backward_events=list(o.tape.events),
        saved=o.tape.saved,
        outputs=outputs,
        casts=o.tape.casts,
        keeps=tuple(each.storage.number in o.tape.saved for each in given),
        forward_all_reduce=o.forward_all_reduce,
        backward_all_reduce=o.backward_all_reduce,
    )
    return run, o, result.bytes


def _counted(layer: LayerDescription, job: CountedJob) -> CountedLayer:
    few, many = (_run(layer, job, rows, 1) for rows in ROWS_OF_RUNS)
    parameters, splits = few[1].parameters, few[1].splits
    table: dict[str, Split] = {p.name: p.split for p in parameters if p.split is not None}
    table |= splits
    amounts: dict[int, RowCosts] = {1: costs_per_row((few[0], many[0]))}
    for width in measured_widths(layer.units, table):
        if width > 1:
            one, two = (_run(layer, job, rows, width)[0] for rows in ROWS_OF_RUNS)
            amounts[width] = costs_per_row((one, two))
    record = layer_record(layer.name, _signature(layer, job), layer.units, amounts, parameters)
    constants = float(few[1].constants * SIZES[job.precision][1])
    return CountedLayer(
        layer=replace(record, constant_bytes=constants),
        keeps=amounts[1].keeps,
        output_bytes=(many[2] - few[2]) / (ROWS_OF_RUNS[1] - ROWS_OF_RUNS[0]),
        parameters=tuple(parameters),
    )


def _signature(layer: LayerDescription, job: CountedJob) -> str:
    """Identifies what a layer computes. A block's signature does not depend on the model's number
    of layers, vocabulary or positions."""
    c = job.model
    sizes = [c.width, c.heads, c.kv_heads, c.head, c.hidden, c.experts, c.chosen]
    outer = [] if layer.kind.startswith("block") else [c.vocabulary, c.positions]
    return fingerprint([repr(architecture_of(c)), layer.kind, job.sequence, *sizes, *outer])


def _owned(
    layers: tuple[LayerDescription, ...], found: list[CountedLayer], c: LanguageModel
) -> list[tuple[ParameterSpec, ...]]:
    """Gives for each layer the parameters that are not tied to those of another layer."""
    tied = tied_parameters(c)
    both = {*tied, *tied.values()}
    return [
        tuple(p for p in each.parameters if f"{layer.name}.{p.name}" not in both)
        for layer, each in zip(layers, found, strict=True)
    ]


def _tied(
    layers: tuple[LayerDescription, ...], found: list[CountedLayer], c: LanguageModel
) -> tuple[Tied, ...]:
    """Lists the tied parameters, in the order of the first layer that has each."""
    places = {
        f"{layer.name}.{p.name}": (number, p)
        for number, (layer, each) in enumerate(zip(layers, found, strict=True))
        for p in each.parameters
    }
    users: dict[str, set[int]] = {}
    for own, first in tied_parameters(c).items():
        users.setdefault(first, {places[first][0]}).add(places[own][0])
    return tuple(
        Tied(
            name=name,
            layers=tuple(sorted(users[name])),
            parameters=prod(places[name][1].shape),
            divided=dividing_axes(places[name][1]),
        )
        for name in sorted(users, key=lambda name: places[name][0])
    )
