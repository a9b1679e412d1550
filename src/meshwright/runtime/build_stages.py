"""Builds one rank's stages: allocates and initialises its own layers, and no others."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from meshwright.cluster.spec import Precision
from meshwright.errors import ModelError, PlanError, Problem
from meshwright.layout.shares import Share, own_share
from meshwright.layout.tiles import Tile
from meshwright.model.graph import CrossingTensor, LayeredModel, LayerPart, cut
from meshwright.model.shard import Split, splits, tile_of
from meshwright.plan.ranks import StagePlacement
from meshwright.records import record
from meshwright.runtime.parameters import Parameter
from meshwright.runtime.seeds import initial_seed
from meshwright.runtime.slices import read_slices
from meshwright.techniques.activation_checkpointing.model import recomputed
from meshwright.techniques.tensor_parallel.runtime import TensorParallelGroup, divide


@record
class BoundaryTensor:
    """Describes a tensor that crosses a stage boundary, as one rank sees it."""

    name: str
    shape: tuple[int, ...]
    """Shape with this rank's number of rows."""
    dtype: torch.dtype
    gradient: bool
    """True if a gradient comes back for it."""
    by_rows: bool
    """False for a tensor that is the same for all rows (positions, masks) and is sent whole."""


@dataclass(slots=True)
class LocalParameter:
    """Holds one parameter, or the tile of it that belongs to this rank."""

    of: Parameter
    """The whole parameter."""
    tile: Tile
    parameter: nn.Parameter
    layers: tuple[int, ...]
    """Numbers of this rank's layers that use it."""

    @property
    def name(self) -> str:
        """Returns the name in the model, such as `blocks.0.attention.output.weight`."""
        return self.of.name


@dataclass(slots=True)
class BuiltStage:
    """Holds the layers of one stage on one rank, ready to run."""

    inputs: tuple[str, ...]
    """Names of the batch's tensors."""
    parts: tuple[LayerPart, ...]
    incoming: tuple[BoundaryTensor, ...]
    outgoing: tuple[BoundaryTensor, ...]
    local_parameters: tuple[LocalParameter, ...]
    recomputed: tuple[bool, ...]
    """One flag for each part: True if its forward is repeated during the backward."""


@dataclass(slots=True)
class _ParameterUse:
    """Says where a module uses a parameter."""

    owner: nn.Module
    attribute: str
    module: str
    layer: int
    name: str


def set_precision(model: nn.Module, precision: Precision) -> None:
    """Converts the weights to float64 for fp64, else to float32: low-precision copies are cast from
    these master weights. For tf32, lets CUDA's matrix products round their factors."""
    if precision == "tf32":
        torch.backends.cuda.matmul.allow_tf32 = True
    wanted = torch.float64 if precision == "fp64" else torch.float32
    tensors = [*model.parameters(), *model.buffers()]
    if any(t.is_floating_point() and t.dtype != wanted for t in tensors):
        model.to(wanted)


def with_rows(inputs: tuple[Tensor, ...], rows: int) -> tuple[Tensor, ...]:
    """Returns meta tensors that stand in for a batch with this number of rows."""
    return tuple(
        torch.empty((rows, *tensor.shape[1:]), dtype=tensor.dtype, device="meta")
        for tensor in inputs
    )


def cut_for(
    model: nn.Module, inputs: tuple[Tensor, ...], precision: Precision, rows: int
) -> tuple[LayeredModel, LayeredModel]:
    """Cuts the model for `rows` rows, and again for one row more: tensors between layers whose
    shape differs between the two have rows."""
    few, more = (cut(model, with_rows(inputs, n), precision) for n in (rows, rows + 1))
    return few, more


def build_stages(
    model: nn.Module,
    cuts: tuple[LayeredModel, LayeredModel],
    parameters: Mapping[str, Parameter],
    stages: Sequence[StagePlacement],
    *,
    seed: int,
    device: torch.device,
    tensor_group: TensorParallelGroup | None,
) -> tuple[BuiltStage, ...]:
    """Allocates the layers of one rank on its device, and divides them among its tensor-parallel
    group.

    `parameters` are those of the whole model, and `stages` are in layer order. A parameter that
    several of them use becomes one nn.Parameter, and one LocalParameter, that they share.

    A module on the meta device gets storage, then its own `reset_parameters()` under a seed that
    depends on its name alone; real weights are kept. Raises ModelError for a module on meta that
    has no such method, PlanError for one that cannot be divided.
    """
    layered, more = cuts
    layers = {n: layered.layers[n] for stage in stages for n in range(*stage.layers)}
    group = tensor_group
    own = own_share(1, 0) if group is None else own_share(group.width, group.index)
    table = _table(model, tuple(layers.values()))
    division = _ParameterDivision(parameters=parameters, team=tensor_group, own=own, table=table)
    shared: dict[str, nn.Parameter] = {}
    unreal: list[_ParameterUse] = []
    # Layer by layer, so that at most one layer is ever held unsliced.
    for number, part in layers.items():
        for name in part.modules:
            allocate(model.get_submodule(name), name, seed, device)
        places = list(_places(part, number))
        _share_tied(model, layered, places, shared, seed, device)
        unreal += (p for p in places if p.owner.get_parameter(p.attribute).is_meta)
        part.module.to(device)
        for place in places:
            _divide(division, place)
    _check_real(unreal)
    if tensor_group is not None:
        for name, split in division.table.items():
            size = division.sizes.get(name, 0)
            divide(model.get_submodule(name), name, split, size, tensor_group)
    held = tuple(division.held.values())
    return tuple(_built(stage, layered, more, held) for stage in stages)


def _built(
    stage: StagePlacement,
    layered: LayeredModel,
    more: LayeredModel,
    held: tuple[LocalParameter, ...],
) -> BuiltStage:
    """Returns one stage of a rank, with those of the rank's parameters that its layers use."""
    first, last = stage.layers
    return BuiltStage(
        inputs=layered.inputs,
        parts=layered.layers[first:last],
        incoming=_crossings(layered, more, first),
        outgoing=_crossings(layered, more, last),
        local_parameters=tuple(one for one in held if any(first <= n < last for n in one.layers)),
        recomputed=tuple(
            stage.plan_stage.recompute and recomputed(layer, len(layered.layers))
            for layer in range(first, last)
        ),
    )


def _crossings(layered: LayeredModel, more: LayeredModel, at: int) -> tuple[BoundaryTensor, ...]:
    def crosses(tensor: CrossingTensor) -> bool:
        return tensor.producer < at <= tensor.consumers[-1]

    return tuple(
        BoundaryTensor(
            name=tensor.name,
            shape=tensor.shape,
            dtype=tensor.dtype,
            gradient=tensor.gradient,
            by_rows=tensor.shape != other.shape,
        )
        for tensor, other in zip(layered.tensors, more.tensors, strict=True)
        if crosses(tensor)
    )


def allocate(leaf: nn.Module, name: str, seed: int, device: torch.device) -> None:
    """Gives a module on the meta device storage on `device`, and its initial values."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(initial_seed(seed, name))
        for inner, module in leaf.named_modules():
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            if any(tensor.is_meta for tensor in own):
                _reset(module, f"{name}.{inner}" if inner else name, device)


def _reset(module: nn.Module, name: str, device: torch.device) -> None:
    reset = getattr(module, "reset_parameters", None)
    if reset is None:
        raise ModelError(
            Problem(
                f"module {name}",
                "reset_parameters",
                f"none in {type(module).__name__}, whose tensors are on the meta device",
                "a method that sets the initial values",
                "add the method, or build the model with real weights",
            )
        )
    for own, parameter in module.named_parameters(recurse=False):
        empty = torch.empty_like(parameter, device=device)
        setattr(module, own, nn.Parameter(empty, requires_grad=parameter.requires_grad))
    for own, buffer in module.named_buffers(recurse=False):
        setattr(module, own, torch.empty_like(buffer, device=device))
    with torch.no_grad():
        reset()


def _places(part: LayerPart, layer: int) -> Iterator[_ParameterUse]:
    for local, name in part.parameters.items():
        module, _, attribute = local.rpartition(".")
        owner = part.module.get_submodule(module)
        yield _ParameterUse(owner=owner, attribute=attribute, module=module, layer=layer, name=name)


def _share_tied(
    model: nn.Module,
    layered: LayeredModel,
    places: list[_ParameterUse],
    shared: dict[str, nn.Parameter],
    seed: int,
    device: torch.device,
) -> None:
    """Makes one Parameter for each tied name, with the initial value that its first layer gives it.

    A rank that does not hold that first layer initialises a copy of its module to get the value.
    Layers are visited in order: the first one here that uses the parameter is the first of all, or
    that one is elsewhere.
    """
    for place in places:
        if place.name not in layered.tied:
            continue
        if place.name not in shared:
            own = place.owner.get_parameter(place.attribute)
            first = layered.tied[place.name][0]
            foreign = (
                None if first == place.layer else _foreign(model, layered.layers[first], place.name)
            )
            if foreign is not None:
                leaf, inside = foreign
                allocate(leaf, place.name.removesuffix(f".{inside}"), seed, device)
                own = leaf.get_parameter(inside)
            shared[place.name] = own
        setattr(place.owner, place.attribute, shared[place.name])


def _foreign(model: nn.Module, part: LayerPart, name: str) -> tuple[nn.Module, str] | None:
    """Copies another layer's module, still on meta, and returns it with the parameter's name inside
    it; None if the weights are real."""
    for leaf in part.modules:
        if name.startswith(f"{leaf}.") and model.get_parameter(name).is_meta:
            return copy.deepcopy(model.get_submodule(leaf)), name.removeprefix(f"{leaf}.")
    return None


def _check_real(unreal: list[_ParameterUse]) -> None:
    ModelError.check(
        Problem(
            "model",
            place.name,
            "a parameter on the meta device that no layer's module owns",
            "a module of its own with a `reset_parameters` method",
            "or build the model with real weights",
        )
        for place in unreal
    )


@dataclass(slots=True)
class _ParameterDivision:
    """Keeps the parameters of one rank that have been divided so far."""

    parameters: Mapping[str, Parameter]
    team: TensorParallelGroup | None
    own: Share
    table: dict[str, Split]
    held: dict[str, LocalParameter] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    """First dimension of each divided module's whole parameter, by module: its number of outputs,
    or its vocabulary."""


def _divide(division: _ParameterDivision, place: _ParameterUse) -> None:
    """Replaces a parameter by this rank's tile of it; one that is not divided stays whole."""
    tensor_group, own, whole = division.team, division.own, division.parameters[place.name]
    tile = whole.tile(own)
    split = division.table.get(place.module)
    if tensor_group is not None and tile_of(split, place.attribute, whole.shape, own) != tile:
        raise PlanError(
            Problem(
                f"parameter {place.name}",
                "tensor_split",
                f"two ways to divide it, one of them in {place.module}",
                "one way for all modules that share it",
            )
        )
    division.sizes[place.module] = whole.shape[0]
    known = division.held.get(place.name)
    if known is None:
        full = place.owner.get_parameter(place.attribute)
        if tensor_group is not None and whole.split is not None:
            full = nn.Parameter(read_slices(full.detach(), tile), requires_grad=full.requires_grad)
        known = division.held[place.name] = LocalParameter(
            of=whole, tile=tile, parameter=full, layers=()
        )
    known.layers = tuple(dict.fromkeys((*known.layers, place.layer)))
    setattr(place.owner, place.attribute, known.parameter)


def _table(model: nn.Module, parts: tuple[LayerPart, ...]) -> dict[str, Split]:
    modules = tuple(dict.fromkeys(name for part in parts for name in part.modules))
    table = splits(model, modules)
    inside = tuple(f"{module}." for module in modules)
    return {name: how for name, how in table.items() if f"{name}.".startswith(inside)}
