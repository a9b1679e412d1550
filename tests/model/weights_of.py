"""Where models of transformers keep what our modules keep: a table for each layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from meshwright.model.config import LanguageModel
from meshwright.records import record

Arrange = Callable[[Tensor, LanguageModel], Tensor]


@record
class Layout:
    """Our module -> theirs; `a + b` are two, one behind the other; `a | b` is the first that is
    there. Names of a block's modules are within the block."""

    block: str
    """The path of block n, less the number."""
    names: Mapping[str, str]
    arranged: Mapping[str, Arrange] | None = None
    """What is done to a tensor of a module, or of a block's module."""


def _turned(x: Tensor, _c: LanguageModel) -> Tensor:
    """Of (inputs, outputs)."""
    return x.t() if x.dim() == 2 else x


def _by_group(x: Tensor, c: LanguageModel) -> Tensor:
    """Of groups of heads: the queries of each, its key, its value."""
    groups = x.unflatten(0, (c.kv_heads, c.heads // c.kv_heads + 2, c.head))
    q, k, v = groups[:, :-2], groups[:, -2], groups[:, -1]
    return torch.cat((q.flatten(0, 2), k.flatten(0, 1), v.flatten(0, 1)))


_LLAMA = Layout(
    block="model.layers.",
    names={
        "embedding.tokens": "model.embed_tokens",
        "norm1": "input_layernorm",
        "attention.qkv": "self_attn.q_proj + self_attn.k_proj + self_attn.v_proj",
        "attention.query_norm": "self_attn.q_norm",
        "attention.key_norm": "self_attn.k_norm",
        "attention.out": "self_attn.o_proj",
        "norm2": "post_attention_layernorm",
        "mlp.router": "mlp.gate",
        "mlp.gate_up": "mlp.gate_proj + mlp.up_proj | mlp.experts.gate_up_proj",
        "mlp.down": "mlp.down_proj | mlp.experts.down_proj",
        "mlp.shared.gate_up": "mlp.shared_expert.gate_proj + mlp.shared_expert.up_proj",
        "mlp.shared.down": "mlp.shared_expert.down_proj",
        "mlp.shared_gate": "mlp.shared_expert_gate",
        "head.norm": "model.norm",
        "head.linear": "lm_head",
    },
)


def _like_llama(names: Mapping[str, str]) -> Layout:
    return Layout(block=_LLAMA.block, names={**_LLAMA.names, **names})


_FOUR_NORMS = _like_llama({
    "norm1_after": "post_attention_layernorm",
    "norm2": "pre_feedforward_layernorm",
    "norm2_after": "post_feedforward_layernorm",
})  # fmt: skip
_NORMS_BEHIND = _like_llama({
    "norm1": "post_attention_layernorm",
    "norm2": "post_feedforward_layernorm",
})  # fmt: skip
_DEEPSEEK = _like_llama({
    "attention.query": "self_attn.q_proj",
    "attention.query_down": "self_attn.q_a_proj",
    "attention.query_norm": "self_attn.q_a_layernorm",
    "attention.query_up": "self_attn.q_b_proj",
    "attention.key_value_down": "self_attn.kv_a_proj_with_mqa",
    "attention.key_value_norm": "self_attn.kv_a_layernorm",
    "attention.key_value_up": "self_attn.kv_b_proj",
    "mlp": "mlp.gate.e_score_correction_bias",
    "mlp.shared.gate_up": "mlp.shared_experts.gate_proj + mlp.shared_experts.up_proj",
    "mlp.shared.down": "mlp.shared_experts.down_proj",
})  # fmt: skip
_FALCON = Layout(
    block="transformer.h.",
    names={
        "embedding.tokens": "transformer.word_embeddings",
        "embedding.norm": "transformer.word_embeddings_layernorm",
        "norm1": "input_layernorm | ln_attn",
        "attention.qkv": "self_attention.query_key_value",
        "attention.out": "self_attention.dense",
        "norm2": "post_attention_layernorm | ln_mlp",
        "mlp.up": "mlp.dense_h_to_4h",
        "mlp.down": "mlp.dense_4h_to_h",
        "head.norm": "transformer.ln_f",
        "head.linear": "lm_head",
    },
    arranged={"attention.qkv": _by_group},
)

LAYOUTS: dict[str, Layout] = {
    "gpt2": Layout(
        block="transformer.h.",
        names={
            "embedding.tokens": "transformer.wte",
            "embedding.positions": "transformer.wpe",
            "norm1": "ln_1",
            "attention.qkv": "attn.c_attn",
            "attention.out": "attn.c_proj",
            "norm2": "ln_2",
            "mlp.up": "mlp.c_fc",
            "mlp.down": "mlp.c_proj",
            "head.norm": "transformer.ln_f",
            "head.linear": "lm_head",
        },
        arranged=dict.fromkeys(("attention.qkv", "attention.out", "mlp.up", "mlp.down"), _turned),
    ),
    **dict.fromkeys(
        ("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma",
         "olmo", "smollm3"), _LLAMA),
    **dict.fromkeys(("gemma2", "gemma3_text"), _FOUR_NORMS),
    **dict.fromkeys(("olmo2", "olmo3"), _NORMS_BEHIND),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), _DEEPSEEK),
    "phi3": _like_llama({"attention.qkv": "self_attn.qkv_proj", "mlp.gate_up": "mlp.gate_up_proj"}),
    "phi": _like_llama({
        "attention.out": "self_attn.dense", "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2",
        "head.norm": "model.final_layernorm",
    }),
    "gpt_neox": Layout(
        block="gpt_neox.layers.",
        names={
            "embedding.tokens": "gpt_neox.embed_in",
            "norm1": "input_layernorm",
            "attention.qkv": "attention.query_key_value",
            "attention.out": "attention.dense",
            "norm2": "post_attention_layernorm",
            "mlp.up": "mlp.dense_h_to_4h",
            "mlp.down": "mlp.dense_4h_to_h",
            "head.norm": "gpt_neox.final_layer_norm",
            "head.linear": "lm_head",
        },
        arranged={"attention.qkv": _by_group},
    ),
    "falcon": _FALCON,
    "bloom": _FALCON,
    "opt": Layout(
        block="model.decoder.layers.",
        names={
            "embedding.tokens": "model.decoder.embed_tokens",
            "embedding.project": "model.decoder.project_in",
            "embedding.positions": "model.decoder.embed_positions",
            "norm1": "self_attn_layer_norm",
            "attention.qkv": "self_attn.q_proj + self_attn.k_proj + self_attn.v_proj",
            "attention.out": "self_attn.out_proj",
            "norm2": "final_layer_norm",
            "mlp.up": "fc1",
            "mlp.down": "fc2",
            "head.norm": "model.decoder.final_layer_norm",
            "head.project": "model.decoder.project_out",
            "head.linear": "lm_head",
        },
    ),
}  # fmt: skip
"""By model type."""


def ours(names: list[str], theirs: Mapping[str, Tensor], c: LanguageModel) -> dict[str, Tensor]:
    """Tensors by our `names` from those of transformers, each of which must be used."""
    layout, unused, found = LAYOUTS[c.family], set(theirs), {}
    for name in names:
        module, _, kind = name.rpartition(".")
        prefix, within = "", module
        if module.startswith("blocks."):
            _, number, within = module.split(".", 2)
            prefix = f"{layout.block}{number}."
        for way in layout.names[within].split(" | "):
            paths = [prefix + each for each in way.split(" + ")]
            keys = [path if path in theirs else f"{path}.{kind}" for path in paths]
            if all(key in theirs for key in keys):
                break
        unused.difference_update(keys)
        whole = torch.cat([theirs[key] for key in keys])
        arrange = (layout.arranged or {}).get(within)
        found[name] = arrange(whole, c) if arrange else whole
    assert not unused, f"transformers has parameters that we have not: {sorted(unused)}"
    return found
