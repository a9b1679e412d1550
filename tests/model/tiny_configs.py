"""A tiny configuration of every family, and of each of the forms that it comes in."""

from __future__ import annotations

from typing import Any

LENGTH = 24
"""Tokens of the sequences that these are run on: more than windows and first trainings have."""

_SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "intermediate_size": 72, "vocab_size": 61,
          "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": 1,
          "eos_token_id": 2}  # fmt: skip
_FOUR = {"num_hidden_layers": 4}
_HALVES = ["sliding_attention", "full_attention"]
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 16}  # fmt: skip
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
_QWEN2 = {**_FOUR, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
_QWEN2_MOE = {**_EXPERTS, **_FOUR, "shared_expert_intermediate_size": 28,
              "decoder_sparse_step": 1, "use_sliding_window": False}  # fmt: skip
_GEMMA = {"head_dim": 20, "hidden_activation": "gelu_pytorch_tanh"}
_DEEPSEEK = {"num_key_value_heads": 4, "kv_lora_rank": 16, "qk_nope_head_dim": 12,
             "qk_rope_head_dim": 8, "v_head_dim": 14, "num_experts_per_tok": 3,
             "moe_intermediate_size": 20, "n_routed_experts": 8, "n_shared_experts": 2,
             "first_k_dense_replace": 1, "num_hidden_layers": 3}  # fmt: skip
_DEEPSEEK_YARN = {**_YARN, "beta_fast": 32, "beta_slow": 1, "mscale": 0.7, "mscale_all_dim": 0.8}
_GROUPS = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
_GPT2 = {"model_type": "gpt2", "vocab_size": 61, "n_positions": 64, "n_embd": 48, "n_layer": 2,
         "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
_OTHER = {"hidden_act": "relu", "rms_norm_eps": 1e-3, "rope_theta": 300.0,
          "rope_scaling": {"rope_type": "linear", "factor": 3.0},
          "tie_word_embeddings": True}  # fmt: skip
_NEOX = {"model_type": "gpt_neox", "hidden_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "intermediate_size": 72, "vocab_size": 61,
         "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
_FALCON = {"model_type": "falcon", "hidden_size": 48, "num_hidden_layers": 2,
           "num_attention_heads": 4, "vocab_size": 61, "alibi": False, "bos_token_id": 1,
           "eos_token_id": 2}  # fmt: skip
_OPT = {"model_type": "opt", "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "ffn_dim": 72, "vocab_size": 61, "max_position_embeddings": 64, "pad_token_id": 1,
        "bos_token_id": 2, "eos_token_id": 2, "dropout": 0.0}  # fmt: skip


def _of(kind: str, **fields: Any) -> dict[str, Any]:
    return {"model_type": kind, **_SIZES, **fields}


def _phi3(original: int, **fields: Any) -> dict[str, Any]:
    return _of("phi3", sliding_window=None, original_max_position_embeddings=original, **fields)


def _longrope(pairs: int) -> dict[str, Any]:
    return {"type": "longrope", "short_factor": [1.0 + 0.1 * pair for pair in range(pairs)],
            "long_factor": [2.0 + 0.5 * pair for pair in range(pairs)]}  # fmt: skip


def _bare(kind: str, **fields: Any) -> dict[str, Any]:
    """As little as a file may say. Heads that every usual number of key-value heads divides."""
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 32,
             "intermediate_size": 72, "vocab_size": 61, "pad_token_id": None}  # fmt: skip
    return {"model_type": kind, **sizes, **fields}


TINY: dict[str, dict[str, Any]] = {
    "gpt2": _GPT2,
    "llama, biases, llama3": _of("llama", attention_bias=True, mlp_bias=True, rope_scaling=_LLAMA3,
                                 rope_theta=100.0, tie_word_embeddings=True, rms_norm_eps=1e-5),
    "llama, linear": _of("llama", rope_scaling={"type": "linear", "factor": 4.0}, head_dim=16,
                         hidden_act="relu2"),
    "llama, yarn": _of("llama", rope_scaling=_YARN, rope_theta=100.0, hidden_act="gelu"),
    "llama, yarn, given": _of("llama", rope_theta=100.0, rope_scaling=_YARN | {
        "beta_fast": 16, "beta_slow": 2, "attention_factor": 1.3, "truncate": False}),
    "llama, longrope": _of("llama", rope_scaling=_longrope(6) | {
        "factor": 3.0, "original_max_position_embeddings": 16}, hidden_act="gelu_fast"),
    "llama, new names": _of("llama", rope_parameters=_LLAMA3 | {"rope_theta": 500.0},
                            hidden_act="quick_gelu"),
    "mistral": _of("mistral", sliding_window=7, head_dim=16, rms_norm_eps=1e-5),
    "mixtral": _of("mixtral", num_local_experts=5, num_experts_per_tok=2, sliding_window=None,
                   rms_norm_eps=1e-5),
    "mixtral, window": _of("mixtral", num_local_experts=4, num_experts_per_tok=3,
                           sliding_window=9),
    "qwen2": _of("qwen2", use_sliding_window=False, sliding_window=8, rope_theta=1e6),
    "qwen2, windows": _of("qwen2", **_QWEN2, tie_word_embeddings=True),
    "qwen2, kinds": _of("qwen2", **_QWEN2, layer_types=_HALVES * 2),
    "qwen2_moe": _of("qwen2_moe", **_QWEN2_MOE, norm_topk_prob=False),
    "qwen2_moe, shares, steps": _of("qwen2_moe", **_QWEN2_MOE | {"decoder_sparse_step": 2},
                                    norm_topk_prob=True, mlp_only_layers=[3], qkv_bias=False),
    "qwen2_moe, windows": _of("qwen2_moe", **_QWEN2_MOE | _QWEN2, layer_types=_HALVES * 2),
    "qwen3": _of("qwen3", head_dim=16, attention_bias=False),
    "qwen3, biases, windows": _of("qwen3", **_QWEN2, head_dim=16, attention_bias=True),
    "qwen3_moe": _of("qwen3_moe", **_EXPERTS, head_dim=16, norm_topk_prob=True,
                     decoder_sparse_step=1, mlp_only_layers=[0]),
    "qwen3_moe, window": _of("qwen3_moe", **_EXPERTS, **_QWEN2, head_dim=16, norm_topk_prob=False),
    "gemma": _of("gemma", head_dim=20, hidden_act="gelu_pytorch_tanh"),
    "gemma2": _of("gemma2", **_GEMMA, **_FOUR, query_pre_attn_scalar=30, sliding_window=7,
                  attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma3_text": _of("gemma3_text", **_GEMMA, **_FOUR, query_pre_attn_scalar=30,
                       sliding_window=7, sliding_window_pattern=3, rope_theta=5e4,
                       rope_local_base_freq=100.0),
    "gemma3_text, scaled": _of("gemma3_text", **_GEMMA, **_FOUR, sliding_window=7,
                               layer_types=_HALVES * 2, rope_theta=5e4, rope_local_base_freq=100.0,
                               query_pre_attn_scalar=16,
                               rope_scaling={"rope_type": "linear", "factor": 8.0}),
    "gemma3_text, new names": _of(
        "gemma3_text", **_GEMMA, **_FOUR, sliding_window=7, layer_types=_HALVES * 2,
        query_pre_attn_scalar=16, rope_parameters={
            "full_attention": _YARN | {"rope_theta": 5e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}),
    "phi3": _of("phi3", sliding_window=7),
    "phi3, longrope, short": _phi3(32, rope_scaling=_longrope(6)),
    "phi3, longrope, at the border": _phi3(LENGTH, rope_scaling=_longrope(6)),
    "phi3, longrope, long": _phi3(16, rope_scaling=_longrope(6)),
    "phi3, part turned": _phi3(16, partial_rotary_factor=0.5, rope_scaling=_longrope(3)),
    "phi": _of("phi", partial_rotary_factor=0.5, hidden_act="gelu_new", qk_layernorm=False),
    "phi, new names": _of("phi", hidden_size=64, rope_parameters={
        "rope_theta": 500.0, "rope_type": "default", "partial_rotary_factor": 0.25}),
    "olmo": _of("olmo", clip_qkv=0.5, tie_word_embeddings=True),
    "olmo2": _of("olmo2", rope_theta=5e5),
    "olmo3": _of("olmo3", **_FOUR, sliding_window=7),
    "olmo3, yarn": _of("olmo3", **_FOUR, sliding_window=7, rope_scaling=_YARN, rope_theta=5e5),
    "smollm3": _of("smollm3", **_FOUR, no_rope_layer_interval=2, use_sliding_window=False),
    "smollm3, windows": _of("smollm3", **_FOUR, no_rope_layers=[1, 0, 1, 1], sliding_window=7,
                            use_sliding_window=True),
    "deepseek_v2, lite": _of("deepseek_v2", **_DEEPSEEK, q_lora_rank=None, topk_method="greedy",
                             n_group=1, topk_group=1),
    "deepseek_v2": _of("deepseek_v2", **_DEEPSEEK, **_GROUPS, q_lora_rank=20,
                       topk_method="group_limited_greedy"),
    "deepseek_v2, yarn": _of("deepseek_v2", **_DEEPSEEK, **_GROUPS, q_lora_rank=20,
                             topk_method="group_limited_greedy", rope_scaling=_DEEPSEEK_YARN),
    "deepseek_v3": _of("deepseek_v3", **_DEEPSEEK, **_GROUPS, q_lora_rank=20, norm_topk_prob=True,
                       scoring_func="sigmoid", topk_method="noaux_tc"),
    "deepseek_v3, yarn": _of("deepseek_v3", **_DEEPSEEK, **_GROUPS, q_lora_rank=None,
                             norm_topk_prob=False, attention_bias=True,
                             rope_scaling=_DEEPSEEK_YARN),
    "deepseek_v3, new names": _of("deepseek_v3", **_DEEPSEEK, **_GROUPS, q_lora_rank=20,
                                  rope_parameters=_DEEPSEEK_YARN | {"rope_theta": 300.0}),
    "deepseek_v3, halves": _of("deepseek_v3", **_DEEPSEEK, **_GROUPS, q_lora_rank=20,
                               rope_interleave=False),
    "gpt_neox": {**_NEOX, "rotary_pct": 0.5, "use_parallel_residual": True},
    "gpt_neox, new names": {**_NEOX, "hidden_size": 64, "rope_parameters": _YARN | {
        "partial_rotary_factor": 0.75, "rope_theta": 500.0}},
    "gpt_neox, in turn": {**_NEOX, "rotary_pct": 1.0, "use_parallel_residual": False,
                          "rotary_emb_base": 500},
    "falcon, 7b": {**_FALCON, "multi_query": True, "parallel_attn": True, "bias": False},
    "falcon, 40b": {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon, 11b": {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2,
                    "num_ln_in_parallel_attn": 1, "ffn_hidden_size": 72},
    "falcon, linear": {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 4,
                       "rope_parameters": {"rope_type": "linear", "factor": 3.0,
                                           "rope_theta": 500.0}},
    "falcon, in turn": {**_FALCON, "multi_query": False, "parallel_attn": False, "bias": True},
    "bloom": {"model_type": "bloom", "vocab_size": 61, "hidden_size": 48, "n_layer": 2,
              "n_head": 4, "bos_token_id": 1, "eos_token_id": 2},
    "bloom, six heads": {"model_type": "bloom", "vocab_size": 61, "hidden_size": 48, "n_layer": 2,
                         "n_head": 6, "bos_token_id": 1, "eos_token_id": 2},
    "opt, 125m": {**_OPT, "do_layer_norm_before": True},
    "opt, 350m": {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 20},
    "gpt2, otherwise": {**_GPT2, "n_inner": 40, "layer_norm_epsilon": 1e-3,
                        "activation_function": "relu", "tie_word_embeddings": False},
    "mistral, otherwise": _of("mistral", **_OTHER, head_dim=20, sliding_window=None),
    "mixtral, otherwise": _of("mixtral", **_OTHER, head_dim=20, num_local_experts=5,
                              num_experts_per_tok=3),
    "qwen2, otherwise": _of("qwen2", **_OTHER, head_dim=20),
    "qwen2_moe, otherwise": _of("qwen2_moe", **_OTHER, **_QWEN2_MOE, head_dim=20),
    "qwen3, otherwise": _of("qwen3", **_OTHER, head_dim=20, layer_types=_HALVES,
                            use_sliding_window=True, sliding_window=9),
    "qwen3_moe, otherwise": _of("qwen3_moe", **_OTHER, head_dim=20, num_local_experts=6,
                                num_experts_per_tok=2, moe_intermediate_size=20,
                                attention_bias=True),
    "gemma, otherwise": _of("gemma", **_OTHER | {"tie_word_embeddings": False}, head_dim=20,
                            attention_bias=True),
    "gemma2, otherwise": _of("gemma2", **_OTHER | {"tie_word_embeddings": False}, head_dim=20,
                             hidden_activation="relu", attention_bias=True,
                             attn_logit_softcapping=None, final_logit_softcapping=None,
                             layer_types=["full_attention", "sliding_attention"],
                             sliding_window=9, query_pre_attn_scalar=30),
    "gemma3_text, otherwise": _of("gemma3_text", **_OTHER | {"tie_word_embeddings": False},
                                  head_dim=20, hidden_activation="relu", attention_bias=True,
                                  final_logit_softcapping=3.0),
    "phi3, otherwise": _of("phi3", **_OTHER | {"rope_scaling": None}),
    "phi, otherwise": _of("phi", **_OTHER, layer_norm_eps=1e-3),
    "olmo, otherwise": _of("olmo", **_OTHER | {"tie_word_embeddings": False},
                           attention_bias=True),
    "olmo2, otherwise": _of("olmo2", **_OTHER, attention_bias=True),
    "olmo3, otherwise": _of("olmo3", **_OTHER | {"rope_theta": 5e5}, attention_bias=True,
                            layer_types=_HALVES, sliding_window=9),
    "smollm3, otherwise": _of("smollm3", **_OTHER | {"tie_word_embeddings": False},
                              attention_bias=True, mlp_bias=True, use_sliding_window=True,
                              sliding_window=9, layer_types=_HALVES),
    "deepseek_v2, otherwise": _of("deepseek_v2", **_OTHER, **_DEEPSEEK, q_lora_rank=20,
                                  attention_bias=True, mlp_bias=True, routed_scaling_factor=3.0),
    "deepseek_v3, otherwise": _of("deepseek_v3", **_OTHER, **_DEEPSEEK, n_group=1, topk_group=1,
                                  q_lora_rank=20, attention_bias=True),
    "gpt_neox, otherwise": {**_NEOX, "rotary_pct": 0.5, "attention_bias": False,
                            "hidden_act": "relu", "layer_norm_eps": 1e-3,
                            "tie_word_embeddings": True,
                            "rope_scaling": {"type": "linear", "factor": 3.0}},
    "falcon, otherwise": {**_FALCON, "activation": "relu", "layer_norm_epsilon": 1e-3,
                          "tie_word_embeddings": False, "rope_theta": 300.0, "bias": True,
                          "rope_scaling": {"type": "linear", "factor": 3.0}},
    "bloom, otherwise": {"model_type": "bloom", "vocab_size": 61, "n_embed": 48,
                         "num_hidden_layers": 2, "num_attention_heads": 4,
                         "layer_norm_epsilon": 1e-3, "tie_word_embeddings": False},
    "opt, otherwise": {**_OPT, "_remove_final_layer_norm": True, "activation_function": "gelu",
                       "enable_bias": False, "layer_norm_elementwise_affine": False,
                       "tie_word_embeddings": False},
    **{f"{kind}, bare": _bare(kind) for kind in (
        "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "phi",
        "olmo", "olmo2", "olmo3", "smollm3")},
    "mixtral, bare": _bare("mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe, bare": _bare("qwen2_moe", moe_intermediate_size=4,
                             shared_expert_intermediate_size=4),
    "qwen3_moe, bare": _bare("qwen3_moe", moe_intermediate_size=4),
    "deepseek_v2, bare": _bare("deepseek_v2", moe_intermediate_size=4, num_attention_heads=4,
                               n_routed_experts=8, num_experts_per_tok=3),
    "deepseek_v3, bare": _bare("deepseek_v3", moe_intermediate_size=4, n_routed_experts=32,
                               num_hidden_layers=4, num_attention_heads=4,
                               num_key_value_heads=4),
    "gpt_neox, bare": _bare("gpt_neox", num_attention_heads=4),
    "falcon, bare": {"model_type": "falcon", "hidden_size": 48, "num_hidden_layers": 2,
                     "num_attention_heads": 4, "vocab_size": 61},
    "opt, bare": {"model_type": "opt", "hidden_size": 768, "num_hidden_layers": 2,
                  "num_attention_heads": 12, "ffn_dim": 72, "vocab_size": 61},
    "bloom, bare": {"model_type": "bloom", "vocab_size": 61, "hidden_size": 48, "n_layer": 2,
                    "n_head": 3},
}  # fmt: skip
"""By what is special about it."""
