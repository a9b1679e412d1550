"""What is to be trained: layers in topological order and the tensors that flow between them.

Every amount is per row (one sample of the batch) unless its name says otherwise, at the sequence
length and precision that the graph was built for.
"""

from __future__ import annotations

from dataclasses import replace

from meshwright.cluster.spec import Precision
from meshwright.records import fingerprint, plain, record


@record
class Moment:
    """Bytes alive at one moment of a layer's forward or backward beyond what it keeps, which may be
    negative: what is whole on each of t tensor ranks, and what they divide by t."""

    fixed: float = 0.0
    """Whatever the rows: gradients of weights before they are added up."""
    split_fixed: float = 0.0
    row: float = 0.0
    """For each row."""
    split_row: float = 0.0


@record
class Layer:
    """The smallest unit that is never cut between stages."""

    name: str
    signature: str
    """Layers of one signature cost the same: they are profiled once."""
    forward_flops: float
    """Matrix products and everything else but attention scores."""
    attention_flops: float = 0.0
    """Forward FLOPs of the scores and their product with the values; kept apart because these
    kernels reach another share of the peak."""
    backward_flops: float
    """Both of the backward's halves, attention included; what is frozen has no second one."""
    traffic_bytes: float
    """Bytes read and written by the forward, activations only."""
    parameters: int
    """Trained numbers that belong to this layer alone (tied ones are in LayerGraph.tied)."""
    saved_bytes: float
    """Activations kept from the forward until the backward."""
    workspace_bytes: float = 0.0
    """Largest temporary of forward or backward beyond what is saved."""
    fixed_saved_bytes: float = 0.0
    """Kept like `saved_bytes`, for each micro-batch but whatever its rows: positions, masks."""
    cast_parameters: int = 0
    """Of `parameters`, those that 16-bit precision reads as casts."""
    moments: tuple[Moment, ...] = ()
    """Moments of which one is the worst, depending on the rows; none: `workspace_bytes` it is."""
    tensor_moments: tuple[Moment, ...] = ()
    """The same where several tensor ranks share the layer."""
    frozen_parameters: int = 0
    """Numbers of its own that are held and read like `parameters`, but never trained: they have no
    gradient and no optimizer state."""
    cast_frozen: int = 0
    """Of `frozen_parameters`, those that 16-bit precision reads as casts."""
    constant_bytes: float = 0.0
    """Held beside parameters, whatever the rows: buffers (tables of positions, statistics), and
    frozen numbers that are whole ones (quantized weights)."""
    has_backward: bool = True
    """False: nothing in it or before it is trained, so that no gradient comes to it."""

    tensor_units: int = 0
    """Tensor widths that divide this number are legal (heads, key-value heads and hidden all
    considered). Every width divides 0: what is split may be split unevenly (a vocabulary), or
    nothing is and each tensor rank does the whole layer."""
    split_parameters: int = 0
    """Of `parameters`, those divided among tensor ranks; the rest is replicated."""
    split_frozen: int = 0
    """The same of `frozen_parameters`."""
    split_flops: float = 0.0
    """Of forward_flops + attention_flops, the part divided among tensor ranks."""
    split_saved_bytes: float = 0.0
    """Of saved_bytes, the part divided among tensor ranks."""
    forward_all_reduce_bytes: tuple[float, ...] = ()
    """Size of each tensor-parallel all-reduce of the forward."""
    backward_all_reduce_bytes: tuple[float, ...] = ()


@record
class Tensor:
    """What one layer hands to later ones. Inputs of the model are no Tensors: every stage that
    needs them reads the batch itself."""

    name: str
    bytes: float
    producer: int
    """Index of the layer that makes it."""
    consumers: tuple[int, ...]
    """Indices of the layers that read it, ascending."""
    gradient: bool = True
    """False: nothing flows back (masks, indices)."""
    kept: bool = False
    """Its first reader keeps it for the backward and counts it among its own saved bytes."""


@record
class Tied:
    """One parameter of several layers: held by each stage with any of them, summed over all."""

    name: str
    layers: tuple[int, ...]
    """Ascending; the first one owns the initial value."""
    parameters: int
    """0 where it is frozen."""
    frozen_parameters: int = 0
    """0 where it is trained."""
    split: bool = False
    """Divided among tensor ranks."""


@record
class LayerGraph:
    """A model as the planner sees it."""

    name: str
    sequence: int
    """Tokens in a row; 1 where rows are not sequences."""
    precision: Precision
    layers: tuple[Layer, ...]
    tensors: tuple[Tensor, ...]
    tied: tuple[Tied, ...] = ()


def alive_at(model: LayerGraph, cut: int) -> tuple[Tensor, ...]:
    """Tensors that a cut before layer `cut` carries: made before it, read at or after it."""
    return tuple(t for t in model.tensors if t.producer < cut <= t.consumers[-1])


def with_temporaries(layer: Layer, row_bytes: float, *, divided: float) -> Layer:
    """The layer with `row_bytes` more for each row at all its worst moments, of which tensor ranks
    share out `divided`."""

    def later(moments: tuple[Moment, ...]) -> tuple[Moment, ...]:
        return tuple(
            replace(m, row=m.row + row_bytes - divided, split_row=m.split_row + divided)
            for m in moments
        )

    return replace(
        layer,
        workspace_bytes=layer.workspace_bytes + row_bytes,
        moments=later(layer.moments),
        tensor_moments=later(layer.tensor_moments),
    )


def without_tensor_parallelism(model: LayerGraph) -> LayerGraph:
    """The model with layers that cannot be divided.

    On an emulated cluster processes that share cores wait for each other's turn at every sum inside
    a layer, as no devices of their own do: such plans are left out there, on all sides.
    """
    layers = tuple(replace(layer, tensor_units=1) for layer in model.layers)
    return replace(model, layers=layers)


def num_parameters(model: LayerGraph) -> int:
    """Distinct trained numbers of the whole model."""
    return sum(layer.parameters for layer in model.layers) + sum(t.parameters for t in model.tied)


def num_frozen(model: LayerGraph) -> int:
    """Distinct numbers of the whole model that are held, but not trained."""
    own = sum(layer.frozen_parameters for layer in model.layers)
    return own + sum(tied.frozen_parameters for tied in model.tied)


_LATER = {"frozen_parameters": 0, "cast_frozen": 0, "split_frozen": 0, "constant_bytes": 0.0,
          "has_backward": True}  # fmt: skip
"""Fields that graphs have not always had, with what they are where they say nothing."""


def content(model: LayerGraph) -> str:
    """Fingerprint of all that a graph says: what was measured for it before it had a field is known
    again where the field says nothing."""
    found = plain(model)
    for each in (*found["layers"], *found["tied"]):
        for name, nothing in _LATER.items():
            if each.get(name) == nothing:
                each.pop(name, None)
    return fingerprint(found)


def structure(model: LayerGraph) -> str:
    """Fingerprint of what a plan refers to: the layers with their names and parameters, and what
    is tied; what is frozen, where anything is. A graph worked out from a config and one traced from
    the module have the same."""
    layers = [[layer.name, layer.parameters, *_frozen(layer)] for layer in model.layers]
    tied = [[t.name, *t.layers, t.parameters, *_frozen(t)] for t in model.tied]
    return fingerprint([model.sequence, layers, tied])


def _frozen(holder: Layer | Tied) -> tuple[int, ...]:
    return (holder.frozen_parameters,) if holder.frozen_parameters else ()
