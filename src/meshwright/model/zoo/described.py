"""Builds torch modules for every transformer that `model.transformer.forward` describes.

Network is the whole model, DescribedLayer one of its layers. Computed carries out the operations
that a layer's description calls, with the parameters of that layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshwright.model import shard
from meshwright.model.config import LanguageModel
from meshwright.model.shard import Split
from meshwright.model.transformer.counted import Counted
from meshwright.model.transformer.counted_graph import layer_inputs
from meshwright.model.transformer.layer_list import (
    LayerDescription,
    inputs_of,
    layers_of,
    tied_parameters,
)
from meshwright.model.transformer.module_specs import ModuleSpec
from meshwright.model.transformer.rotary import frequencies
from meshwright.model.transformer.spec import FUSED, Activation, AttentionKernel, Norm, Rotary
from meshwright.model.zoo.activations import ACTIVATIONS
from meshwright.model.zoo.attention import Scoring, attend, bucket
from meshwright.model.zoo.experts import ConfiguredExperts
from meshwright.model.zoo.modules import (
    INIT_STD,
    CrossEntropy,
    Embedding,
    Linear,
    RMSNorm,
    activation_dtype,
    without_autocast,
)


class DescribedTransformer(nn.Module):
    """Runs a transformer as its description says: it takes the tensors of a batch and gives the
    mean loss."""

    def __init__(self, c: LanguageModel) -> None:
        super().__init__()
        layers = layers_of(c)
        self.inputs = tuple(each.name for each in inputs_of(c, 8))
        self.wiring = tuple((layer.name, layer.reads) for layer in layers)
        made = {layer.name: DescribedLayer(layer, c) for layer in layers}
        for name, layer in made.items():
            place, _, number = name.partition(".")
            if number:
                if not hasattr(self, place):
                    self.add_module(place, nn.ModuleList())
                cast("nn.ModuleList", self.get_submodule(place)).append(layer)
            else:
                self.add_module(name, layer)
        for own, first in tied_parameters(c).items():
            module, _, attribute = own.rpartition(".")
            setattr(self.get_submodule(module), attribute, self.get_parameter(first))

    def forward(self, *batch: Tensor) -> Tensor:
        values: dict[str, Tensor] = dict(zip(self.inputs, batch, strict=True))
        for name, reads in self.wiring:
            values[name] = self.get_submodule(name)(*(values[each] for each in reads))
        return values[self.wiring[-1][0]]


class DescribedLayer(nn.Module):
    """Runs one layer; it has the submodules that the layer's description needs (found by counting
    it once)."""

    def __init__(self, layer: LayerDescription, c: LanguageModel) -> None:
        super().__init__()
        self.kind = layer.kind
        self.compute = layer.compute
        self.tensor_units = layer.units
        self.tensor_split: dict[str, Split] = {}
        self.tensor_rank: int | None = None
        counted = Counted(a=4, m=4)
        layer.compute(counted, *layer_inputs(counted, layer, c, 1, 8))
        for name, made in counted.modules.items():
            _put(self, name, _module(made, _std(made, c)))
            if made.split is not None:
                self.tensor_split[name] = made.split
        self.tensor_split |= counted.splits

    def forward(self, *values: Tensor) -> Tensor:
        return cast("Tensor", self.compute(TorchOperations(self), *values))


def _put(owner: nn.Module, name: str, module: nn.Module) -> None:
    *places, last = name.split(".")
    for place in places:
        if not hasattr(owner, place):
            owner.add_module(place, nn.Module())
        owner = owner.get_submodule(place)
    owner.add_module(last, module)


def _std(made: ModuleSpec, c: LanguageModel) -> float:
    """Gives the standard deviation of initial weights. GPT-2 divides that of projections into the
    residual stream by the square root of their number, 2 * layers."""
    shrunk = c.family == "gpt2" and isinstance(made.split, shard.Row)
    return INIT_STD / (2 * c.layers) ** 0.5 if shrunk else INIT_STD


def _module(made: ModuleSpec, std: float) -> nn.Module:
    match made.kind:
        case "linear":
            return Linear(*made.sizes, bias=made.bias, std=std)
        case "table":
            entries, width = made.sizes
            return Embedding(entries, width)
        case "sines":
            return SinusoidalPositions(*made.sizes)
        case "row":
            return TokenParameter(*made.sizes)
        case "convolution":
            return Convolution(*made.sizes)
        case "experts":
            assert made.model is not None
            return ConfiguredExperts(made.model)
        case "loss":
            return CrossEntropy()
    assert made.norm is not None
    return _norm(made.sizes[0], made.norm)


def _norm(width: int, norm: Norm) -> nn.Module:
    if norm.kind == "rms":
        return (
            UnitOffsetRMSNorm(width, norm.epsilon)
            if norm.one_added
            else RMSNorm(width, norm.epsilon)
        )
    return ConfiguredLayerNorm(width, norm)


class UnitOffsetRMSNorm(nn.Module):
    """Normalises by the root mean square, with a gain of 1 + weight (Gemma)."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x):
            return F.rms_norm(x, (x.shape[-1],), (1 + self.weight).to(x.dtype), self.epsilon)


class ConfiguredLayerNorm(nn.LayerNorm):
    """Applies layer normalisation with optional weight and bias, and keeps the dtype of its
    input."""

    def __init__(self, width: int, norm: Norm) -> None:
        super().__init__(width, norm.epsilon, elementwise_affine=norm.weight, bias=norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x):
            weight = None if self.weight is None else self.weight.to(x.dtype)
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class Convolution(nn.Conv1d):
    """Convolves three neighbouring tokens: (rows, inputs, tokens) to (rows, outputs, tokens /
    stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__(inputs, outputs, kernel_size=3, stride=stride, padding=1)


class SinusoidalPositions(Embedding):
    """Holds a position table of sines and cosines, which is not trained (Vaswani et al. 2017)."""

    def __init__(self, entries: int, width: int) -> None:
        super().__init__(entries, width)
        self.weight.requires_grad_(False)

    def reset_parameters(self) -> None:
        entries, width = self.weight.shape
        steps = math.log(10000) / (width // 2 - 1)
        at = torch.arange(width // 2, device=self.weight.device)
        turns = torch.exp(-steps * at)
        angles = torch.arange(entries, device=self.weight.device)[:, None] * turns
        self.weight.data.copy_(torch.cat((angles.sin(), angles.cos()), dim=1))


class TokenParameter(nn.Module):
    """Holds the features of one token as a parameter, such as ViT's class token."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=INIT_STD)


class TorchOperations:
    """Implements `transformer.layer_operations.Operations` with torch and the parameters of one
    layer."""

    def __init__(self, layer: DescribedLayer) -> None:
        self._layer = layer

    def _of(self, name: str) -> Any:
        return self._layer.get_submodule(name)

    def linear(
        self, name: str, x: Tensor, inputs: int, outputs: int, *, bias: bool = False,
        split: Split | None = None,
    ) -> Tensor:  # fmt: skip
        return cast("Tensor", self._of(name)(x))

    def embedding(
        self, name: str, index: Tensor, entries: int, width: int, *, split: Split | None = None
    ) -> Tensor:
        return cast("Tensor", self._of(name)(index))

    def positions(self, name: str, x: Tensor, entries: int, offset: int, *, frozen: bool) -> Tensor:
        index = torch.arange(offset, offset + x.shape[1], device=x.device)
        return x + cast("Tensor", self._of(name)(index))

    def added_row(self, name: str, x: Tensor, entries: int) -> Tensor:
        row: Tensor = self._of(name).weight[0]
        return x + row.to(x.dtype)

    def prepended(self, name: str, x: Tensor) -> Tensor:
        first = self._of(name).weight.to(x.dtype).expand(x.shape[0], -1, -1)
        return torch.cat((first, x), dim=1)

    def patches(self, pixels: Tensor, patch: tuple[int, int]) -> Tensor:
        down, across = patch
        rows, channels, height, width = pixels.shape
        cut = pixels.view(rows, channels, height // down, down, width // across, across)
        tokens = cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return tokens.to(activation_dtype(tokens))

    def convolution(
        self, name: str, x: Tensor, inputs: int, outputs: int, *, stride: int
    ) -> Tensor:
        return cast("Tensor", self._of(name)(x))

    def turned(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)

    def first_token(self, x: Tensor) -> Tensor:
        return x[:, 0]

    def relative_bias(
        self, name: str, x: Tensor, heads: int, buckets: int, reach: int, *, both_ways: bool
    ) -> Tensor:
        at = torch.arange(x.shape[1], device=x.device)
        index = bucket(at[None, :] - at[:, None], buckets, reach, both_ways=both_ways)
        return cast("Tensor", self._of(name)(index)).permute(2, 0, 1)[None]

    def norm(self, name: str, x: Tensor, width: int, norm: Norm) -> Tensor:
        return cast("Tensor", self._of(name)(x))

    def parts(self, x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        own = [x.shape[-1] * size // sum(sizes) for size in sizes]
        return list(torch.split(x, own, dim=-1))

    def heads(self, x: Tensor, head: int) -> Tensor:
        return x.view(*x.shape[:-1], -1, head).transpose(1, 2)

    def merged(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)

    def rotate(self, x: Tensor, rotary: Rotary) -> Tensor:
        x = x.transpose(1, 2)
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        with without_autocast(x):
            turns, magnitude = frequencies(rotary, x.shape[1])
            steps = torch.tensor(turns, device=x.device, dtype=exact)
            positions = torch.arange(x.shape[1], device=x.device, dtype=exact)
            angles = positions[:, None, None] * steps
            cos, sin = angles.cos(), angles.sin()
            if magnitude != 1.0:
                cos, sin = cos * magnitude, sin * magnitude
            cos, sin = cos.to(x.dtype), sin.to(x.dtype)
            turned, rest = x[..., : rotary.features], x[..., rotary.features :]
            if rotary.adjacent:
                left, right = turned[..., 0::2], turned[..., 1::2]
            else:
                left, right = turned.chunk(2, dim=-1)
            pieces = [left * cos - right * sin, right * cos + left * sin]
            whole = torch.cat((*pieces, rest) if rest.shape[-1] else pieces, dim=-1)
        # The transpose comes last, so that the output of attention is contiguous for the product
        # that reads it.
        return whole.transpose(1, 2)

    def common_head(self, x: Tensor, like: Tensor) -> Tensor:
        return self.joined(like, x.expand(-1, like.shape[1], -1, -1))

    def joined(self, x: Tensor, y: Tensor) -> Tensor:
        # In memory, tokens come before heads, as in the other inputs of attention.
        return torch.cat((x.transpose(1, 2), y.transpose(1, 2)), dim=-1).transpose(1, 2)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window: int = 0,
        scale: float | None = None, cap: float | None = None, alibi: int = 0,
        bias: Tensor | None = None, kernel: AttentionKernel = FUSED,
    ) -> Tensor:  # fmt: skip
        scoring = Scoring(
            scale, cap, unfused=kernel.unfused, tensor_rank=self._layer.tensor_rank,
            dropout=kernel.dropout if self._layer.training else 0.0,
        )  # fmt: skip
        return attend(q, k, v, causal=causal, window=window, scoring=scoring, alibi=alibi,
                      bias=bias)  # fmt: skip

    def activate(self, kind: Activation, x: Tensor) -> Tensor:
        return ACTIVATIONS[kind](x)

    def product(self, x: Tensor, y: Tensor) -> Tensor:
        return x * y

    def added(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def scaled(self, x: Tensor, factor: float) -> Tensor:
        return x * factor

    def clamped(self, x: Tensor, limit: float) -> Tensor:
        return x.clamp(-limit, limit)

    def capped(self, x: Tensor, cap: float) -> Tensor:
        return torch.tanh(x / cap) * cap

    def gated(self, gate: Tensor, x: Tensor) -> Tensor:
        return torch.sigmoid(gate) * x

    def experts(self, name: str, x: Tensor, c: LanguageModel) -> Tensor:
        return cast("Tensor", self._of(name)(x))

    def loss(
        self, name: str, logits: Tensor, targets: Tensor, *, split: Split | None = None
    ) -> Tensor:
        return cast("Tensor", self._of(name)(logits, targets))
