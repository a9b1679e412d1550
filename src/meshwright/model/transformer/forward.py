"""Describes what each layer of a transformer computes, in abstract operations.

This is the only description: `counted_graph` counts it, and `model.zoo.described` executes it. In
every function, `o` carries out the operations and `c` has the model's sizes and architecture.
"""

from __future__ import annotations

from math import gcd

from meshwright.model.config import LanguageModel
from meshwright.model.shard import Column, Row, Vocabulary, VocabularyHead, VocabularyLoss
from meshwright.model.transformer.defaults import architecture_of
from meshwright.model.transformer.layer_operations import Operations, Value
from meshwright.model.transformer.spec import Architecture, Norm, Picture, Rotary

COMPRESSED = Norm(kind="rms", epsilon=1e-6)
"""The norm of compressed queries, keys and values in latent attention; its epsilon differs from
that of the blocks (DeepSeek)."""


def tensor_units(c: LanguageModel, block: int) -> int:
    """Gives the number that a legal tensor-parallel width must divide, for one block."""
    a = architecture_of(c)
    # Tensor parallelism is not supported (1) where a rank with some of the heads would need more:
    # norms over all heads, compressed values that all heads read, slopes or biases of each head.
    if a.picture or a.query_norm or a.latent is not None or a.position in ("alibi", "relative"):
        return 1
    if a.mixture is not None and block not in a.mixture.dense:
        shared = a.mixture.shared
        return gcd(c.kv_heads, c.hidden, *([shared] if shared else []))
    return gcd(c.kv_heads, feed_width(c, block))


def feed_width(c: LanguageModel, block: int) -> int:
    """Gives the inner width of a block's feed-forward module, or of one of its experts."""
    mixture = architecture_of(c).mixture
    return mixture.dense_hidden if mixture and block in mixture.dense else c.hidden


def embedding(o: Operations, c: LanguageModel, tokens: Value) -> Value:
    """Describes the first layer: it embeds tokens or patches and adds positions and segments."""
    a = architecture_of(c)
    if a.picture is not None:
        return _embedded_patches(o, c, a.picture, tokens)
    width = a.embedding_width or c.width
    x = o.embedding("tokens", tokens, c.vocabulary, width, split=Vocabulary())
    if a.embedding_scale is not None:
        x = o.scaled(x, a.embedding_scale)
    if a.embedding_width:
        x = o.linear("project", x, width, c.width)
    if a.position == "learned":
        x = o.positions("positions", x, c.positions, a.position_offset, frozen=False)
    if a.segments:
        x = o.added_row("segments", x, a.segments)
    if a.embedding_norm:
        x = o.norm("norm", x, c.width, a.norm)
    return x


def patches_of(picture: Picture) -> int:
    """Gives the number of patches that a picture is cut into."""
    (height, width), (down, across) = picture.size, picture.patch
    return (height // down) * (width // across)


def _embedded_patches(o: Operations, c: LanguageModel, picture: Picture, pixels: Value) -> Value:
    """Embeds each patch with a linear map, and puts a class token before the patches."""
    numbers = picture.channels * picture.patch[0] * picture.patch[1]
    x = o.linear("patches", o.patches(pixels, picture.patch), numbers, c.width, bias=True)
    x = o.prepended("class_token", x)
    return o.positions("positions", x, patches_of(picture) + 1, 0, frozen=False)


def block(o: Operations, c: LanguageModel, x: Value, *, number: int) -> Value:
    """Describes a block: attention and feed-forward module, each added to the residual stream."""
    a = architecture_of(c)

    def norm(name: str, value: Value) -> Value:
        return o.norm(name, value, c.width, a.norm)

    if a.parallel:
        read = norm("norm1", x)
        attended = self_attention(o, c, number, read)
        fed = feed_forward(o, c, number, norm("norm2", x) if a.parallel == "two norms" else read)
        return o.added(o.added(x, attended), fed)
    if a.place == "before":
        x = o.added(x, self_attention(o, c, number, norm("norm1", x)))
        return o.added(x, feed_forward(o, c, number, norm("norm2", x)))
    if a.place == "after":
        x = norm("norm1", o.added(x, self_attention(o, c, number, x)))
        return norm("norm2", o.added(x, feed_forward(o, c, number, x)))
    if a.place == "output":
        x = o.added(x, norm("norm1", self_attention(o, c, number, x)))
        return o.added(x, norm("norm2", feed_forward(o, c, number, x)))
    x = o.added(x, norm("norm1_after", self_attention(o, c, number, norm("norm1", x))))
    return o.added(x, norm("norm2_after", feed_forward(o, c, number, norm("norm2", x))))


def _rotary(a: Architecture, number: int) -> Rotary | None:
    if number in a.unrotated:
        return None
    windowed = bool(a.windows) and a.windows[number] > 0
    return a.local_rotary if windowed and a.local_rotary else a.rotary


def self_attention(o: Operations, c: LanguageModel, number: int, x: Value) -> Value:
    """Describes self-attention, in which each key-value head serves a group of query heads."""
    a = architecture_of(c)
    if a.latent is not None:
        return latent_attention(o, c, x)
    q, k, v = _projected(o, c, x)
    if a.clamp is not None:
        q, k, v = (o.clamped(each, a.clamp) for each in (q, k, v))
    if a.query_norm == "all":
        q = o.norm("attention.query_norm", q, c.heads * c.head, a.norm)
        k = o.norm("attention.key_norm", k, c.kv_heads * c.head, a.norm)
    q, k, v = (o.heads(each, c.head) for each in (q, k, v))
    if a.query_norm == "head":
        q = o.norm("attention.query_norm", q, c.head, a.norm)
        k = o.norm("attention.key_norm", k, c.head, a.norm)
    if (rotary := _rotary(a, number)) is not None:
        q, k = o.rotate(q, rotary), o.rotate(k, rotary)
    y = o.attention(
        q, k, v,
        causal=a.task == "next token",
        window=a.windows[number] if a.windows else 0,
        scale=a.score_scale,
        cap=a.score_cap,
        alibi=c.heads if a.position == "alibi" else 0,
        kernel=c.kernel,
    )  # fmt: skip
    return o.linear("attention.out", o.merged(y), c.heads * c.head, c.width, bias=a.out_bias,
                    split=Row())  # fmt: skip


def _projected(o: Operations, c: LanguageModel, x: Value) -> tuple[Value, Value, Value]:
    """Computes queries, keys and values in one product."""
    sizes = (c.heads * c.head, c.kv_heads * c.head, c.kv_heads * c.head)
    qkv = o.linear("attention.qkv", x, c.width, sum(sizes), bias=architecture_of(c).query_bias,
                   split=Column(parts=sizes))  # fmt: skip
    q, k, v = o.parts(qkv, sizes)
    return q, k, v


def latent_attention(o: Operations, c: LanguageModel, x: Value) -> Value:
    """Describes multi-head latent attention as in training, where keys and values are decompressed
    for every head (DeepSeek-V2, section 2.1)."""
    a = architecture_of(c)
    latent, rotary = a.latent, a.rotary
    assert latent is not None
    assert rotary is not None
    head = latent.plain + latent.rotary
    if latent.query_rank:
        low = o.linear("attention.query_down", x, c.width, latent.query_rank, bias=a.query_bias)
        low = o.norm("attention.query_norm", low, latent.query_rank, COMPRESSED)
        q = o.linear("attention.query_up", low, latent.query_rank, c.heads * head)
    else:
        q = o.linear("attention.query", x, c.width, c.heads * head)
    down = o.linear("attention.key_value_down", x, c.width, latent.key_value_rank + latent.rotary,
                    bias=a.query_bias)  # fmt: skip
    low, common = o.parts(down, (latent.key_value_rank, latent.rotary))
    low = o.norm("attention.key_value_norm", low, latent.key_value_rank, COMPRESSED)
    kv = o.linear("attention.key_value_up", low, latent.key_value_rank,
                  c.heads * (latent.plain + latent.value))  # fmt: skip
    plain, turned = o.parts(o.heads(q, head), (latent.plain, latent.rotary))
    q = o.joined(plain, o.rotate(turned, rotary))
    k, v = o.parts(o.heads(kv, latent.plain + latent.value), (latent.plain, latent.value))
    k = o.common_head(o.rotate(o.heads(common, latent.rotary), rotary), k)
    y = o.attention(q, k, v, causal=True, scale=a.score_scale, kernel=c.kernel)
    return o.linear("attention.out", o.merged(y), c.heads * latent.value, c.width, bias=a.out_bias)


def feed_forward(o: Operations, c: LanguageModel, number: int, x: Value) -> Value:
    """Describes the feed-forward module of a block, or its mixture of experts."""
    a = architecture_of(c)
    if a.mixture is None or number in a.mixture.dense:
        return dense(o, c, "mlp", x, feed_width(c, number))
    y = o.experts("mlp", x, c)
    if a.mixture.shared:
        common = dense(o, c, "mlp.shared", x, a.mixture.shared)
        if a.mixture.shared_gate:
            common = o.gated(o.linear("mlp.shared_gate", x, c.width, 1), common)
        y = o.added(y, common)
    return y


def dense(o: Operations, c: LanguageModel, name: str, x: Value, hidden: int) -> Value:
    """Describes a feed-forward module: two linear maps with an activation, possibly gated, between
    them."""
    a = architecture_of(c)
    if a.gated:
        both = o.linear(f"{name}.gate_up", x, c.width, 2 * hidden, bias=a.feed_bias,
                        split=Column(parts=(hidden, hidden)))  # fmt: skip
        gate, up = o.parts(both, (hidden, hidden))
        inner = o.product(o.activate(a.activation, gate), up)
    else:
        up = o.linear(f"{name}.up", x, c.width, hidden, bias=a.feed_bias, split=Column())
        inner = o.activate(a.activation, up)
    return o.linear(f"{name}.down", inner, hidden, c.width, bias=a.feed_bias, split=Row())


def head(o: Operations, c: LanguageModel, x: Value, targets: Value) -> Value:
    """Describes the last layer: normalisation, projection to the vocabulary or to classes, and mean
    loss."""
    a = architecture_of(c)
    width = a.embedding_width or c.width
    if a.last_norm:
        x = o.norm("norm", x, c.width, a.norm)
    if a.embedding_width:
        x = o.linear("project", x, c.width, width)
    if a.head_transform:
        x = o.activate(a.activation, o.linear("transform", x, c.width, c.width, bias=True))
        x = o.norm("transform_norm", x, c.width, a.norm)
    if a.logit_scale is not None:
        x = o.scaled(x, a.logit_scale)
    if a.picture is not None:
        logits = o.linear("linear", o.first_token(x), width, a.picture.classes, bias=True)
        return o.loss("loss", logits, targets)
    logits = o.linear("linear", x, width, c.vocabulary, bias=a.head_bias, split=VocabularyHead())
    if a.logit_cap is not None:
        logits = o.capped(logits, a.logit_cap)
    return o.loss("loss", logits, targets, split=VocabularyLoss())
