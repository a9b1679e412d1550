"""The LayerGraph of a language model by formula: one function per quantity, no torch.

Per row. S tokens, D width, Q = heads * head, K = kv_heads * head, F hidden, V vocabulary, E experts
of which k are chosen; a bytes of an activation, m of a weight. Written for the modules of
`model.zoo`, and held to `model.trace` of these by tests. FLOPs count a multiplication and an
addition as two, and attention in full, as torch does (Kaplan et al. 2020, with its scores).
"""

from __future__ import annotations

from dataclasses import replace
from math import gcd

from meshwright.cluster.spec import Precision
from meshwright.model.analytic_moments import (
    block_fixed_saved,
    block_moments,
    embedding_moments,
    head_moments,
    norm_casts,
)
from meshwright.model.config import LanguageModel
from meshwright.model.spec import Layer, LayerGraph, Tensor, Tied
from meshwright.records import fingerprint

INDEX = 8
"""Bytes of a token index."""


def activation_size(precision: Precision) -> int:
    """Bytes of one number of the residual stream."""
    return {"fp64": 8, "fp32": 4, "fp16": 2, "bf16": 2}[precision]


def weight_size(precision: Precision) -> int:
    """Bytes of one weight, and of what is computed in full precision (the loss)."""
    return 8 if precision == "fp64" else 4


def matrix_parameters(c: LanguageModel) -> int:
    """Weights of a block's products that tensor ranks divide: 2DQ + 2DK, and 2DF (3DF gated)."""
    inner = (2 if c.family == "gpt2" else 3) * max(c.experts, 1) * c.width * c.hidden
    return 2 * c.width * (c.heads + c.kv_heads) * c.head + inner


def split_bias_parameters(c: LanguageModel) -> int:
    """Biases of q, k, v and of the first feed-forward product: 3D + F, in GPT-2 alone."""
    return 3 * c.width + c.hidden if c.family == "gpt2" else 0


def norm_parameters(c: LanguageModel) -> int:
    """Gain, and in GPT-2 offset."""
    return 2 * c.width if c.family == "gpt2" else c.width


def block_parameters(c: LanguageModel) -> int:
    """All of a block: products, biases, two normalisations, router."""
    added_after_sums = 2 * c.width if c.family == "gpt2" else 0
    router = c.width * c.experts
    return (
        matrix_parameters(c)
        + split_bias_parameters(c)
        + added_after_sums
        + router
        + (2 * norm_parameters(c))
    )


def block_flops(c: LanguageModel, sequence: int) -> tuple[float, float]:
    """Forward FLOPs of a block's products, 2S per weight that a token meets: those that tensor
    ranks divide, and the router's."""
    idle = 3 * (c.experts - c.chosen) * c.width * c.hidden
    return 2.0 * sequence * (matrix_parameters(c) - idle), 2.0 * sequence * c.width * c.experts


def attention_flops(c: LanguageModel, sequence: int) -> float:
    """Scores and weighted values: 4 S^2 Q."""
    return 4.0 * sequence**2 * c.heads * c.head


def _norm_statistics(c: LanguageModel, precision: Precision) -> int:
    """Bytes a normalisation keeps of each token: mean and deviation, or one root mean square."""
    return 2 * activation_size(precision) if c.family == "gpt2" else 4


def block_saved_split(c: LanguageModel, sequence: int, precision: Precision) -> float:
    """Kept activations of a block that tensor ranks divide.

    Attention keeps q, k, v (with rotary positions: turned q and k beside them), its output and one
    number per head; the feed-forward module its inner activations, 2F, or 4F where gated.
    """
    q, k = c.heads * c.head, c.kv_heads * c.head
    kept = 2 * q + 2 * k if c.family == "gpt2" else 3 * q + 3 * k
    inner = 2 * c.hidden if c.family == "gpt2" else 4 * c.hidden * max(c.chosen, 1)
    return sequence * (
        (kept + inner) * activation_size(precision) + c.heads * weight_size(precision)
    )


def block_saved(c: LanguageModel, sequence: int, precision: Precision) -> float:
    """Kept activations of a block: what is divided, both normalisations' inputs and outputs, and
    with experts the routing and each token's inputs and outputs of its experts."""
    a, m = activation_size(precision), weight_size(precision)
    norms = 2 * (2 * c.width * a + _norm_statistics(c, precision))
    routing = c.chosen * (3 * INDEX + m + (a if a != m else 0) + 2 * c.width * a)
    return block_saved_split(c, sequence, precision) + sequence * (norms + routing)


def block_traffic(c: LanguageModel, sequence: int, precision: Precision) -> float:
    """Activations read and written by a block's forward, operation by operation."""
    q, k = c.heads * c.head, c.kv_heads * c.head
    if c.family == "gpt2":
        numbers = 18 * c.width + 4 * q + 4 * c.hidden + 4
    elif c.family == "llama":
        numbers = 14 * c.width + 13 * (q + k) + 8 * c.hidden
    else:
        numbers = 15 * c.width + 13 * (q + k) + 2 * c.experts
        numbers += 8 * c.chosen * (c.width + c.hidden)
    # Sorting tokens by expert, both ways: about a dozen passes over their indices.
    routing = c.chosen * (14 * INDEX + 2 * c.experts)
    return sequence * (
        numbers * activation_size(precision) + c.heads * weight_size(precision) + routing
    )


def block_workspace(c: LanguageModel, sequence: int, precision: Precision) -> float:
    """Gradients of the feed-forward module's widest activation and of its output: F + D, gated
    2F + D, and with experts k (F + D), since the output's are gone when the gate's come."""
    numbers = {
        "gpt2": c.hidden + c.width,
        "llama": 2 * c.hidden + c.width,
        "mixtral": c.chosen * (c.hidden + c.width),
    }
    return float(sequence * numbers[c.family] * activation_size(precision))


def head_saved(c: LanguageModel, sequence: int, precision: Precision) -> float:
    """Kept by the last layer: input and output of its normalisation, targets, and the logarithms of
    the probabilities in full precision."""
    norm = 2 * c.width * activation_size(precision) + _norm_statistics(c, precision)
    return sequence * (norm + INDEX + c.vocabulary * weight_size(precision))


def head_traffic(c: LanguageModel, sequence: int, precision: Precision) -> float:
    """Normalisation, logits, their cast to full precision, softmax, loss."""
    a, m = activation_size(precision), weight_size(precision)
    norm = 2 * c.width * a + (2 * a if c.family == "gpt2" else 0)
    cast = c.vocabulary * (a + m) if a != m else 0
    logits = (c.width + c.vocabulary) * a + 3 * c.vocabulary * m
    return sequence * (norm + cast + logits + INDEX)


def head_workspace(c: LanguageModel, sequence: int, precision: Precision) -> float:
    """Two gradients of the size of the logits, in full precision: 2SVm."""
    return float(2 * sequence * c.vocabulary * weight_size(precision))


def embedding_traffic(c: LanguageModel, sequence: int, precision: Precision) -> float:
    """Rows of the table, their cast, and in GPT-2 the sum with the positions."""
    a, m = activation_size(precision), weight_size(precision)
    numbers = m + (a + m if a != m else 0) + (2 * a if c.family == "gpt2" else 0)
    return float(sequence * (INDEX + c.width * numbers))


def embedding_workspace(c: LanguageModel, sequence: int, precision: Precision) -> float:
    """The gradient that arrives, and its cast (or, in GPT-2, the sum's other operand)."""
    a, m = activation_size(precision), weight_size(precision)
    return float(sequence * c.width * (a + m if a != m or c.family == "gpt2" else a))


def _block(c: LanguageModel, sequence: int, precision: Precision) -> Layer:
    divided, router = block_flops(c, sequence)
    attention = attention_flops(c, sequence)
    units = gcd(c.kv_heads, c.hidden) if c.family != "gpt2" else c.heads
    stream = float(sequence * c.width * activation_size(precision))
    sums = (stream, stream * max(c.chosen, 1))
    sizes = activation_size(precision), weight_size(precision)
    moments = block_moments(c, sequence, *sizes)
    return Layer(
        name="blocks",
        signature=_signature(c, "block", sequence),
        forward_flops=divided + router,
        attention_flops=attention,
        backward_flops=2 * (divided + router) + 2.5 * attention,
        traffic_bytes=block_traffic(c, sequence, precision),
        parameters=block_parameters(c),
        saved_bytes=block_saved(c, sequence, precision),
        workspace_bytes=block_workspace(c, sequence, precision),
        fixed_saved_bytes=block_fixed_saved(c, sequence, *sizes),
        cast_parameters=block_parameters(c) - 2 * norm_parameters(c) - _expert_parameters(c),
        moments=moments,
        tensor_moments=moments,
        tensor_units=units,
        split_parameters=matrix_parameters(c) + split_bias_parameters(c),
        split_flops=divided + attention if units > 1 else 0.0,
        split_saved_bytes=block_saved_split(c, sequence, precision) if units > 1 else 0.0,
        forward_all_reduce_bytes=sums,
        backward_all_reduce_bytes=sums,
    )


def _expert_parameters(c: LanguageModel) -> int:
    return 3 * c.experts * c.width * c.hidden


def _embedding(c: LanguageModel, sequence: int, precision: Precision) -> Layer:
    table = 0 if c.tied else c.vocabulary * c.width
    positions = c.positions * c.width if c.family == "gpt2" else 0
    moments = embedding_moments(c, sequence, activation_size(precision), weight_size(precision))
    return Layer(
        name="embedding",
        signature=_signature(c, "embedding", sequence),
        forward_flops=0.0,
        backward_flops=0.0,
        traffic_bytes=embedding_traffic(c, sequence, precision),
        parameters=table + positions,
        saved_bytes=float(INDEX * sequence),
        workspace_bytes=embedding_workspace(c, sequence, precision),
        fixed_saved_bytes=float(INDEX * sequence if positions else 0),
        moments=moments,
        tensor_moments=moments,
        split_parameters=table,
        forward_all_reduce_bytes=(float(sequence * c.width * activation_size(precision)),),
    )


def _head(c: LanguageModel, sequence: int, precision: Precision) -> Layer:
    table = 0 if c.tied else c.vocabulary * c.width
    flops = 2.0 * sequence * c.vocabulary * c.width
    narrow, size = activation_size(precision), weight_size(precision)
    alone, divided = head_moments(c, sequence, narrow, size)
    return Layer(
        name="head",
        signature=_signature(c, "head", sequence),
        forward_flops=flops,
        backward_flops=2 * flops,
        traffic_bytes=head_traffic(c, sequence, precision),
        parameters=table + norm_parameters(c),
        saved_bytes=head_saved(c, sequence, precision),
        workspace_bytes=head_workspace(c, sequence, precision),
        fixed_saved_bytes=float(norm_casts(c, narrow, size)),
        cast_parameters=table,
        moments=alone,
        tensor_moments=divided,
        split_parameters=table,
        split_flops=flops,
        split_saved_bytes=float(sequence * c.vocabulary * size),
        forward_all_reduce_bytes=(float(sequence * size),) * 3,
        backward_all_reduce_bytes=(float(sequence * c.width * activation_size(precision)),),
    )


def _signature(c: LanguageModel, kind: str, sequence: int) -> str:
    numbers = [c.width, c.heads, c.kv_heads, c.head, c.hidden, c.experts, c.chosen]
    outer = [c.vocabulary, c.positions] if kind != "block" else []
    return fingerprint([c.family, kind, sequence, *numbers, *outer])


def layer_graph(c: LanguageModel, sequence: int, precision: Precision) -> LayerGraph:
    """The planner's view of a language model: embedding, blocks, head."""
    block = _block(c, sequence, precision)
    blocks = [replace(block, name=f"blocks.{index}") for index in range(c.layers)]
    embedding, head = _embedding(c, sequence, precision), _head(c, sequence, precision)
    layers = (embedding, *blocks, head)
    size = float(sequence * c.width * activation_size(precision))
    tied = Tied(
        name="embedding.tokens.weight",
        layers=(0, len(layers) - 1),
        parameters=c.vocabulary * c.width,
        split=True,
    )
    return LayerGraph(
        name=c.name,
        sequence=sequence,
        precision=precision,
        layers=layers,
        tensors=tuple(
            Tensor(name=layer.name, bytes=size, producer=index, consumers=(index + 1,), kept=True)
            for index, layer in enumerate(layers[:-1])
        ),
        tied=(tied,) if c.tied else (),
    )
