"""Models written by hand, layer by layer, as TOML.

name = "u-shape"

[[layer]]
name = "enc"                # count: enc0, enc1, enc2
count = 3
forward = "12 GFLOP"        # per row, as everything here; backward: twice that if absent
parameters = 4_000_000
output = "2 MiB"
saved = "9 MiB"             # the output's size if absent

[[layer]]
name = "dec"
...

[[skip]]                    # a further reader of a layer's output
from = "enc0"
to = "dec"

[[tied]]
name = "table"
layers = ["enc0", "dec"]
parameters = 1_000_000
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from meshwright.cluster.spec import Precision
from meshwright.errors import ModelError, Problem
from meshwright.model.spec import Layer, LayerGraph, Tensor, Tied
from meshwright.records import Bytes, Flops, fingerprint, parse, read, record

Count = Annotated[int, Field(ge=0)]
Size = Annotated[Bytes, Field(ge=0)]
Work = Annotated[Flops, Field(ge=0)]


@record
class LayerEntry:
    """One [[layer]]; amounts per row."""

    name: Annotated[str, Field(min_length=1)]
    count: Annotated[int, Field(ge=1)] | None = None
    forward: Work
    attention: Work = 0.0
    """FLOPs of attention, beside `forward`."""
    backward: Work | None = None
    parameters: Count = 0
    output: Size = 0
    saved: Size | None = None
    traffic: Size | None = None
    """Absent: the output and what is saved."""
    workspace: Size = 0
    tensor_units: Annotated[int, Field(ge=1)] = 1
    """Tensor widths that divide this are legal; all of the layer is divided, its output and its
    input's gradient are summed."""


@record
class SkipEntry:
    """One [[skip]]: layer `to` reads what layer `from` makes."""

    from_: Annotated[str, Field(alias="from")]
    to: str
    bytes: Size | None = None
    """Absent: the very output that the next layer reads. Given: another tensor of that size."""


@record
class TiedEntry:
    """One [[tied]]: a parameter of several layers, beside their own."""

    name: Annotated[str, Field(min_length=1)]
    layers: Annotated[tuple[str, ...], Field(min_length=2)]
    parameters: Annotated[int, Field(ge=1)]
    split: bool = False


@record
class ModelFile:
    """The whole file."""

    name: str
    layer: Annotated[tuple[LayerEntry, ...], Field(min_length=1)]
    skip: tuple[SkipEntry, ...] = ()
    tied: tuple[TiedEntry, ...] = ()


def load_file(path: Path, sequence: int, precision: Precision) -> LayerGraph:
    """A hand-written model. Raises ModelError with every mistake in the file."""
    return from_table(read(path, error=ModelError), str(path), sequence, precision)


def from_table(
    table: dict[str, Any], source: str, sequence: int, precision: Precision
) -> LayerGraph:
    """A hand-written model from its parsed TOML. Raises ModelError with every mistake."""
    file = parse(table, ModelFile, source=source, error=ModelError)
    layers = tuple(_layers(file))
    index = {layer.name: number for number, layer in enumerate(layers)}
    ModelError.check(_mistakes(file, layers, index, source))
    return LayerGraph(
        name=file.name,
        sequence=sequence,
        precision=precision,
        layers=layers,
        tensors=tuple(_tensors(file, layers, index)),
        tied=tuple(
            Tied(
                name=entry.name,
                layers=tuple(sorted(index[name] for name in entry.layers)),
                parameters=entry.parameters,
                split=entry.split,
            )
            for entry in file.tied
        ),
    )


def _names(entry: LayerEntry) -> list[str]:
    return [f"{entry.name}{n}" for n in range(entry.count)] if entry.count else [entry.name]


def _layers(file: ModelFile) -> Iterator[Layer]:
    incoming = 0
    for entry in file.layer:
        for name in _names(entry):
            yield _layer(entry, name, incoming)
            incoming = entry.output


def _layer(entry: LayerEntry, name: str, incoming: int) -> Layer:
    saved = entry.output if entry.saved is None else entry.saved
    forward = entry.forward + entry.attention
    divided = entry.tensor_units > 1
    return Layer(
        name=name,
        signature=fingerprint(entry),
        forward_flops=entry.forward,
        attention_flops=entry.attention,
        backward_flops=2 * forward if entry.backward is None else entry.backward,
        traffic_bytes=float(entry.output + saved if entry.traffic is None else entry.traffic),
        parameters=entry.parameters,
        saved_bytes=float(saved),
        workspace_bytes=float(entry.workspace),
        cast_parameters=entry.parameters if forward else 0,
        tensor_units=entry.tensor_units,
        split_parameters=entry.parameters if divided else 0,
        split_flops=forward if divided else 0.0,
        split_saved_bytes=float(saved) if divided else 0.0,
        forward_all_reduce_bytes=(float(entry.output),) if divided else (),
        backward_all_reduce_bytes=(float(incoming),) if divided and incoming else (),
    )


def _mistakes(
    file: ModelFile, layers: tuple[Layer, ...], index: dict[str, int], source: str
) -> Iterator[Problem]:
    names = [layer.name for layer in layers]
    for name in sorted({name for name in names if names.count(name) > 1}):
        wanted = "a name of its own for every layer"
        yield Problem(source, "layer", f"{name!r} {names.count(name)} times", wanted)
    known = f"one of {', '.join(names[:12])}" + (", ..." if len(names) > 12 else "")
    for number, skip in enumerate(file.skip):
        ends = {"from": skip.from_, "to": skip.to}
        unknown = {key: name for key, name in ends.items() if name not in index}
        for key, name in unknown.items():
            yield Problem(source, f"skip[{number}].{key}", repr(name), known)
        if not unknown and index[skip.from_] >= index[skip.to]:
            wanted = f"a layer after {skip.from_!r}"
            yield Problem(source, f"skip[{number}].to", repr(skip.to), wanted)
    for number, entry in enumerate(file.tied):
        for name in entry.layers:
            if name not in index:
                yield Problem(source, f"tied[{number}].layers", repr(name), known)
        if len(set(entry.layers)) < len(entry.layers):
            found = "a layer named twice"
            yield Problem(source, f"tied[{number}].layers", found, "different layers")


def _tensors(file: ModelFile, layers: tuple[Layer, ...], index: dict[str, int]) -> Iterator[Tensor]:
    outputs = [entry.output for entry in file.layer for _ in _names(entry)]
    for number, layer in enumerate(layers[:-1]):
        further = {index[s.to] for s in file.skip if s.from_ == layer.name and s.bytes is None}
        yield Tensor(
            name=layer.name,
            bytes=float(outputs[number]),
            producer=number,
            consumers=tuple(sorted({number + 1, *further})),
        )
    for skip in file.skip:
        if skip.bytes is not None:
            yield Tensor(
                name=f"{skip.from_}/{skip.to}",
                bytes=float(skip.bytes),
                producer=index[skip.from_],
                consumers=(index[skip.to],),
            )
