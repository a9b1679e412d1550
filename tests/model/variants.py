"""Transformers that differ from a Llama in one thing each, small enough to be traced at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from meshwright.model.config import LanguageModel
from meshwright.model.transformer.spec import Architecture, Latent, Mixture, Norm, Rotary

LLAMA = LanguageModel(
    name="llama", family="llama", vocabulary=99, positions=64, width=40, layers=2, heads=6,
    kv_heads=2, head=8, hidden=72,
    architecture=Architecture(
        norm=Norm(kind="rms"), position="rotary", rotary=Rotary(features=8), activation="silu",
        gated=True,
    ),
)  # fmt: skip
_LAYER = Norm(kind="layer", bias=True)
_BIASES = {"query_bias": True, "out_bias": True, "feed_bias": True}
_GPT = {"norm": _LAYER, "rotary": None, "activation": "gelu-tanh", "gated": False, **_BIASES}
_EXPERTS = {"experts": 4, "chosen": 2}
_LATENT = {"kv_heads": 6, "head": 12, **_EXPERTS}


def _variant(name: str, architecture: dict[str, Any], **sizes: Any) -> LanguageModel:
    assert LLAMA.architecture is not None
    return replace(
        LLAMA, name=name, architecture=replace(LLAMA.architecture, **architecture), **sizes
    )


VARIANTS = (
    _variant("plain", {}),
    _variant("all heads", {}, kv_heads=6, tied=True),
    _variant("biases", {**_BIASES, "head_bias": True}),
    _variant("gpt", {**_GPT, "position": "learned"}, tied=True),
    _variant("bloom", {**_GPT, "position": "alibi", "embedding_norm": True}, kv_heads=6),
    _variant("heads normalised", {"query_norm": "head"}),
    _variant("norms behind", {"query_norm": "all", "place": "output"}),
    _variant("side by side", {"parallel": "two norms", "norm": _LAYER, "gated": False,
                              "activation": "gelu", "rotary": Rotary(features=4)}),
    _variant("side by side, one norm", {"parallel": "one norm"}),
    _variant("norms after", {"activation": "relu", "gated": False, "place": "after",
                             "last_norm": False}),
    _variant("no gains", {"norm": Norm(kind="layer", weight=False), "clamp": 8.0}),
    _variant("gemma", {"norm": Norm(kind="rms", one_added=True), "embedding_scale": 6.3}),
    _variant("four norms", {"place": "both", "logit_cap": 30.0}),
    _variant("window", {"windows": (8, 0)}),
    _variant("window, uneven", {"windows": (7, 0)}, kv_heads=6),
    _variant("scores capped", {"score_cap": 50.0}),
    _variant("scores capped, all heads", {"score_cap": 50.0}, kv_heads=6),
    _variant("scores capped, window", {"score_cap": 50.0, "windows": (8, 0)}),
    _variant("narrow embedding", {"embedding_width": 24}),
    _variant("experts", {"mixture": Mixture()}, **_EXPERTS),
    _variant("squared", {"activation": "relu-squared", "gated": False}),
    _variant("quick", {"activation": "quick-gelu"}),
    _variant("experts of another kind", {"mixture": Mixture(), "activation": "relu"}, **_EXPERTS),
    _variant("shared expert", {"mixture": Mixture(normalised=False, shared=24, shared_gate=True,
                                                  dense=(1,), dense_hidden=60)}, **_EXPERTS),
    _variant("deepseek-v2", {
        "mixture": Mixture(normalised=False, shared=24),
        "rotary": Rotary(features=4, adjacent=True),
        "latent": Latent(key_value_rank=16, plain=8, rotary=4, value=12),
    }, **_LATENT),
    _variant("deepseek-v3", {
        "mixture": Mixture(score="sigmoid", groups=2, group_score="two best", balanced=True,
                           shared=24, scale=2.5),
        "rotary": Rotary(features=4, adjacent=True),
        "latent": Latent(query_rank=20, key_value_rank=16, plain=8, rotary=4, value=8),
    }, **_LATENT),
)  # fmt: skip
