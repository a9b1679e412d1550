"""The LayerGraph of a transformer by counting, without torch."""

from __future__ import annotations

from math import prod

from meshwright.cluster.spec import Precision
from meshwright.model.amounts import (
    ROWS,
    Amounts,
    Run,
    first_width,
    per_row,
    widths_run,
    worst_moments,
)
from meshwright.model.config import LanguageModel
from meshwright.model.shard import Split, held
from meshwright.model.spec import Layer, LayerGraph, Tensor, Tied
from meshwright.model.transformer.counted import INDEX, Counted, Parameter
from meshwright.model.transformer.network import LayerOf, inputs_of, layers_of, tied_parameters
from meshwright.model.transformer.usual import made_of
from meshwright.records import fingerprint

SIZES: dict[Precision, tuple[int, int]] = {
    "fp64": (8, 8),
    "fp32": (4, 4),
    "fp16": (2, 4),
    "bf16": (2, 4),
}
"""Bytes of an activation, and of a weight."""


def counted_graph(c: LanguageModel, sequence: int, precision: Precision) -> LayerGraph:
    """The planner's view of a model that has an architecture."""
    layers = layers_of(c)
    tied = tied_parameters(c)
    index = {layer.name: number for number, layer in enumerate(layers)}
    known: dict[str, tuple[Layer, dict[str, bool], float]] = {}
    made: list[Layer] = []
    kept: set[tuple[str, int]] = set()
    sizes: list[float] = []
    for number, layer in enumerate(layers):
        if layer.kind not in known:
            known[layer.kind] = _counted(layer, c, sequence, precision)
        one, keeps, out = known[layer.kind]
        made.append(_renamed(one, layer.name))
        sizes.append(out)
        kept |= {
            (name, number) for name, keep in zip(layer.reads, keeps.values(), strict=True) if keep
        }
    tensors = []
    for number, layer in enumerate(layers[:-1]):
        readers = tuple(n for n, each in enumerate(layers) if layer.name in each.reads)
        tensors.append(
            Tensor(
                name=layer.name,
                bytes=sizes[number],
                producer=number,
                consumers=readers,
                kept=(layer.name, readers[0]) in kept,
            )
        )
    del index
    return LayerGraph(
        name=c.name,
        sequence=sequence,
        precision=precision,
        layers=tuple(made),
        tensors=tuple(tensors),
        tied=_tied(layers, c, tied),
    )


def _renamed(layer: Layer, name: str) -> Layer:
    from dataclasses import replace

    return replace(layer, name=name)


def _run(
    layer: LayerOf, c: LanguageModel, rows: int, sequence: int, precision: Precision, width: int
) -> tuple[Run, Counted, int]:
    a, m = SIZES[precision]
    o = Counted(a=a, m=m, width=width)
    batch = inputs_of(c)
    given = [
        o.tape.leaf((rows, sequence), INDEX, gradient=False)
        if name in batch
        else o.tape.leaf((rows, sequence, c.width), a, gradient=True)
        for name in layer.reads
    ]
    result = layer.compute(o, *given)
    forward = (o.flops, o.attention_flops, o.tape.traffic, list(o.tape.events))
    size = result.bytes
    read = [each.storage.number for each in given]
    outputs = {result.storage.number} - o.tape.saved
    o.tape.backward([result])
    run = Run(
        flops=forward[0],
        attention_flops=forward[1],
        backward_flops=o.flops + o.attention_flops - forward[0] - forward[1],
        traffic=forward[2],
        births=o.tape.births,
        forward_events=forward[3],
        backward_events=list(o.tape.events),
        saved=o.tape.saved,
        outputs=outputs,
        casts=o.tape.casts,
        keeps=tuple(number in o.tape.saved for number in read),
        forward_all_reduce=o.forward_all_reduce,
        backward_all_reduce=o.backward_all_reduce,
    )
    return run, o, size


def _counted(
    layer: LayerOf, c: LanguageModel, sequence: int, precision: Precision
) -> tuple[Layer, dict[str, bool], float]:
    """A layer, whether it keeps each thing it reads, and the bytes of its output for each row."""
    runs = {1: [_run(layer, c, rows, sequence, precision, 1) for rows in ROWS]}
    parameters = runs[1][0][1].parameters
    table: dict[str, Split] = {p.name: p.split for p in parameters if p.split is not None}
    table |= runs[1][0][1].splits
    for width in widths_run(layer.units, table):
        if width > 1:
            runs[width] = [_run(layer, c, rows, sequence, precision, width) for rows in ROWS]
    amounts: dict[int, Amounts] = {
        w: per_row((few[0], many[0])) for w, (few, many) in sorted(runs.items())
    }
    few, many = runs[1]
    out = (many[2] - few[2]) / (ROWS[1] - ROWS[0])
    built = _layer(layer, c, parameters, table, amounts, sequence, precision)
    return built, dict(zip(layer.reads, amounts[1].keeps, strict=True)), out


def _layer(layer, c, parameters: list[Parameter], table, amounts, sequence, precision) -> Layer:
    whole = amounts[1]
    width = first_width(layer.units, table)
    share = amounts.get(width, whole)
    foreign = _tied_names(layer, c)
    own = [p for p in parameters if p.name not in foreign]
    left = _share_held(parameters, width)

    def divided(full: float, rest: float) -> float:
        return (full - rest) / (1 - left) if left < 1 else 0.0

    flops = whole.forward_flops + whole.attention_flops
    return Layer(
        name=layer.name,
        signature=fingerprint(
            [
                repr(made_of(c)),
                c.family,
                c.width,
                c.heads,
                c.kv_heads,
                c.head,
                c.hidden,
                c.experts,
                c.chosen,
                layer.kind,
                sequence,
                *([c.vocabulary, c.positions] if layer.units == 0 else []),
            ]
        ),
        forward_flops=whole.forward_flops,
        attention_flops=whole.attention_flops,
        backward_flops=whole.backward_flops,
        traffic_bytes=whole.traffic_bytes,
        parameters=sum(prod(p.shape) for p in own if p.trained),
        saved_bytes=whole.saved_bytes,
        workspace_bytes=whole.workspace_bytes,
        fixed_saved_bytes=whole.fixed_saved_bytes,
        cast_parameters=sum(prod(p.shape) for p in own if p.linear and p.trained),
        moments=worst_moments({1: whole}),
        tensor_moments=worst_moments({w: a for w, a in amounts.items() if w > 1})
        if share is not whole
        else (),
        tensor_units=layer.units,
        split_parameters=sum(prod(p.shape) for p in own if _is_divided(p)),
        split_flops=divided(flops, share.forward_flops + share.attention_flops),
        split_saved_bytes=divided(whole.saved_bytes, share.saved_bytes),
        forward_all_reduce_bytes=whole.forward_all_reduce_bytes,
        backward_all_reduce_bytes=whole.backward_all_reduce_bytes,
    )


def _tied_names(layer: LayerOf, c: LanguageModel) -> set[str]:
    """Of a layer's parameters, those that other layers have, too."""
    tied = tied_parameters(c)
    both = {*tied, *tied.values()}
    prefix = f"{layer.name}."
    return {name.removeprefix(prefix) for name in both if name.startswith(prefix)}


def _is_divided(p: Parameter) -> bool:
    return (
        p.split is not None and held(p.split, p.name.rpartition(".")[2], p.shape, 2, 0) is not None
    )


def _share_held(parameters: list[Parameter], width: int) -> float:
    full = own = 0
    for p in parameters:
        ranges = held(p.split, p.name.rpartition(".")[2], p.shape, width, 0) if p.split else None
        if ranges is not None:
            full += p.shape[ranges.dim]
            own += sum(last - first for first, last in ranges.ranges)
    return own / full if full else 1.0


def _tied(layers, c: LanguageModel, tied: dict[str, str]) -> tuple[Tied, ...]:
    by_first: dict[str, list[int]] = {}
    index = {layer.name: number for number, layer in enumerate(layers)}
    for own, first in tied.items():
        for name in (first, own):
            layer = max((n for n in index if name.startswith(f"{n}.")), key=len)
            by_first.setdefault(first, []).append(index[layer])
    width = made_of(c).embedding_width or c.width
    return tuple(
        Tied(
            name=name, layers=tuple(sorted(set(found))), parameters=c.vocabulary * width, split=True
        )
        for name, found in by_first.items()
    )
