"""The worst moments of a language model's layers by formula, as `model.trace` finds them.

The letters are those of `model.analytic`. g is the bytes of a weight's gradient before it is added
up: m, and in 16-bit precision a + m, when it has been made and cast. A gradient of a weight is
alive together with gradients of activations; what the layer kept for later operations has gone by
then, hence negative terms.
"""

from __future__ import annotations

from meshwright.model.config import LanguageModel
from meshwright.model.spec import Moment


def block_moments(c: LanguageModel, sequence: int, a: int, m: int) -> tuple[Moment, ...]:
    """The second feed-forward product's backward and, where gated, the activation's and the first
    product's."""
    low, d = a != m, float(sequence * c.width * a)
    f = float(sequence * c.hidden * max(c.chosen, 1) * a)
    weights = float(c.width * c.hidden * max(c.experts, 1))
    g = a + m if low else m
    if c.family == "gpt2":
        bias = float(c.width * a)
        made = Moment(fixed=bias, split_fixed=a * weights, row=d, split_row=f)
        return (made, Moment(fixed=bias, split_fixed=g * weights, row=d)) if low else (made,)
    chosen, apart = max(c.chosen, 1), c.family == "llama" and low
    gated = (
        Moment(split_fixed=g * weights, row=d, split_row=0.0 if apart else f),
        Moment(row=d if c.family == "llama" else (1 - chosen) * d, split_row=2 * f),
        Moment(split_fixed=2 * g * weights, row=d if low else 2 * d,
               split_row=-4 * f if low else -2 * f),
    )  # fmt: skip
    # Tokens beside their experts' outputs and these outputs' gradients, whole on every rank.
    return (*gated, Moment(row=(2 * chosen + 1) * d)) if c.experts else gated


def head_moments(
    c: LanguageModel, sequence: int, a: int, m: int
) -> tuple[tuple[Moment, ...], tuple[Moment, ...]]:
    """Of a rank that holds the layer alone, and of one of several: the loss's backward, with two
    gradients of the logits alone, a copy of the probabilities (and its cast) in a divided loss;
    then the gradient of the table, when the probabilities have gone."""
    low, logits = a != m, float(sequence * c.vocabulary)
    table = Moment(
        split_fixed=float((a + m if low else m) * c.vocabulary * c.width),
        row=0.0 if low else float(sequence * c.width * a),
        split_row=-m * logits if low else 0.0,
    )
    divided = Moment(row=float(sequence * m), split_row=(a + m if low else m) * logits)
    return (Moment(row=2 * m * logits), table), (divided, table)


def embedding_moments(c: LanguageModel, sequence: int, a: int, m: int) -> tuple[Moment, ...]:
    """The gradient of the table, beside that of the activations in both precisions; in GPT-2 also
    the forward's sum of tokens and positions."""
    row = float(sequence * c.width * (a + m if a != m else m))
    table = Moment(split_fixed=float(m * c.vocabulary * c.width), row=row)
    if c.family != "gpt2":
        return (table,)
    stream = float(sequence * c.width * a)
    return (table, Moment(fixed=float(sequence * c.width * m), row=2 * stream))


def block_fixed_saved(c: LanguageModel, sequence: int, a: int, m: int) -> float:
    """Casts of the normalisations' weights, and of rotary positions two tables for queries and two
    for keys."""
    rotary = 0 if c.family == "gpt2" else 2 * sequence * c.head * a
    return float(rotary + 2 * norm_casts(c, a, m))


def norm_casts(c: LanguageModel, a: int, m: int) -> int:
    """Of one normalisation, bytes."""
    weights = 2 * c.width if c.family == "gpt2" else c.width
    return weights * a if a != m else 0
