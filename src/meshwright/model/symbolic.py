"""Records what a model's top-level forward does, one node per operation, without computing it.

Every node is executed once on fake tensors (shapes and dtypes, no storage), so that shapes are
plain numbers in the forward that is traced. Leaf modules are executed as a whole.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.fx import Graph, Node, Proxy, Tracer, map_arg
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property
from torch.utils._pytree import tree_leaves

from meshwright.cluster.spec import Precision

LOW_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}
CONTAINERS = (nn.ModuleList, nn.Sequential)


def autocast(precision: Precision, device: str = "cpu") -> AbstractContextManager[Any]:
    """The context in which a forward runs at `precision` on a type of device ("cpu", "cuda")."""
    if precision not in LOW_PRECISION:
        return nullcontext()
    return torch.autocast(device, LOW_PRECISION[precision], cache_enabled=False)


def linear_parameters(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Where the parameters are that low precision casts once a step: owners, and names in them."""
    for inner in module.modules():
        if isinstance(inner, nn.Linear):
            yield from ((inner, name) for name, _ in inner.named_parameters(recurse=False))


def holds_tensors(value: object) -> bool:
    """True if `value` is, contains, or (a structured output) lists tensors."""
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))


class Fakes:
    """Fake stand-ins for tensors: shape, strides and dtype, but no storage.

    All live on a pretended CPU, whatever device the originals are on, so that a meta model and
    real index tensors meet. Floating point becomes float64 under fp64.
    """

    def __init__(self, precision: Precision) -> None:
        self.mode = FakeTensorMode()
        self.precision: Precision = precision
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, tensor: Tensor, *, shape: tuple[int, ...] | None = None) -> Tensor:
        """The stand-in for `tensor`: the same one each time it is asked for."""
        if id(tensor) not in self._known:
            fake = self.empty(shape or tuple(tensor.shape), tensor.dtype, tensor.requires_grad)
            if isinstance(tensor, nn.Parameter):
                with self.mode:
                    fake = nn.Parameter(fake.detach(), requires_grad=tensor.requires_grad)
            self._known[id(tensor)] = (tensor, fake)
        return self._known[id(tensor)][1]

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, gradient: bool) -> Tensor:
        """A fresh stand-in of a given shape."""
        if self.precision == "fp64" and dtype.is_floating_point:
            dtype = torch.float64
        with self.mode:
            return torch.empty(shape, dtype=dtype, device="cpu", requires_grad=gradient)

    def state(self, module: nn.Module) -> dict[str, Tensor]:
        """Stand-ins for the parameters and buffers of a module, by name."""
        named = [
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        ]
        return {name: self.of(tensor) for name, tensor in named}

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a module on stand-ins."""
        with self.mode, autocast(self.precision):
            return functional_call(module, self.state(module), args, kwargs)


def layer_modules(model: nn.Module) -> tuple[str, ...]:
    """Qualified names of the modules that are never looked into.

    The forward of the root is traced, and of every module that holds, in itself or below, an
    outermost ModuleList or Sequential. The elements of those containers and all other children of
    traced modules are leaves.
    """

    def leaves(module: nn.Module, prefix: str) -> Iterator[str]:
        for name, child in module.named_children():
            if isinstance(child, CONTAINERS):
                yield from (f"{prefix}{name}.{index}" for index, _ in child.named_children())
            elif any(isinstance(below, CONTAINERS) for below in child.modules()):
                yield from leaves(child, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}"

    if isinstance(model, CONTAINERS):
        return tuple(name for name, _ in model.named_children())
    return tuple(leaves(model, ""))


class ValueProxy(Proxy):
    """A recorded value that knows its shape, length and elements."""

    @property
    def value(self) -> Any:
        """What the node gave when it was executed on fake tensors."""
        return self.node.meta["value"]

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.node.meta["value"], name)
        if isinstance(value, Tensor):
            return self.tracer.create_proxy("call_function", getattr, (self.node, name), {})
        return super().__getattr__(name) if callable(value) else value

    def __getitem__(self, key: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.getitem, (self.node, key), {})

    def __len__(self) -> int:
        return len(self.value)

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def __contains__(self, key: object) -> bool:
        return key in self.value

    def __bool__(self) -> bool:
        return bool(self.value)

    def __int__(self) -> int:
        return int(self.value)

    def __index__(self) -> int:
        return operator.index(self.value)

    def __float__(self) -> float:
        return float(self.value)


class _Factories(TorchFunctionMode):
    """Records the calls that no tensor takes part in, such as torch.arange."""

    def __init__(self, tracer: LayerTracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        seen = any(isinstance(leaf, Proxy) for leaf in tree_leaves((args, kwargs)))
        if seen or self.tracer.executing or is_tensor_method_or_property(func):
            return func(*args, **kwargs)
        return self.tracer.create_proxy("call_function", func, args, kwargs)


class LayerTracer(Tracer):
    """torch.fx's tracer with layers as leaves and a value on every node (`meta["value"]`)."""

    proxy_buffer_attributes = True

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor], fakes: Fakes) -> None:
        super().__init__()
        self.inputs = inputs
        self.fakes = fakes
        self.leaves = frozenset(layer_modules(model))
        self.executing = False

    def record(self, model: nn.Module) -> Graph:
        """The graph of the model's forward."""
        with _Factories(self):
            return self.trace(model)

    def create_args_for_root(
        self,
        root_fn: Any,
        is_module: bool,  # noqa: ARG002
        concrete_args: Any = None,  # noqa: ARG002
    ) -> tuple[Any, list[Any]]:
        """Placeholders for the batch tensors alone: other arguments keep their defaults."""
        proxies = [self.create_proxy("placeholder", name, (), {}) for name in self.inputs]
        return root_fn, [self.root, *proxies]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002
        return module_qualified_name in self.leaves

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if self.executing:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        return (
            attr_val if self.executing else super().getattr(attr, attr_val, parameter_proxy_cache)
        )

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Node):
            return a
        if isinstance(a, ValueProxy) and isinstance(a.value, (tuple, list)):
            return tuple(self.create_arg(element) for element in a)
        return super().create_arg(a)

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *_: Any, **__: Any
    ) -> Any:
        """A proxy for what holds tensors; anything else is a constant of the trace."""
        node = self.create_node(kind, target, self.create_arg(args), self.create_arg(kwargs))
        with self._execution():
            value = self._execute(node)
        if holds_tensors(value):
            node.meta["value"] = value
            return ValueProxy(node, self)
        self.graph.erase_node(node)
        return value

    @contextmanager
    def _execution(self) -> Iterator[None]:
        outer, self.executing = self.executing, True
        try:
            with self.fakes.mode, autocast(self.fakes.precision):
                yield
        finally:
            self.executing = outer

    def _execute(self, node: Node) -> Any:
        target: Any = node.target
        args: Any = map_arg(node.args, lambda n: n.meta["value"])
        kwargs: Any = map_arg(node.kwargs, lambda n: n.meta["value"])
        if node.op == "placeholder":
            return self.inputs[target]
        if node.op == "get_attr":
            owner, _, name = target.rpartition(".")
            return self.fakes.of(getattr(self.root.get_submodule(owner), name))
        if node.op == "call_module":
            return self.fakes.call(self.root.get_submodule(target), args, kwargs)
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return target(*args, **kwargs)
