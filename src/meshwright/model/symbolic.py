"""Records a model's top-level forward as a torch.fx graph, one node per operation.

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
    """Gives the context in which a forward runs at `precision` on "cpu" or "cuda"."""
    if precision not in LOW_PRECISION:
        return nullcontext()
    return torch.autocast(device, LOW_PRECISION[precision], cache_enabled=False)


def linear_parameters(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yields owner and name of each parameter that 16-bit precision casts once a step: those of
    nn.Linear modules."""
    for inner in module.modules():
        if isinstance(inner, nn.Linear):
            yield from ((inner, name) for name, _ in inner.named_parameters(recurse=False))


def holds_tensors(value: object) -> bool:
    """True if `value` is a tensor or a structure (tuple, dict, ...) that contains one."""
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))


class Fakes:
    """Makes and remembers the fake tensors (shape, strides and dtype, no storage) that replace real
    ones.

    Fake tensors claim to be on the CPU, whatever device the originals are on, so that a model on
    the meta device can be combined with real index tensors. Floating point becomes float64 under
    fp64.
    """

    def __init__(self, precision: Precision) -> None:
        self.mode = FakeTensorMode()
        self.precision: Precision = precision
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, tensor: Tensor, *, shape: tuple[int, ...] | None = None) -> Tensor:
        """Gives the fake tensor for `tensor`, always the same one for the same tensor."""
        if id(tensor) not in self._known:
            fake = self.empty(shape or tuple(tensor.shape), tensor.dtype, tensor.requires_grad)
            if isinstance(tensor, nn.Parameter):
                with self.mode:
                    fake = nn.Parameter(fake.detach(), requires_grad=tensor.requires_grad)
            self._known[id(tensor)] = (tensor, fake)
        return self._known[id(tensor)][1]

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, gradient: bool) -> Tensor:
        """Makes a new fake tensor of a given shape."""
        if self.precision == "fp64" and dtype.is_floating_point:
            dtype = torch.float64
        with self.mode:
            return torch.empty(shape, dtype=dtype, device="cpu", requires_grad=gradient)

    def state(self, module: nn.Module) -> dict[str, Tensor]:
        """Gives the fake tensors for the parameters and buffers of a module, by name."""
        named = [
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        ]
        return {name: self.of(tensor) for name, tensor in named}

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a module on fake tensors."""
        with self.mode, autocast(self.precision):
            return functional_call(module, self.state(module), args, kwargs)


def layer_modules(model: nn.Module) -> tuple[str, ...]:
    """Gives the qualified names of the leaf modules: those that are executed as a whole.

    A module is traced, not a leaf, if it is the root or has a ModuleList or Sequential somewhere
    below it. The elements of such an outermost container are leaves, and so are all other children
    of traced modules. Example: embedding, blocks.0, blocks.1, head.
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
    """Stands for a value while torch.fx traces, and knows the value's shape, length and
    elements."""

    @property
    def value(self) -> Any:
        """Returns the result of the node when it was executed on fake tensors."""
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
    """Records calls without tensor arguments, such as torch.arange."""

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
    """Traces a model with torch.fx: layers are leaf modules, and every node has a fake value
    (`meta["value"]`)."""

    proxy_buffer_attributes = True

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor], fakes: Fakes) -> None:
        super().__init__()
        self.inputs = inputs
        self.fakes = fakes
        self.leaves = frozenset(layer_modules(model))
        self.executing = False

    def record(self, model: nn.Module) -> Graph:
        """Records the model's forward as a graph."""
        with _Factories(self):
            return self.trace(model)

    def create_args_for_root(
        self,
        root_fn: Any,
        is_module: bool,  # noqa: ARG002
        concrete_args: Any = None,  # noqa: ARG002
    ) -> tuple[Any, list[Any]]:
        """Makes placeholders for the batch tensors only; other arguments keep their defaults."""
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
        """Records a node, and gives its proxy if the value holds tensors; any other value becomes a
        constant of the trace, without a node."""
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
