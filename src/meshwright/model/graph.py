"""Cuts an nn.Module into layers that can run one after another, each on any machine.

The layers are the model's own modules; an operation between two of them goes to the one before.
Executing all layers in order gives exactly the model's forward, bit by bit.
"""

from __future__ import annotations

import inspect
import logging
import operator
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from meshwright.cluster.spec import Precision
from meshwright.errors import ModelError, Problem
from meshwright.model.symbolic import Fakes, LayerTracer, autocast
from meshwright.records import record

__all__ = ["CrossingTensor", "LayerPart", "LayeredModel", "autocast", "cut"]

LOSS = "loss"
_PARTS_OF_A_VALUE = (operator.getitem, getattr)
_TORCH = str(Path(torch.__file__).parent)


@record
class LayerPart:
    """Holds one layer of a model as a module that can be executed on its own."""

    name: str
    """Qualified name of its module with parameters, such as `blocks.3`."""
    modules: tuple[str, ...]
    """Qualified names of all its modules, including modules without parameters that follow."""
    parameters: dict[str, str]
    """Parameter name inside `module` -> its name in the model (the first name, if it is tied)."""
    reads: tuple[str, ...]
    """Names of its inputs, in order: tensors of the batch or of earlier layers."""
    writes: tuple[str, ...]
    """Names of its outputs, in order; the last layer has only `loss`."""
    module: nn.Module
    """The code: it takes `reads` as arguments and returns `writes` as a tuple. It shares its
    parameters with the model that it was cut from."""


@record
class CrossingTensor:
    """Describes a tensor that one layer hands to later ones, with its shape for the example
    batch."""

    name: str
    producer: int
    consumers: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    gradient: bool


@record
class LayeredModel:
    """Holds a model as a sequence of layers and the tensors that flow between them."""

    inputs: tuple[str, ...]
    """Names of the tensors of a batch, in the order of the model's arguments."""
    layers: tuple[LayerPart, ...]
    tensors: tuple[CrossingTensor, ...]
    tied: dict[str, tuple[int, ...]]
    """Name of each parameter that several layers share -> indices of those layers, ascending."""


def cut(
    model: nn.Module, inputs: tuple[Tensor, ...], precision: Precision = "fp32"
) -> LayeredModel:
    """Cuts a model, whose forward takes the batch and returns the mean loss of its rows.

    Only shapes and dtypes of `inputs` matter; nothing is allocated or computed. Sizes that the
    forward reads from its inputs become constants, so cut again for another number of rows. Raises
    ModelError if the forward fails, depends on values of tensors, or gives anything but one number.
    """
    fakes = Fakes(precision)
    batch = dict(zip(_argument_names(model, inputs), map(fakes.of, inputs), strict=True))
    graph = _record(model, LayerTracer(model, batch, fakes))
    loss = _loss(model, graph)
    index, names = _assign(model, graph)
    if not names:
        raise _error(model, "", "no module with parameters", "at least one",
                     "put the parameters into modules that the forward calls")  # fmt: skip
    tensor_names = _tensor_names(graph, index, names, loss)
    parts = tuple(
        _part(model, graph, index, number, name, tensor_names) for number, name in enumerate(names)
    )
    _check(model, parts, index, loss)
    return LayeredModel(
        inputs=tuple(batch),
        layers=parts,
        tensors=tuple(_crossing(n, index, tensor_names[n]) for n in _crossing_nodes(index)),
        tied=_tied(parts),
    )


def _error(model: nn.Module, field: str, found: str, wanted: str, mend: str = "") -> ModelError:
    return ModelError(Problem(type(model).__name__, field, found, wanted, mend))


def _argument_names(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[str, ...]:
    names: list[str] = []
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{i}" for i in range(len(inputs) - len(names))]
        elif parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            names.append(parameter.name)
    if len(names) < len(inputs):
        found = f"{len(inputs)} batch tensors for {len(names)} arguments"
        raise _error(model, "forward", found, "one argument for each tensor of a batch")
    return tuple(names[: len(inputs)])


def _record(model: nn.Module, tracer: LayerTracer) -> Graph:
    # torch logs a failure on fake tensors with its whole stack; one line in the error is enough.
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        return tracer.record(model)
    except Exception as failure:
        first_line = (str(failure).strip() or "no message").splitlines()[0][:200]
        text = f"{type(failure).__name__}: {first_line}"
        if any(word in type(failure).__name__ for word in ("DataDependent", "DynamicOutput")):
            wanted = "a forward whose steps and shapes do not depend on the values of tensors"
            mend = "compute with masks (torch.where) instead of branching on values"
        else:
            wanted = "a forward that runs on the example batch"
            mend = "call the model on such a batch yourself to see the full failure"
        raise _error(model, _place(failure, tracer), text, wanted, mend) from failure
    finally:
        log.setLevel(level)


def _place(failure: Exception, tracer: LayerTracer) -> str:
    """Names the layer in which a failure occurred and the innermost line of the user's own code."""
    own = (str(Path(__file__).parent / "symbolic.py"), __file__)
    frames = [
        frame
        for frame in traceback.extract_tb(failure.__traceback__)
        if not frame.filename.startswith((_TORCH, *own, "<"))
    ]
    layer = next(iter(dict(reversed(tracer.module_stack.items())).values()), ("", None))[0]
    where = f"forward of {layer}" if layer else "forward"
    return f"{where}, {frames[-1].filename}:{frames[-1].lineno}" if frames else where


def _loss(model: nn.Module, graph: Graph) -> Node:
    output = next(iter(reversed(graph.nodes))).args[0]
    wanted = "one scalar tensor: the mean loss over the rows of the batch"
    mend = "let forward take the targets too and return the loss"
    if not isinstance(output, Node):
        raise _error(model, "forward", f"a result of {_kind(output)}", wanted, mend)
    value = output.meta["value"]
    if not isinstance(value, Tensor) or value.dim() != 0:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise _error(model, "forward", f"a result of {shape}", wanted, mend)
    if not value.requires_grad:
        found = "a loss that no trainable parameter leads to"
        raise _error(model, "forward", found, wanted, "do not detach it, and compute with gradient")
    return output


def _kind(value: object) -> str:
    return type(value).__name__.removeprefix("immutable_")


def _assign(model: nn.Module, graph: Graph) -> tuple[dict[Node, int], list[str]]:
    """Assigns each node that computes to a layer; gives the layers' indices and names."""
    index: dict[Node, int] = {}
    names: list[str] = []
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        if node.op == "call_module" and any(
            True for _ in model.get_submodule(str(node.target)).parameters()
        ):
            repeats = sum(name.split("@")[0] == node.target for name in names)
            names.append(f"{node.target}@{repeats + 1}" if repeats else str(node.target))
        index[node] = max(len(names) - 1, 0)
        whole = node.args[0] if node.args else None
        # Taking a structure apart belongs to the layer that made it: only tensors are handed on.
        if (
            node.target in _PARTS_OF_A_VALUE
            and isinstance(whole, Node)
            and whole in index
            and not isinstance(whole.meta["value"], Tensor)
        ):
            index[node] = index[whole]
    return index, names


def _crossing_nodes(index: dict[Node, int]) -> list[Node]:
    return [n for n in index if any(index.get(user, 0) > index[n] for user in n.users)]


def _tensor_names(
    graph: Graph, index: dict[Node, int], names: list[str], loss: Node
) -> dict[Node, str]:
    result = {node: str(node.target) for node in graph.nodes if node.op == "placeholder"}
    inputs = set(result.values())
    for node in _crossing_nodes(index):
        layer = names[index[node]]
        whole = node.op == "call_module" and layer.split("@")[0] == node.target
        taken = layer in inputs
        result[node] = layer if whole and not taken else f"{layer}/{node.name}"
    return result | {loss: LOSS}


def _crossing(node: Node, index: dict[Node, int], name: str) -> CrossingTensor:
    value = node.meta["value"]
    return CrossingTensor(
        name=name,
        producer=index[node],
        consumers=tuple(sorted({index[u] for u in node.users if index.get(u, 0) > index[node]})),
        shape=tuple(value.shape),
        dtype=value.dtype,
        gradient=bool(value.requires_grad),
    )


def _part(
    model: nn.Module,
    graph: Graph,
    index: dict[Node, int],
    number: int,
    name: str,
    tensor_names: dict[Node, str],
) -> LayerPart:
    nodes = [node for node, layer in index.items() if layer == number]
    outside = dict.fromkeys(arg for n in nodes for arg in n.all_input_nodes if arg not in nodes)
    reads = [node for node in graph.nodes if node in outside and node.op != "get_attr"]
    writes = [n for n in nodes if n in tensor_names]
    for node in (*reads, *writes):
        if not isinstance(node.meta["value"], Tensor):
            found = f"{type(node.meta['value']).__name__} handed from one layer to another"
            raise _error(model, f"forward: {node.name}", found, "tensors and tuples of tensors")
    new = Graph()
    env = {node: new.placeholder(f"read_{number}") for number, node in enumerate(reads)}
    env |= {node: new.get_attr(str(node.target)) for node in outside if node.op == "get_attr"}
    for node in nodes:
        env[node] = new.node_copy(node, env.__getitem__)
    _follow_device(new, [env[node] for node in reads])
    new.output(tuple(env[node] for node in writes))
    module = GraphModule(model, new, class_name="LayerPart")
    canonical = {id(parameter): own for own, parameter in model.named_parameters()}
    return LayerPart(
        name=name,
        modules=tuple(dict.fromkeys(str(n.target) for n in nodes if n.op == "call_module")),
        parameters={
            local: canonical[id(parameter)]
            for local, parameter in module.named_parameters(remove_duplicate=False)
        },
        reads=tuple(tensor_names[node] for node in reads),
        writes=tuple(tensor_names[node] for node in writes),
        module=module,
    )


def _follow_device(graph: Graph, reads: list[Node]) -> None:
    """Replaces the CPU device recorded from the fake tensors by the device of the layer's first
    input, so that tensors which the forward creates are on the device where it runs."""
    pretended = torch.device("cpu")
    device: list[Node] = []

    def follow(argument: Any) -> Any:
        if not (isinstance(argument, torch.device) and argument == pretended and reads):
            return argument
        if not device:
            with graph.inserting_after(reads[-1]):
                device.append(graph.call_function(getattr, (reads[0], "device")))
        return device[0]

    for node in list(graph.nodes):
        if node.op.startswith("call"):
            node.args = map_aggregate(node.args, follow)
            node.kwargs = map_aggregate(node.kwargs, follow)


def _tied(parts: tuple[LayerPart, ...]) -> dict[str, tuple[int, ...]]:
    layers: dict[str, list[int]] = {}
    for number, part in enumerate(parts):
        for name in dict.fromkeys(part.parameters.values()):
            layers.setdefault(name, []).append(number)
    return {name: tuple(found) for name, found in layers.items() if len(found) > 1}


def _check(
    model: nn.Module, parts: tuple[LayerPart, ...], index: dict[Node, int], loss: Node
) -> None:
    if index[loss] != len(parts) - 1:
        unused = ", ".join(part.name for part in parts[index[loss] + 1 :])
        raise _error(model, "forward", f"layers after the loss: {unused}", "a loss of all layers")
    used = {name for part in parts for name in part.parameters.values()}
    unused_parameters = [
        name for name, p in model.named_parameters() if p.requires_grad and name not in used
    ]
    if unused_parameters:
        found = f"{unused_parameters[0]} (and {len(unused_parameters) - 1} more) never used"
        raise _error(model, "parameters", found, "a forward that uses every trainable parameter",
                     "remove them, or set requires_grad = False")  # fmt: skip
