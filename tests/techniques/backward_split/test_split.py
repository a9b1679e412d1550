"""A backward in two parts gives what one backward gives, and computes nothing twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from meshwright.layout.shares import own_share
from meshwright.model.shard import Column, Row, Split, tile_of
from meshwright.runtime.run_folder import TrainingOptions
from meshwright.runtime.slices import read_slices
from meshwright.techniques.backward_split.runtime.deferring import (
    DeferredGradients,
    DeferWeightGradients,
    backward_weights,
)
from meshwright.techniques.tensor_parallel.runtime import TensorParallelGroup, divide

ROWS, WIDTH = 4, 8


class Block(nn.Module):
    """Every kind of parameter: of products, norms, and one that is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.mix = nn.Conv1d(3, 3, 3, padding=1, bias=False)
        self.down = nn.Parameter(torch.randn(2 * WIDTH, WIDTH) / 4)
        self.experts = nn.Parameter(torch.randn(2, WIDTH, WIDTH) / 3)
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.norm(x))
        y += 1  # in place, as user code does
        y = self.mix(F.gelu(y)) @ self.down
        y = torch.matmul(y, self.experts[0]) + torch.einsum("bsd,de->bse", y, self.experts[1])
        return self.up(y * self.scale)[..., ::2] + x * self.scale


class Residual(nn.Module):
    """A frozen weight, a product without bias, and one of a vector that has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(WIDTH, WIDTH)
        self.frozen.requires_grad_(False)
        self.free = nn.Linear(WIDTH, WIDTH, bias=False)
        self.position = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        step = torch.ones(WIDTH, dtype=x.dtype)
        return x + self.free(torch.tanh(self.frozen(x))) + self.position(step)


def view_at_the_end() -> nn.Module:
    """Its last linear gives a view, of a 3-D input."""
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))


def attention() -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)


KINDS: dict[str, Callable[[], nn.Module]] = {
    "products": Block,
    "frozen": Residual,
    "view": view_at_the_end,
    "attention": attention,
}


def inputs(count: int) -> list[tuple[Tensor, Tensor]]:
    """Inputs and output gradients of some micro-batches."""
    generator = torch.Generator().manual_seed(2)
    draw = torch.randn(count, 2, ROWS, 3, WIDTH, generator=generator, dtype=torch.float64)
    return [(x.clone(), g.clone()) for x, g in draw]


def first_part(module: nn.Module, x: Tensor, given: Tensor) -> tuple[Tensor, DeferredGradients]:
    """Forward, and the first part of the backward."""
    leaf = x.clone().requires_grad_()
    deferring = DeferWeightGradients(module.parameters())
    with deferring:
        result = module(leaf)
    result.backward(given)
    assert leaf.grad is not None
    return leaf.grad, deferring.deferred


def whole(module: nn.Module, x: Tensor, given: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    module(leaf).backward(given)
    assert leaf.grad is not None
    return leaf.grad


def gradients(module: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad for n, p in module.named_parameters() if p.requires_grad}
    assert all(grad is not None for grad in found.values())
    module.zero_grad()
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_two_parts_give_what_one_backward_gives(kind: str, together: bool, buffers: bool) -> None:
    torch.manual_seed(1)
    module = KINDS[kind]().double()
    pairs = inputs(3)
    wanted = [whole(module, *pair) for pair in pairs]
    weights = gradients(module)
    for parameter in module.parameters() if buffers else ():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    halves = [first_part(module, *pair) for pair in pairs]
    for (found, _), other in zip(halves, wanted, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-12, atol=1e-12)
    rest = [deferred for _, deferred in halves]
    for batch in [rest] if together else [[each] for each in rest]:
        backward_weights(batch)
    found = gradients(module)
    assert found.keys() == weights.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, weights[name], rtol=1e-11, atol=1e-12, msg=name)


def counted(act: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        act()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("kind", ["products", "frozen", "view"])
def test_nothing_is_computed_twice(kind: str) -> None:
    torch.manual_seed(1)
    module = KINDS[kind]().double()
    ((x, given),) = inputs(1)
    leaf = x.clone().requires_grad_()
    result = module(leaf)
    both = counted(lambda: result.backward(given))
    deferring = DeferWeightGradients(module.parameters())
    with deferring:
        result = module(x.clone().requires_grad_())
    first = counted(lambda: result.backward(given))
    second = counted(lambda: backward_weights([deferring.deferred]))
    assert first + second == both
    assert first > 0
    assert second > 0


class Calls(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count[func._overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_weights_of_several_micro_batches_are_one_product() -> None:
    module = view_at_the_end().double()
    deferred = [first_part(module, *pair)[1] for pair in inputs(4)]
    with Calls() as calls:
        backward_weights(deferred)
    assert calls.count["mm"] == 2


@pytest.mark.parametrize(("rows", "products"), [(1, 1), (WIDTH, 3)])
def test_products_add_to_gradients_and_join_where_that_moves_less(rows: int, products: int) -> None:
    """Of three micro-batches: a product more reads and writes WIDTH x WIDTH numbers, joining
    2 x rows x WIDTH of each of the three."""
    module = nn.Linear(WIDTH, WIDTH).double()
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    pair = torch.randn(2, rows, WIDTH, dtype=torch.float64)
    deferred = [first_part(module, pair[0], pair[1])[1] for _ in range(3)]
    with Calls() as calls:
        backward_weights(deferred)
    assert calls.count["mm"] == 0
    assert calls.count["addmm"] == products
    assert calls.count["cat"] == (2 if products == 1 else 0)


def test_gradient_hooks_fire_once_in_the_second_part_and_gradients_stay_views() -> None:
    module = Block().double()
    buffer = torch.zeros(sum(p.numel() for p in module.parameters()), dtype=torch.float64)
    start, fired = 0, []
    for name, parameter in module.named_parameters():
        parameter.grad = buffer[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: fired.append(name))
    _, deferred = first_part(module, *inputs(1)[0])
    light = {"norm.weight", "norm.bias", "scale"}
    assert set(fired) == light
    fired.clear()
    put_off = deferred.parameters()
    names = {n for n, p in module.named_parameters() if id(p) in put_off}
    backward_weights([deferred])
    assert sorted(fired) == sorted(names)
    assert names | light == {n for n, _ in module.named_parameters()}
    assert all(p.grad is not None and p.grad._base is buffer for p in module.parameters())
    assert bool(buffer.any())


def test_only_inputs_and_gradients_of_products_wait_for_the_second_part() -> None:
    module = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Tanh(), nn.Linear(64, WIDTH))
    ((x, given),) = inputs(1)
    _, deferred = first_part(module.double(), x, given)
    numbers = x.numel() * (1 + 8 + 8 + 1)
    assert deferred.kept_bytes() == 8 * numbers
    backward_weights([deferred])
    assert deferred.kept_bytes() == 0


def test_low_precision_is_as_without_parts() -> None:
    torch.manual_seed(1)
    module = view_at_the_end()
    pairs = [(x.float(), g.float()) for x, g in inputs(2)]

    def autocasting(run: Callable[..., Any]) -> Any:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            return run()

    wanted = []
    for x, given in pairs:
        leaf = x.clone().requires_grad_()
        autocasting(lambda leaf=leaf: module(leaf)).backward(given.bfloat16())
        wanted.append(leaf.grad)
    weights = gradients(module)
    for (x, given), other in zip(pairs, wanted, strict=True):
        leaf, deferring = x.clone().requires_grad_(), DeferWeightGradients(module.parameters())
        with deferring:
            result = autocasting(lambda leaf=leaf: module(leaf))
        result.backward(given.bfloat16())
        assert torch.equal(leaf.grad, other)  # type: ignore[arg-type]
        backward_weights([deferring.deferred])
    for name, grad in gradients(module).items():
        torch.testing.assert_close(grad, weights[name], rtol=2e-2, atol=2e-2)


def divided(rank: int, splits: Sequence[Split]) -> tuple[int, int, float]:
    """Sums over the team in either part, and the largest error of a gradient."""
    import torch.distributed as dist

    torch.manual_seed(1)
    full = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH)).double()
    ((x, given),) = inputs(1)
    wanted = whole(full, x, given)
    part = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH)).double()
    assert dist.group.WORLD is not None
    tensor_group, sums = TensorParallelGroup(dist.group.WORLD, rank, 2), [0]

    def counted(wait: Callable[[], Any]) -> Any:
        sums[0] += 1
        return wait()

    tensor_group.waiting = counted
    errors = []
    cuts = {}
    for (index, split), source in zip(((0, splits[0]), (2, splits[1])), (full[0], full[2]),
                                      strict=True):  # fmt: skip
        for name, parameter in source.named_parameters():
            tile = tile_of(split, name, tuple(parameter.shape), own_share(2, rank))
            cuts[f"{index}.{name}"] = tile
            value = read_slices(parameter.detach(), tile)
            setattr(part[index], name, nn.Parameter(value.clone()))
        divide(part[index], str(index), split, 0, tensor_group)
    deferring = DeferWeightGradients(part.parameters())
    leaf = x.clone().requires_grad_()
    with deferring:
        result = part(leaf)
    sums[0] = 0
    result.backward(given)
    first, sums[0] = sums[0], 0
    backward_weights([deferring.deferred])
    errors.append(float((leaf.grad - wanted).abs().max()))  # type: ignore[operator]
    own = dict(part.named_parameters())
    for name, parameter in full.named_parameters():
        grad, tile = parameter.grad, cuts[name]
        assert grad is not None
        errors.append(float((own[name].grad - read_slices(grad, tile)).abs().max()))  # type: ignore[operator]
    return first, sums[0], max(errors)


@pytest.mark.heavy
def test_a_team_sums_once_in_the_first_part_and_never_in_the_second() -> None:
    for first, second, error in run_ranks(2, divided, (Column(parts=(16,)), Row())):
        assert (first, second) == (1, 0)
        assert error < 1e-12


def repeated(rank: int) -> tuple[int, float]:
    """How often a block of the second stage runs in a step, and the loss."""
    from cases import Case, batch, gpt, pipeline

    from meshwright.runtime.engine import Engine

    torch.manual_seed(5)
    layers = (pipeline(4, 2, (2, "a again"), (3, "b again")),)
    case = Case(model=gpt, pipelines=layers, schedule="1f1b-2bp")
    calls = [0]
    with Engine(
        case.model(),
        case.plan,
        inputs=batch(0),
        optimizer=torch.optim.SGD,
        options=TrainingOptions(clip_norm=0),
    ) as engine:
        block = engine._own.stages[rank].stage.parts[1].module
        linear = next(m for m in block.modules() if isinstance(m, nn.Linear))
        linear.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
        loss = engine.step(lambda a, b: tuple(t[a:b] for t in batch(0))).loss
    return calls[0], loss


@pytest.mark.heavy
def test_a_recomputed_layer_is_recomputed_once() -> None:
    """Twice a micro-batch: in its forward, and in the first part of its backward."""
    assert [calls for calls, _ in run_ranks(2, repeated)] == [8, 8]
