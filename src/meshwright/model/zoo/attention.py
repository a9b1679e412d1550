"""Computes attention with everything that transformers vary in it: sliding windows, capped scores,
ALiBi slopes and relative-position biases; with a fused kernel, or with one kernel for each step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from meshwright.model.zoo.dropout import drop, own_draws


@dataclass(frozen=True, slots=True)
class Scoring:
    """Says how scores are computed, and what is done to them."""

    scale: float | None = None
    """Factor of the scores; None means 1 / sqrt(features of a head)."""
    cap: float | None = None
    """Cap c of the scores: c * tanh(score / c)."""
    unfused: bool = False
    """True if scores, softmax, dropout and product are separate kernels."""
    dropout: float = 0.0
    """Probability with which each weight is set to 0."""
    tensor_rank: int | None = None
    """Index among the tensor-parallel ranks that share the heads, each of which drops other weights
    of its own heads; None if one rank has all heads."""

    @property
    def explicit(self) -> bool:
        """True if the scores are written to memory; no fused kernel caps them."""
        return self.unfused or self.cap is not None


FUSED_SCORING = Scoring()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: int = 0,
    scoring: Scoring = FUSED_SCORING,
    alibi: int = 0,
    bias: Tensor | None = None,
) -> Tensor:
    """Computes attention of queries, keys and values, each (rows, heads, tokens, head).

    The number of query heads must be a multiple of that of key-value heads. `window` is the number
    of tokens that a causal query attends to, its own included (0: all). A longer sequence is cut
    into pieces of that length, each of which attends to itself and to the piece before it. `alibi`
    is the number of heads with ALiBi slopes (0: none); `bias` is added to the scores.
    """
    if window and window < q.shape[2]:
        return _windowed(q, k, v, window, scoring)
    mask = _distances(alibi, q) if alibi else bias
    if not scoring.explicit and mask is None:
        width = q.shape[-1]
        if v.shape[-1] == width:
            return _fused(q, k, v, None, scoring, causal=causal)
        padded = F.pad(v, (0, width - v.shape[-1]))
        return _fused(q, k, padded, None, scoring, causal=causal)[..., : v.shape[-1]]
    if causal:
        own = _causal(q.shape[2], k.shape[2], q)
        mask = own if mask is None else mask.masked_fill(own < 0, float("-inf"))
    if not scoring.explicit and not (mask is not None and mask.requires_grad):
        return _fused(q, k, v, mask, scoring)
    return _unfused(q, k, v, mask, scoring)


def _fused(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scoring: Scoring, *, causal: bool = False
) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    with own_draws(q.device, scoring.tensor_rank if scoring.dropout else None):
        return F.scaled_dot_product_attention(
            q, k, v, mask, dropout_p=scoring.dropout, is_causal=causal, scale=scoring.scale,
            enable_gqa=grouped,
        )  # fmt: skip


def _causal(tokens: int, reads: int, like: Tensor) -> Tensor:
    """Makes a causal mask of shape (1, 1, tokens, reads): 0 where a query attends to a key, minus
    infinity elsewhere. The last query is aligned with the last key."""
    at = torch.arange(tokens, device=like.device)[:, None] + (reads - tokens)
    hidden = torch.arange(reads, device=like.device) > at
    return torch.zeros(1, 1, tokens, reads, device=like.device, dtype=like.dtype).masked_fill(
        hidden, float("-inf")
    )


def _distances(heads: int, q: Tensor) -> Tensor:
    """Gives what ALiBi (Press et al. 2022) adds to scores: minus the distance times the head's
    slope, as (1, heads, tokens, tokens)."""
    slopes = torch.tensor(slopes_of(heads), device=q.device, dtype=torch.float32)
    at = torch.arange(q.shape[2], device=q.device)
    far = (at[None, :] - at[:, None]).float()
    return (slopes[:, None, None] * far)[None].to(q.dtype)


def slopes_of(heads: int) -> list[float]:
    """Gives the ALiBi slope of each head: powers of 2^(-8 / heads). For a number of heads that is
    no power of two, those of the next smaller power of two come first, then slopes between them."""
    whole = 2 ** (heads.bit_length() - 1)
    base = 2.0 ** (-8.0 / whole)
    slopes = [base**n for n in range(1, whole + 1)]
    between = 2.0 ** (-4.0 / whole)
    return slopes + [between ** (2 * n + 1) for n in range(heads - whole)]


def bucket(far: Tensor, buckets: int, reach: int, *, both_ways: bool) -> Tensor:
    """Gives the bucket of T5's relative-position bias for each distance (Raffel et al. 2020).

    Small distances have a bucket each, larger ones share buckets of logarithmic size, and all
    beyond `reach` have the last one. With `both_ways`, half of the buckets are for keys after the
    query; otherwise keys after it count as distance 0.
    """
    first = torch.zeros_like(far)
    if both_ways:
        buckets //= 2
        first = (far > 0).long() * buckets
        far = far.abs()
    else:
        far = -far.clamp(max=0)
    exact = buckets // 2
    scale = (buckets - exact) / math.log(reach / exact)
    # Rounding must be that of single precision, which existing T5 models were trained with.
    distant = exact + ((far.clamp(min=1).float() / exact).log() * scale).long()
    return first + torch.where(far < exact, far, distant.clamp(max=buckets - 1))


def _unfused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scoring: Scoring) -> Tensor:
    """Computes the scores explicitly, as is chosen, or since no fused kernel caps them or returns
    the gradient of a bias. The softmax is computed in full precision."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scale = q.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale
    # One name for what each step makes, so that nothing lives longer than the next step needs it.
    x = torch.matmul(q * scale, k.transpose(2, 3))
    if scoring.cap is not None:
        x = torch.tanh(x / scoring.cap) * scoring.cap
    if mask is not None:
        x = x + mask
    x = x.to(torch.promote_types(torch.float32, q.dtype))
    x = x.softmax(dim=-1).to(q.dtype)
    if scoring.dropout:
        x = drop(x, scoring.dropout, scoring.tensor_rank)
    return torch.matmul(x, v)


def _windowed(q: Tensor, k: Tensor, v: Tensor, window: int, scoring: Scoring) -> Tensor:
    """Computes attention piece by piece: the first piece is causal, and each later one attends to
    itself and to the piece before it."""
    rows, heads, tokens, _ = q.shape
    short = -tokens % window
    if short:
        q, k, v = (F.pad(each, (0, 0, 0, short)) for each in (q, k, v))
    pieces = (tokens + short) // window
    own_q, own_k, own_v = (each[:, :, :window] for each in (q, k, v))
    first = _causally(own_q, own_k, own_v, scoring)
    own = q.transpose(1, 2)[:, window:].reshape(rows * (pieces - 1), window, heads, -1)
    own = own.transpose(1, 2)
    # Keys and values of a piece overlap with those of the next: (rows, heads, pieces, 2 * window,
    # head) is a view that is then copied.
    keys, values = (
        each.unfold(2, 2 * window, window).transpose(3, 4).movedim(2, 1).flatten(0, 1)
        for each in (k, v)
    )
    at = torch.arange(window, device=q.device)[:, None] + window
    back = at - torch.arange(2 * window, device=q.device)
    mask = torch.zeros(1, 1, window, 2 * window, device=q.device, dtype=q.dtype).masked_fill(
        (back < 0) | (back >= window), float("-inf")
    )
    attention = _unfused if scoring.explicit else _fused
    later = attention(own, keys, values, mask, scoring)
    later = later.transpose(1, 2).reshape(rows, (pieces - 1) * window, heads, v.shape[-1])
    # In memory, tokens come before heads, so that the next product reads a contiguous tensor.
    return torch.cat((first.transpose(1, 2), later), dim=1)[:, :tokens].transpose(1, 2)


def _causally(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    if not scoring.explicit:
        return _fused(q, k, v, None, scoring, causal=True)
    return _unfused(q, k, v, _causal(q.shape[2], k.shape[2], q), scoring)
