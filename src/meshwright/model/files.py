"""Reads models that are written by hand, layer by layer, as TOML files. Example:

name = "u-shape"

[[layer]]
name = "enc"                # count: enc0, enc1, enc2
count = 3
forward = "12 GFLOP"        # per row, like every amount; backward, if absent, is twice that
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

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from meshwright.cluster.spec import Precision
from meshwright.errors import ModelError, Problem
from meshwright.model.spec import Division, Layer, LayerGraph, Tensor, Tied
from meshwright.records import Bytes, Flops, Name, fingerprint, parse, read, record
from meshwright.units import format_flops

LayerName = Annotated[Name, Field(min_length=1)]
"""Name of a layer."""
FlopCount = Flops
"""A number of FLOP, not FLOP/s."""
Parameters = Annotated[int, Field(ge=0, le=10**15)]
Widths = Annotated[int, Field(ge=1, le=2**30)]
MOST_LAYERS = 10_000
"""Largest number of layers in a model; no published model has a tenth of it."""


@record
class LayerEntry:
    """Holds one table [[layer]] of a model file; amounts are per row."""

    name: LayerName
    count: Annotated[int, Field(ge=1, le=MOST_LAYERS)] | None = None
    forward: FlopCount
    attention: FlopCount = 0.0
    """FLOPs of attention, in addition to `forward`."""
    backward: FlopCount | None = None
    """If absent, 2 (forward + attention). With frozen parameters it is less: (1 + t) forward + 2
    attention, t being the trained fraction of the layer's own parameters. It is 0 if neither this
    layer nor one before it is trained."""
    parameters: Parameters = 0
    """Number of trained parameters."""
    frozen_parameters: Parameters | None = None
    """Number of parameters that are held and read but never trained: they have no gradient and no
    optimizer state."""
    output: Bytes = 0
    """Size of the output."""
    saved: Bytes | None = None
    """Bytes kept for the backward; if absent, the size of the output (0 without a backward)."""
    traffic: Bytes | None = None
    """Bytes that the forward reads and writes; if absent, those of the output and of what is
    saved."""
    workspace: Bytes = 0
    """Largest temporary memory beyond what is saved."""
    tensor_units: Widths = 1
    """Number that a legal tensor-parallel width must divide. Tensor parallelism divides the whole
    layer and all-reduces its output, and the gradient of its input."""


@record
class SkipEntry:
    """Holds one table [[skip]] of a model file: layer `to` reads the output of layer `from`."""

    from_: Annotated[Name, Field(alias="from")]
    to: Name
    bytes: Bytes | None = None
    """Size of a separate tensor from one to the other; if absent, `to` reads the same output as the
    layer after `from`."""


@record
class TiedEntry:
    """Holds one table [[tied]] of a model file: a parameter that several layers share, in addition
    to their own."""

    name: LayerName
    layers: Annotated[tuple[Name, ...], Field(min_length=2, max_length=MOST_LAYERS)]
    parameters: Annotated[Parameters, Field(ge=1)]
    split: bool = False
    """True if tensor parallelism divides it."""
    frozen: bool = False
    """True if it is held but never trained."""


@record
class ModelFile:
    """Holds the content of a hand-written model file."""

    name: Name
    layer: Annotated[tuple[LayerEntry, ...], Field(min_length=1, max_length=MOST_LAYERS)]
    skip: Annotated[tuple[SkipEntry, ...], Field(max_length=MOST_LAYERS)] = ()
    tied: Annotated[tuple[TiedEntry, ...], Field(max_length=MOST_LAYERS)] = ()


def load_file(path: Path, sequence: int, precision: Precision) -> LayerGraph:
    """Reads a hand-written model from a file. Raises ModelError with every mistake in it."""
    return model_from_table(read(path, error=ModelError), str(path), sequence, precision)


def model_from_table(
    table: dict[str, Any], source: str, sequence: int, precision: Precision
) -> LayerGraph:
    """Builds a hand-written model from its parsed TOML. Raises ModelError with every mistake."""
    file = parse(table, ModelFile, source=source, error=ModelError)
    many = sum(entry.count or 1 for entry in file.layer)
    if many > MOST_LAYERS:
        found, wanted = f"{many:,} layers", f"at most {MOST_LAYERS:,}"
        raise ModelError(Problem(source, "layer", found, wanted))
    names = [name for entry in file.layer for name in _names(entry)]
    index = {name: number for number, name in enumerate(names)}
    ModelError.check(_mistakes(file, names, index, source))
    flows = _flows(file, index)
    ModelError.check(_backwards_of_nothing(file, flows, source))
    layers = tuple(_layers(file, flows))
    return LayerGraph(
        name=file.name,
        sequence=sequence,
        precision=precision,
        layers=layers,
        tensors=tuple(
            replace(tensor, gradient=flows[tensor.producer])
            for tensor in _tensors(file, layers, index)
        ),
        tied=tuple(
            Tied(
                name=entry.name,
                layers=tuple(sorted(index[name] for name in entry.layers)),
                parameters=0 if entry.frozen else entry.parameters,
                frozen_parameters=entry.parameters if entry.frozen else 0,
                divided=("tensor",) if entry.split else (),
            )
            for entry in file.tied
        ),
    )


def _names(entry: LayerEntry) -> list[str]:
    return [f"{entry.name}{n}" for n in range(entry.count)] if entry.count else [entry.name]


def _flows(file: ModelFile, index: dict[str, int]) -> list[bool]:
    """Tells for each layer if a gradient reaches it: it trains a parameter, or reads the output of
    a layer that a gradient reaches. If the file declares nothing frozen, all layers have one."""
    entries = [entry for entry in file.layer for _ in _names(entry)]
    if not any(x.frozen_parameters for x in entries) and not any(t.frozen for t in file.tied):
        return [True] * len(entries)
    trained = {index[name] for tied in file.tied if not tied.frozen for name in tied.layers}
    skipped: dict[int, set[int]] = defaultdict(set)
    for skip in file.skip:
        skipped[index[skip.to]].add(index[skip.from_])
    found: list[bool] = []
    for number, entry in enumerate(entries):
        own = bool(entry.parameters) or number in trained
        before = {number - 1, *skipped[number]} - {-1}
        found.append(own or any(found[each] for each in before))
    return found


def _backwards_of_nothing(file: ModelFile, flows: list[bool], source: str) -> Iterator[Problem]:
    number = 0
    for place, entry in enumerate(file.layer):
        own = flows[number : number + len(_names(entry))]
        number += len(own)
        if entry.backward and not any(own):
            found = format_flops(entry.backward).removesuffix("/s")
            wanted = "nothing: here and before, all weights are frozen"
            yield Problem(source, f"layer[{place}].backward", found, wanted, "leave it out")


def _layers(file: ModelFile, flows: list[bool]) -> Iterator[Layer]:
    incoming, gradients = 0, iter(flows)
    before = False
    for entry in file.layer:
        signature = fingerprint(entry)
        for name in _names(entry):
            flow = next(gradients)
            kind = signature if flow else f"{signature}-forward"
            yield _layer(entry, name, kind, incoming if before else 0, flows=flow)
            incoming, before = entry.output, flow


def _backward(entry: LayerEntry) -> float:
    """Gives the backward FLOPs of a layer that a gradient reaches."""
    if entry.backward is not None:
        return entry.backward
    frozen = entry.frozen_parameters or 0
    if not frozen:
        return 2 * (entry.forward + entry.attention)
    trained = entry.parameters / (entry.parameters + frozen)
    return (1 + trained) * entry.forward + 2 * entry.attention


def _layer(entry: LayerEntry, name: str, signature: str, incoming: int, *, flows: bool) -> Layer:
    saved = (entry.output if flows else 0) if entry.saved is None else entry.saved
    moved = float(entry.output + saved if entry.traffic is None else entry.traffic)
    forward = entry.forward + entry.attention
    frozen = entry.frozen_parameters or 0
    return Layer(
        name=name,
        signature=signature,
        forward_flops=entry.forward,
        attention_flops=entry.attention,
        backward_flops=_backward(entry) if flows else 0.0,
        has_backward=flows,
        traffic_bytes=moved,
        parameters=entry.parameters,
        saved_bytes=float(saved),
        workspace_bytes=float(entry.workspace),
        cast_parameters=entry.parameters if forward else 0,
        frozen_parameters=frozen,
        cast_frozen=frozen if forward else 0,
        parallel=(_division(entry, saved, moved, incoming),),
    )


def _division(entry: LayerEntry, saved: int, moved: float, incoming: int) -> Division:
    """Tells what tensor ranks divide of a layer: all of it, or nothing."""
    if entry.tensor_units == 1:
        return Division(axis="tensor", units=1)
    return Division(
        axis="tensor",
        units=entry.tensor_units,
        parameters=entry.parameters,
        frozen_parameters=entry.frozen_parameters or 0,
        flops=entry.forward + entry.attention,
        traffic_bytes=moved,
        saved_bytes=float(saved),
        forward_all_reduce_bytes=(float(entry.output),),
        backward_all_reduce_bytes=(float(incoming),) if incoming else (),
    )


def _mistakes(
    file: ModelFile, names: list[str], index: dict[str, int], source: str
) -> Iterator[Problem]:
    for name, times in sorted(Counter(names).items()):
        if times > 1:
            wanted = "a name of its own for every layer"
            yield Problem(source, "layer", f"{name!r} {times} times", wanted)
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
    further: dict[str, set[int]] = defaultdict(set)
    for skip in file.skip:
        if skip.bytes is None:
            further[skip.from_].add(index[skip.to])
    for number, layer in enumerate(layers[:-1]):
        yield Tensor(
            name=layer.name,
            bytes=float(outputs[number]),
            producer=number,
            consumers=tuple(sorted({number + 1, *further[layer.name]})),
        )
    for skip in file.skip:
        if skip.bytes is not None:
            yield Tensor(
                name=f"{skip.from_}/{skip.to}",
                bytes=float(skip.bytes),
                producer=index[skip.from_],
                consumers=(index[skip.to],),
            )
