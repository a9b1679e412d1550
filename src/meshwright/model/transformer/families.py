"""Lists model families by the `model_type` of their config.json: which fields are read, with which
defaults, and by which function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from meshwright.model.config import LanguageModel
from meshwright.model.transformer import decoders, encoders, llamas
from meshwright.model.transformer.configs import (
    BloomConfig,
    DecoderConfig,
    FalconConfig,
    Gpt2Config,
    NeoxConfig,
    OptConfig,
)
from meshwright.model.transformer.encoder_configs import (
    BertConfig,
    T5Config,
    VitConfig,
    WhisperConfig,
)
from meshwright.records import record

_SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings", "num_key_value_heads", "tie_word_embeddings", "name_or_path",
)  # fmt: skip
_ROTARY = ("rope_theta", "rope_scaling", "rope_parameters")
_LLAMA = (*_SIZES, *_ROTARY, "head_dim", "hidden_act", "rms_norm_eps")
_WINDOW = ("sliding_window", "layer_types")
_MIXTURE = (
    "num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob",
    "decoder_sparse_step", "mlp_only_layers",
)  # fmt: skip
_LATENT = (
    "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
    "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts",
    "norm_topk_prob", "first_k_dense_replace", "scoring_func", "topk_method", "n_group",
    "topk_group", "routed_scaling_factor",
)  # fmt: skip


_NAMES = {
    "kv_heads": "num_key_value_heads",
    "heads": "num_attention_heads",
    "head": "head_dim",
    "chosen": "num_experts_per_tok",
}


@record
class Family:
    """Says how the config.json of one `model_type` is read."""

    heads: tuple[str, ...]
    """Class names in `architectures` that mean this model with its training loss."""
    config: type[Any]
    """The record with the fields of such a config."""
    follows: tuple[str, ...] = ()
    """Names of the fields that are read; if empty, all fields of the record."""
    usual: Mapping[str, Any]
    """Defaults of fields that a file may leave out, as in the transformers library."""
    names: Mapping[str, str]
    """Name of a LanguageModel's size -> name of that field in the file, for messages."""
    read: Callable[[Any, str, str, str], LanguageModel]
    """Makes the LanguageModel from the record, the model's name, the path of the file and the
    `model_type`. Raises ModelError."""


def _decoder(head: str, *follows: str, **usual: Any) -> Family:
    return Family(
        heads=(f"{head}ForCausalLM",),
        config=DecoderConfig,
        follows=(*_LLAMA, *follows),
        usual=usual,
        names=_NAMES,
        read=llamas.llama,
    )


_FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        heads=("GPT2LMHeadModel",), config=Gpt2Config, usual={}, names={"heads": "n_head"},
        read=decoders.gpt2,
    ),
    "llama": _decoder("Llama", "attention_bias", "mlp_bias"),
    "mistral": _decoder(
        "Mistral", "sliding_window",
        sliding_window=4096, num_key_value_heads=8, max_position_embeddings=131072,
    ),
    "mixtral": _decoder(
        "Mixtral", "sliding_window", "num_local_experts", "num_experts_per_tok",
        num_key_value_heads=8, max_position_embeddings=131072, rms_norm_eps=1e-5, rope_theta=1e6,
    ),
    "qwen2": _decoder(
        "Qwen2", *_WINDOW, "use_sliding_window", "max_window_layers",
        qkv_bias=True, sliding_window=4096, max_window_layers=28, num_key_value_heads=32,
        max_position_embeddings=32768,
    ),
    "qwen2_moe": _decoder(
        "Qwen2Moe", *_WINDOW, *_MIXTURE, "use_sliding_window", "max_window_layers", "qkv_bias",
        "shared_expert_intermediate_size",
        qkv_bias=True, sliding_window=4096, max_window_layers=28, num_experts=60,
        num_experts_per_tok=4, moe_intermediate_size=1408, shared_expert_intermediate_size=5632,
        num_key_value_heads=16, max_position_embeddings=32768,
    ),
    "qwen3": _decoder(
        "Qwen3", *_WINDOW, "use_sliding_window", "max_window_layers", "attention_bias",
        head_dim=128, sliding_window=4096, max_window_layers=28, num_key_value_heads=32,
        max_position_embeddings=32768,
    ),
    "qwen3_moe": _decoder(
        "Qwen3Moe", *_MIXTURE, "sliding_window", "use_sliding_window", "max_window_layers",
        "attention_bias", "num_local_experts",
        sliding_window=4096, max_window_layers=28, num_experts=128, num_experts_per_tok=8,
        moe_intermediate_size=768, num_key_value_heads=4, max_position_embeddings=32768,
    ),
    "gemma": _decoder(
        "Gemma", "attention_bias", "hidden_activation",
        head_dim=256, tie_word_embeddings=True, hidden_act="gelu_pytorch_tanh",
        num_key_value_heads=16, max_position_embeddings=8192,
    ),
    "gemma2": _decoder(
        "Gemma2", *_WINDOW, "attention_bias", "hidden_activation", "query_pre_attn_scalar",
        "attn_logit_softcapping", "final_logit_softcapping",
        head_dim=256, tie_word_embeddings=True, hidden_activation="gelu_pytorch_tanh",
        sliding_window=4096, query_pre_attn_scalar=256, attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0, num_key_value_heads=4, max_position_embeddings=8192,
    ),
    "gemma3_text": _decoder(
        "Gemma3", *_WINDOW, "attention_bias", "hidden_activation", "query_pre_attn_scalar",
        "final_logit_softcapping", "rope_local_base_freq",
        "sliding_window_pattern",
        head_dim=256, tie_word_embeddings=True, hidden_activation="gelu_pytorch_tanh",
        sliding_window=4096, sliding_window_pattern=6, query_pre_attn_scalar=256, rope_theta=1e6,
        rope_local_base_freq=1e4, num_key_value_heads=4, max_position_embeddings=131072,
    ),
    "phi3": _decoder(
        "Phi3", "sliding_window", "partial_rotary_factor", "original_max_position_embeddings",
        rms_norm_eps=1e-5, original_max_position_embeddings=4096, max_position_embeddings=4096,
    ),
    "phi": _decoder(
        "Phi", "layer_norm_eps", "partial_rotary_factor",
        hidden_act="gelu_new", layer_norm_eps=1e-5, partial_rotary_factor=0.5,
    ),
    "olmo": _decoder("Olmo", "attention_bias", "clip_qkv"),
    "olmo2": _decoder("Olmo2", "attention_bias", rms_norm_eps=1e-5),
    "olmo3": _decoder("Olmo3", *_WINDOW, "attention_bias", rms_norm_eps=1e-5,
                      rope_theta=5e5, sliding_window=4096, sliding_window_pattern=4),
    "smollm3": _decoder(
        "SmolLM3", *_WINDOW, "attention_bias", "mlp_bias", "use_sliding_window", "no_rope_layers",
        "no_rope_layer_interval",
        tie_word_embeddings=True, rope_theta=2e6, num_key_value_heads=4,
        max_position_embeddings=32768,
    ),
    "deepseek_v2": _decoder(
        "DeepseekV2", *_LATENT, "attention_bias", "mlp_bias",
        q_lora_rank=1536, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128,
        v_head_dim=128, n_routed_experts=64, moe_intermediate_size=1407, n_shared_experts=2,
        first_k_dense_replace=0, scoring_func="softmax", topk_method="greedy",
    ),
    "deepseek_v3": _decoder(
        "DeepseekV3", *_LATENT, "attention_bias", "rope_interleave",
        q_lora_rank=1536, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128,
        v_head_dim=128, n_routed_experts=256, moe_intermediate_size=2048, n_shared_experts=1,
        num_experts_per_tok=8, first_k_dense_replace=3, scoring_func="sigmoid",
        topk_method="noaux_tc", n_group=8, topk_group=4, norm_topk_prob=True,
        routed_scaling_factor=2.5, max_position_embeddings=4096,
    ),
    "gpt_neox": Family(
        heads=("GPTNeoXForCausalLM",), config=NeoxConfig, usual={}, names=_NAMES,
        read=decoders.neox,
    ),
    "falcon": Family(
        heads=("FalconForCausalLM", "RWForCausalLM"), config=FalconConfig, usual={},
        names=_NAMES | {"kv_heads": "num_kv_heads"}, read=decoders.falcon,
    ),
    "bloom": Family(
        heads=("BloomForCausalLM",), config=BloomConfig, usual={}, names={"heads": "n_head"},
        read=decoders.bloom,
    ),
    "opt": Family(
        heads=("OPTForCausalLM",), config=OptConfig, usual={}, names=_NAMES, read=decoders.opt,
    ),
    "bert": Family(
        heads=("BertForMaskedLM",), config=BertConfig, usual={}, names=_NAMES, read=encoders.bert,
    ),
    "vit": Family(
        heads=("ViTForImageClassification",), config=VitConfig, usual={}, names=_NAMES,
        read=encoders.vit,
    ),
    "t5": Family(
        heads=("T5ForConditionalGeneration", "T5WithLMHeadModel"), config=T5Config, usual={},
        names={"heads": "num_heads"}, read=encoders.t5,
    ),
    "whisper": Family(
        heads=("WhisperForConditionalGeneration",), config=WhisperConfig, usual={},
        names={"heads": "decoder_attention_heads"}, read=encoders.whisper,
    ),
}  # fmt: skip

FAMILIES: Mapping[str, Family] = _FAMILIES
"""Family by `model_type`."""
