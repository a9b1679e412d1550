"""Defines Mixtral (Jiang et al. 2024): a Llama whose feed-forward module is a mixture of SwiGLU
experts.

A router sends each token to its best `chosen` experts, and only these are computed. Tensor
parallelism divides the inner width of every expert; each rank holds the whole router.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from meshwright.model.zoo.llama import Attention, Block, TokenEmbedding
from meshwright.model.zoo.modules import INIT_STD, Linear, LossHead, RMSNorm, activation_dtype


@torch.library.custom_op("meshwright::grouped_linear", mutates_args=())
def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Multiplies each row of `x` (tokens, in) by the weight of its expert (experts, out, in).

    Rows are sorted by expert, and `counts` (experts,) tells how many rows each expert has. This is
    one operation because those numbers depend on values. Weights are cast to the dtype of `x`
    expert by expert, so that no cast of all of them is allocated.
    """
    y = x.new_empty(x.shape[0], weight.shape[1])
    sizes = counts.tolist()
    for rows, into, expert in zip(
        torch.split(x, sizes), torch.split(y, sizes), weight, strict=True
    ):
        torch.mm(rows, expert.to(x.dtype).t(), out=into)
    return y


@grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:  # noqa: ARG001
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("meshwright::grouped_linear_weight_grad", mutates_args=())
def grouped_linear_weight_grad(x: Tensor, grad: Tensor, counts: Tensor) -> Tensor:
    """Computes the gradient of the weights: for each expert, grad^T x over its rows."""
    result = x.new_empty(counts.shape[0], grad.shape[1], x.shape[1])
    sizes = counts.tolist()
    for rows, grads, into in zip(
        torch.split(x, sizes), torch.split(grad, sizes), result, strict=True
    ):
        torch.mm(grads.t(), rows, out=into)
    return result


@grouped_linear_weight_grad.register_fake
def _(x: Tensor, grad: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(counts.shape[0], grad.shape[1], x.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight, counts = ctx.saved_tensors
    grad = grad.contiguous()
    grad_x = grouped_linear(grad, weight.transpose(1, 2), counts)
    return grad_x, grouped_linear_weight_grad(x, grad, counts), None


grouped_linear.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.meshwright.grouped_linear)
def _(x_shape: Any, weight_shape: Any, *_: Any, **__: Any) -> int:
    """Counts 2 * tokens * in * out FLOPs: each row is multiplied by the weight of one expert."""
    return int(2 * x_shape[0] * weight_shape[1] * weight_shape[2])


@register_flop_formula(torch.ops.meshwright.grouped_linear_weight_grad)
def _(x_shape: Any, grad_shape: Any, *_: Any, **__: Any) -> int:
    """Counts 2 * tokens * in * out FLOPs."""
    return int(2 * x_shape[0] * x_shape[1] * grad_shape[1])


class GroupedLinear(nn.Module):
    """Applies a linear map of its own for each expert, without bias; tokens are sorted by
    expert."""

    def __init__(self, experts: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=INIT_STD)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        return cast("Tensor", grouped_linear(x.to(activation_dtype(x)), self.weight, counts))


class Experts(nn.Module):
    """Routes each token to the best SwiGLU experts by the softmax of a router (top-k)."""

    def __init__(self, width: int, hidden: int, experts: int, chosen: int) -> None:
        super().__init__()
        self.experts = experts
        self.chosen = chosen
        self.router = Linear(width, experts, bias=False)
        self.gate_up = GroupedLinear(experts, width, 2 * hidden)
        self.down = GroupedLinear(experts, hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        logits, expert = self.router(flat).topk(self.chosen, dim=-1)
        share = logits.softmax(dim=-1, dtype=torch.promote_types(torch.float32, logits.dtype))
        order = expert.flatten().argsort(stable=True)
        ids = torch.arange(self.experts, device=x.device)
        counts = (expert.flatten() == ids[:, None]).sum(dim=1)
        gate, up = self.gate_up(flat[order // self.chosen], counts).chunk(2, dim=-1)
        y = self.down(F.silu(gate) * up, counts)
        back = y[order.argsort()].view(-1, self.chosen, y.shape[-1])
        return torch.sum(back * share.to(y.dtype)[..., None], dim=1).view(x.shape)


class Mixtral(nn.Module):
    """Computes the mean loss of a Mixtral: forward(tokens, targets), both (rows, sequence)
    indices."""

    def __init__(  # noqa: PLR0913
        self,
        *,
        vocabulary: int,
        width: int,
        heads: int,
        kv_heads: int,
        layers: int,
        hidden: int,
        experts: int,
        chosen: int = 2,
        head: int | None = None,
        tied: bool = False,
        base: float = 1e6,
    ) -> None:
        super().__init__()
        head = head or width // heads
        self.embedding = TokenEmbedding(vocabulary, width)
        self.blocks = nn.ModuleList()
        for _ in range(layers):
            attention = Attention(width, heads, kv_heads, head, base)
            mlp = Experts(width, hidden, experts, chosen)
            self.blocks.append(Block(width, hidden, attention, mlp))
        self.head = LossHead(RMSNorm(width, eps=1e-5), width, vocabulary)
        if tied:
            self.head.linear.weight = self.embedding.tokens.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return cast("Tensor", self.head(x, targets))
