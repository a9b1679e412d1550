"""Describes the layers of encoder-decoder models (T5, Whisper) in abstract operations."""

from __future__ import annotations

from meshwright.model.config import LanguageModel
from meshwright.model.transformer.defaults import architecture_of
from meshwright.model.transformer.forward import dense
from meshwright.model.transformer.layer_operations import Operations, Value
from meshwright.model.transformer.spec import Encoder


def _encoder(c: LanguageModel) -> Encoder:
    encoder = architecture_of(c).encoder
    assert encoder is not None
    return encoder


def embed_text(o: Operations, c: LanguageModel, source: Value) -> Value:
    """Embeds the text that the encoder reads (T5)."""
    return o.embedding("tokens", source, c.vocabulary, c.width)


def embed_speech(o: Operations, c: LanguageModel, mels: Value) -> Value:
    """Embeds frames of speech with two convolutions, of which the second halves their number
    (Whisper)."""
    a = architecture_of(c)
    x = o.activate("gelu", o.convolution("first", mels, a.mels, c.width, stride=1))
    x = o.activate("gelu", o.convolution("second", x, c.width, c.width, stride=2))
    return o.positions("positions", o.turned(x), _encoder(c).positions, 0, frozen=True)


def encoder_block(o: Operations, c: LanguageModel, x: Value) -> Value:
    """Applies attention in both directions and a feed-forward module."""
    a, encoder = architecture_of(c), _encoder(c)
    x = o.added(x, attention(o, c, "attention", o.norm("norm1", x, c.width, a.norm), None,
                             encoder.heads, causal=False))  # fmt: skip
    return o.added(x, dense(o, c, "mlp", o.norm("norm2", x, c.width, a.norm), encoder.hidden))


def encoder_norm(o: Operations, c: LanguageModel, x: Value) -> Value:
    """Normalises the encoder's output, which the decoder attends to."""
    return o.norm("norm", x, c.width, architecture_of(c).norm)


def decoder_embedding(o: Operations, c: LanguageModel, tokens: Value) -> Value:
    """Embeds the text that the decoder generates."""
    a = architecture_of(c)
    x = o.embedding("tokens", tokens, c.vocabulary, c.width)
    if a.task == "speech to text":
        x = o.positions("positions", x, c.positions, 0, frozen=False)
    return x


def decoder_block(o: Operations, c: LanguageModel, x: Value, read: Value) -> Value:
    """Applies causal self-attention, cross-attention to the encoder's output (`read`), and a
    feed-forward module."""
    norm = architecture_of(c).norm
    x = o.added(x, attention(o, c, "attention", o.norm("norm1", x, c.width, norm), None, c.heads,
                             causal=True))  # fmt: skip
    x = o.added(x, attention(o, c, "cross", o.norm("norm_cross", x, c.width, norm), read, c.heads,
                             causal=False))  # fmt: skip
    return o.added(x, dense(o, c, "mlp", o.norm("norm2", x, c.width, norm), c.hidden))


def attention(
    o: Operations, c: LanguageModel, name: str, x: Value, read: Value, heads: int, *, causal: bool
) -> Value:
    """Applies self-attention to x, or cross-attention to `read` if that is given."""
    a = architecture_of(c)
    inner = heads * c.head
    keys = a.query_bias if a.key_bias is None else a.key_bias
    other = x if read is None else read
    q = o.heads(o.linear(f"{name}.query", x, c.width, inner, bias=a.query_bias), c.head)
    k = o.heads(o.linear(f"{name}.key", other, c.width, inner, bias=keys), c.head)
    v = o.heads(o.linear(f"{name}.value", other, c.width, inner, bias=a.query_bias), c.head)
    bias = None
    if a.position == "relative" and read is None:
        bias = o.relative_bias(f"{name}.bias", x, heads, a.buckets, a.reach, both_ways=not causal)
    y = o.attention(q, k, v, causal=causal, scale=a.score_scale, bias=bias, kernel=c.kernel)
    return o.linear(f"{name}.out", o.merged(y), inner, c.width, bias=a.out_bias)
