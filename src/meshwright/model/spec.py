"""Describes a model for the planner: layers in topological order and the tensors between them.

The planner, the cost model and the simulator see a model only as this graph. Every amount is per
row (one sample of the batch) unless its name says otherwise, at the sequence length and precision
that the graph was built for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from meshwright.cluster.spec import Precision
from meshwright.records import fingerprint, plain, record


@record
class Moment:
    """Counts the bytes that are allocated at one moment of a layer's forward or backward, less its
    saved activations (the difference may be negative).

    With r rows on each of t ranks that divide the layer these are

        fixed + split_fixed / t + r (row + split_row / t)
    """

    fixed: float = 0.0
    """Bytes that do not depend on the number of rows, such as gradients of weights before they are
    accumulated."""
    split_fixed: float = 0.0
    """The same, for bytes that the ranks divide."""
    row: float = 0.0
    """Bytes per row."""
    split_row: float = 0.0
    """The same, for bytes that the ranks divide."""


@record
class Division:
    """Says what a layer does when the ranks along one axis of a stage's mesh divide it; each of
    them holds and computes in full what they do not divide."""

    axis: str
    """Name of the axis, as in `AXES` of `plan/mesh.py`."""
    units: int = 0
    """Number that a legal width must divide, such as the common divisor of heads, key-value heads
    and hidden width. Every width divides 0, which means that the layer can be divided unevenly (a
    vocabulary), or that each rank computes all of it."""
    parameters: int = 0
    """The part of the layer's `parameters` that is divided."""
    frozen_parameters: int = 0
    """The part of its `frozen_parameters` that is divided."""
    flops: float = 0.0
    """The part of its forward_flops + attention_flops that is divided."""
    traffic_bytes: float = 0.0
    """The part of its `traffic_bytes` that is divided."""
    saved_bytes: float = 0.0
    """The part of its `saved_bytes` that is divided."""
    moments: tuple[Moment, ...] = ()
    """The moments at which the memory of one of several ranks may peak; if empty, those of the
    undivided layer."""
    forward_all_reduce_bytes: tuple[float, ...] = ()
    """Size of each all-reduce along the axis in the forward."""
    backward_all_reduce_bytes: tuple[float, ...] = ()
    """Size of each all-reduce along the axis in the backward."""


@record
class Layer:
    """Describes the smallest part of a model that a plan assigns to a stage; a layer is never
    cut."""

    name: str
    signature: str
    """Identifies what the layer computes; layers with the same signature cost the same and are
    profiled once."""
    forward_flops: float
    """FLOPs of the forward except those of attention: the matrix products."""
    attention_flops: float = 0.0
    """Forward FLOPs of the attention scores and their product with the values; counted separately
    because attention kernels reach another fraction of the peak."""
    unfused_flops: float = 0.0
    """The part of `attention_flops` that ordinary matrix products compute, which write their scores
    to memory, instead of a fused kernel."""
    backward_flops: float
    """FLOPs of the whole backward, attention included: the gradients of the inputs, and those of
    the weights that are trained."""
    traffic_bytes: float
    """Bytes of activations that the forward reads and writes."""
    parameters: int
    """Number of trained parameters that belong to this layer alone (tied ones are in
    LayerGraph.tied)."""
    saved_bytes: float
    """Bytes of activations that the forward saves for the backward."""
    workspace_bytes: float = 0.0
    """Largest temporary memory of forward or backward, beyond the saved activations."""
    fixed_saved_bytes: float = 0.0
    """Bytes saved for the backward of each micro-batch that do not depend on its number of rows,
    such as positions and masks."""
    cast_parameters: int = 0
    """The part of `parameters` that is cast before use in 16-bit precision."""
    moments: tuple[Moment, ...] = ()
    """The moments at which memory may peak; which one does depends on the number of rows. If empty,
    `workspace_bytes` is the peak."""
    frozen_parameters: int = 0
    """The layer's own numbers that are held and read like `parameters` but never trained: they have
    no gradient and no optimizer state."""
    cast_frozen: int = 0
    """The part of `frozen_parameters` that is cast before use in 16-bit precision."""
    constant_bytes: float = 0.0
    """Bytes held in addition to the parameters, for any number of rows: buffers (position tables,
    running statistics) and frozen integer weights (quantized ones)."""
    has_backward: bool = True
    """False if neither this layer nor one before it is trained, so that no gradient reaches it."""
    parallel: tuple[Division, ...] = ()
    """What the layer does when it is divided, one entry for each axis along which it can be."""

    def along(self, axis: str) -> Division:
        """Returns what the layer does when it is divided along an axis: nothing, if it has no entry
        for it."""
        for each in self.parallel:
            if each.axis == axis:
                return each
        return Division(axis=axis)


@record
class Tensor:
    """Describes a tensor that one layer hands to later ones. Inputs of the model are not listed:
    every stage that needs them reads the batch itself."""

    name: str
    bytes: float
    producer: int
    """Index of the layer that computes it."""
    consumers: tuple[int, ...]
    """Indices of the layers that read it, ascending."""
    gradient: bool = True
    """False if no gradient is sent back for it (masks, indices)."""
    kept: bool = False
    """True if its first consumer keeps it for the backward, in that layer's `saved_bytes`."""


@record
class Tied:
    """Describes a parameter that several layers share: each stage with one of these layers holds a
    copy, and the gradient is summed over the copies."""

    name: str
    layers: tuple[int, ...]
    """Indices of these layers, ascending; the first one owns the initial value."""
    parameters: int
    """Its number of elements if it is trained, else 0."""
    frozen_parameters: int = 0
    """Its number of elements if it is frozen, else 0."""
    divided: tuple[str, ...] = ()
    """The axes along which the ranks that hold it divide it."""


@record
class LayerGraph:
    """Describes a model as the planner sees it: its layers, the tensors between them, and tied
    parameters."""

    name: str
    sequence: int
    """Number of tokens in a row; 1 if rows are not sequences."""
    precision: Precision
    layers: tuple[Layer, ...]
    tensors: tuple[Tensor, ...]
    tied: tuple[Tied, ...] = ()


def tensors_across(model: LayerGraph, cut: int) -> tuple[Tensor, ...]:
    """Lists the tensors that cross a cut before layer `cut`: they are computed before the cut and
    read after it."""
    return tuple(t for t in model.tensors if t.producer < cut <= t.consumers[-1])


def with_division(layer: Layer, division: Division) -> Layer:
    """Returns the layer with another division along the axis of `division`."""
    others = (each for each in layer.parallel if each.axis != division.axis)
    return replace(layer, parallel=(*others, division))


def without_division(model: LayerGraph, axis: str) -> LayerGraph:
    """Returns the model with layers that cannot be divided along an axis."""
    layers = (with_division(each, replace(each.along(axis), units=1)) for each in model.layers)
    return replace(model, layers=tuple(layers))


def with_temporaries(
    layer: Layer, row_bytes: float, *, divided: Callable[[Division], float]
) -> Layer:
    """Adds `row_bytes` bytes per row to every peak moment of a layer; `divided` returns how many of
    them the ranks along an axis divide."""

    def later(moments: tuple[Moment, ...], split: float = 0.0) -> tuple[Moment, ...]:
        return tuple(
            replace(m, row=m.row + row_bytes - split, split_row=m.split_row + split)
            for m in moments
        )

    return replace(
        layer,
        workspace_bytes=layer.workspace_bytes + row_bytes,
        moments=later(layer.moments),
        parallel=tuple(
            replace(each, moments=later(each.moments, divided(each))) for each in layer.parallel
        ),
    )


def num_parameters(model: LayerGraph) -> int:
    """Counts the trained numbers of the whole model, each tied parameter once."""
    return sum(layer.parameters for layer in model.layers) + sum(t.parameters for t in model.tied)


def num_frozen_parameters(model: LayerGraph) -> int:
    """Counts the frozen numbers of the whole model, each tied parameter once."""
    own = sum(layer.frozen_parameters for layer in model.layers)
    return own + sum(tied.frozen_parameters for tied in model.tied)


_LATER = {"frozen_parameters": 0, "cast_frozen": 0, "split_frozen": 0, "constant_bytes": 0.0,
          "has_backward": True, "parallel": [], "divided": [], "unfused_flops": 0.0}  # fmt: skip
"""Fields that older graphs lack, with the defaults that stand for their absence."""
_FINGERPRINTED = {
    "units": "tensor_units",
    "parameters": "split_parameters",
    "frozen_parameters": "split_frozen",
    "flops": "split_flops",
    "saved_bytes": "split_saved_bytes",
    "moments": "tensor_moments",
    "forward_all_reduce_bytes": "forward_all_reduce_bytes",
    "backward_all_reduce_bytes": "backward_all_reduce_bytes",
}
"""Names in the fingerprint of a layer of what it does along `tensor`."""


def content_fingerprint(model: LayerGraph) -> str:
    """Returns a fingerprint of everything in a graph. What is divided along `tensor` enters it in
    the form that it had when that was the only axis, and fields of `_LATER` are left out where they
    have their default, so that measurements made for older graphs are still found."""
    found = plain(model)
    for each, layer in zip(found["layers"], model.layers, strict=True):
        tensor = plain(layer.along("tensor"))
        each |= {name: tensor[field] for field, name in _FINGERPRINTED.items()}
        each["parallel"] = [other for other in each["parallel"] if other["axis"] != "tensor"]
    for each in found["tied"]:
        each["split"] = "tensor" in each["divided"]
        each["divided"] = [axis for axis in each["divided"] if axis != "tensor"]
    for each in (*found["layers"], *found["tied"]):
        for name, nothing in _LATER.items():
            if each.get(name) == nothing:
                each.pop(name, None)
    return fingerprint(found)


def structure_fingerprint(model: LayerGraph) -> str:
    """Returns a fingerprint of what a plan refers to: names and parameter counts of the layers, the
    tied parameters, and frozen counts if there are any. A graph counted from a config and one
    traced from the module have the same structure."""
    layers = [[layer.name, layer.parameters, *_frozen(layer)] for layer in model.layers]
    tied = [[t.name, *t.layers, t.parameters, *_frozen(t)] for t in model.tied]
    return fingerprint([model.sequence, layers, tied])


def _frozen(holder: Layer | Tied) -> tuple[int, ...]:
    return (holder.frozen_parameters,) if holder.frozen_parameters else ()
