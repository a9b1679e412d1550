"""Decides what happens to each field of a config.json: it is read, ignored, or refused.

The records of `configs` and `encoder_configs` hold the fields that are read. A field in none of the
three groups is an error, since it may change what the model computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from meshwright.errors import Problem
from meshwright.model.transformer.attention_fields import IMPLEMENTATION_FIELDS
from meshwright.model.transformer.families import FAMILIES, Family
from meshwright.text import nearest

_DROPOUT = "models are trained without dropout"
_START = "weights are drawn as the modules do it, from N(0, 0.02)"
_GENERATION = "for generating text"
_LABELS = "names of classes"
_ORIGIN = "says where the file is from"
_CODE = "how transformers computes it, not what"
_SPEECH = "for recognising speech, or for augmenting it"

IGNORED: Mapping[str, str] = {
    **dict.fromkeys(
        ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "dropout_rate"),
        f"followed for attention weights if attn_implementation is eager; else {_DROPOUT}"),
    **dict.fromkeys(
        ("embd_pdrop", "hidden_dropout", "hidden_dropout_prob", "resid_pdrop", "dropout",
         "activation_dropout", "layerdrop", "classifier_dropout", "summary_first_dropout",
         "encoder_layerdrop", "decoder_layerdrop", "embedding_dropout", "ffn_dropout"), _DROPOUT),
    **dict.fromkeys(
        ("initializer_range", "initializer_factor", "init_std", "embed_init_std", "init_method",
         "initializer_cutoff_factor"), _START),
    **dict.fromkeys(
        ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id",
         "mask_token_id", "unk_token_id", "decoder_start_token_id", "forced_bos_token_id",
         "forced_eos_token_id", "begin_suppress_tokens", "suppress_tokens", "forced_decoder_ids",
         "use_cache", "max_length", "min_length", "do_sample", "num_beams", "temperature",
         "top_k", "top_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
         "early_stopping", "prefix", "bad_words_ids", "num_return_sequences", "generation_config",
         "task_specific_params", "eos_token", "bos_token", "cache_implementation",
         "diversity_penalty", "encoder_no_repeat_ngram_size", "num_beam_groups", "typical_p",
         "exponential_decay_length_penalty", "remove_invalid_values", "output_scores",
         "return_dict_in_generate", "max_new_tokens", "is_decoder", "is_encoder_decoder",
         "cross_attention_hidden_size", "median_filter_width"), _GENERATION),
    **dict.fromkeys(("id2label", "label2id", "finetuning_task", "problem_type"), _LABELS),
    **dict.fromkeys(
        ("transformers_version", "_name_or_path", "_commit_hash", "model_name", "name_or_path",
         "auto_map", "tokenizer_class", "license", "_from_model_config", "unsloth_version",
         "unsloth_fixed", "is_llama_config", "transformers.js_config", "vocab_file",
         "gradient_checkpointing", "torchscript", "custom_pipelines"), _ORIGIN),
    **dict.fromkeys(
        ("torch_dtype", "dtype", "_attn_implementation_autoset", "pretraining_tp",
         "attention_softmax_in_fp32",
         "reorder_and_upcast_attn", "slow_but_exact", "masked_softmax_fusion", "use_flash_attn",
         "use_flash_attention_2", "flash_attention", "bias_dropout_fusion", "use_bfloat16",
         "output_attentions", "output_hidden_states", "output_past", "return_dict",
         "use_return_dict",
         "chunk_size_feed_forward", "pruned_heads", "tf_legacy_loss", "ep_size", "skip_bias_add",
         "skip_bias_add_qkv", "unk_index", "n_ctx", "seq_length", "max_sequence_length",
         "hybrid_cache", "rope_interleaved", "moe_layer_freq", "multiple_of", "n_head_kv",
         "offset_alibi"), _CODE),
    **dict.fromkeys(
        ("aux_loss_alpha", "seq_aux", "router_aux_loss_coef", "router_z_loss_coef"),
        "balance of experts is left to the router: losses beside the main one are not computed"),
    **dict.fromkeys(
        ("summary_activation", "summary_proj_to_labels", "summary_type", "summary_use_proj",
         "use_mean_pooling", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers",
         "pooler_size_per_head", "pooler_type", "pooler_output_size", "pooler_act"),
        "of other heads than the one with the loss"),
    **dict.fromkeys(
        ("apply_spec_augment", "mask_time_prob", "mask_time_length", "mask_time_min_masks",
         "mask_feature_prob", "mask_feature_length", "mask_feature_min_masks",
         "use_weighted_layer_sum", "classifier_proj_size"), _SPEECH),
    "qk_head_dim": "the sum of two other fields",
    "_sliding_window_pattern": "written beside the kinds of blocks that it led to",
    "num_nextn_predict_layers": "further predicted tokens are not trained (nor by transformers)",
    "vocab_size_or_config_json_file": _ORIGIN,
    "bidirectional": "followed by the model type",
    **dict.fromkeys(("dense_act_fn", "is_gated_act"), "followed as feed_forward_proj"),
    "num_hidden_layers": "followed under the other names that the family has",
    "encoder_stride": "of another head than the one with the loss",
}  # fmt: skip
"""Field that is ignored -> the reason why it does not matter."""

REFUSED: Mapping[str, tuple[tuple[object, ...], str]] = {
    "quantization_config": ((), "weights are trained in full precision; remove the field"),
    "compression_config": ((), "weights are trained in full precision; remove the field"),
    "text_config": ((), "save it as a config.json of its own to train the model of text alone"),
    "vision_config": ((), "models of pictures and text are not known"),
    "audio_config": ((), "models of sound and text are not known"),
    "rope_scaling_type": ((), "write it as rope_scaling.rope_type"),
    "output_router_logits": ((False,), "the balancing loss of a router is not computed"),
    "router_jitter_noise": ((0, 0.0), "noise of a router is not computed"),
    "add_cross_attention": ((False,), "decoders that read an encoder are T5 and Whisper"),
    "scale_attn_weights": ((True,), "scores are divided by the square root of a head's features"),
    "scale_attn_by_inverse_layer_idx": ((False,), "scores are not divided by the block's number"),
    "apply_residual_connection_post_layernorm": ((False,), "the residual stream is not normalised"),
    "scale_embedding": ((False,), "embeddings are not multiplied by the root of their width"),
    "alibi": ((False,), "in Falcon, positions are rotary"),
    "position_embedding_type": (
        ("absolute", "rope", "learned_absolute"),
        "no other positions are known here",
    ),
    "use_bidirectional_attention": ((False,), "attention looks back only"),
    "qk_layernorm": ((False,), "in Phi, queries and keys are not normalised"),
    "norm_after": ((False,), "no such normalisation"),
    "altup_num_inputs": ((), "Gemma 3n is not known"),
    "tie_encoder_decoder": ((False,), "encoder and decoder are not one"),
}
"""Field -> its values that change nothing, and the reason why all others are refused."""


def read_fields(family: Family) -> frozenset[str]:
    """Gives the fields of a config.json that are read for a family."""
    written = {_written(each) for each in fields(family.config)}
    if not family.follows:
        return frozenset(written)
    return frozenset(name for name in written if name.removeprefix("_") in family.follows)


def _written(each: Any) -> str:
    """Gives the name that a record's field has in the file."""
    alias = {"name_or_path", "remove_final_layer_norm"}
    return f"_{each.name}" if each.name in alias else str(each.name)


ALL_FIELDS: frozenset[str] = frozenset(
    name for family in FAMILIES.values() for name in map(_written, fields(family.config))
)
"""Fields that are read for at least one family."""


def unread(config: Mapping[str, Any], kind: str, source: str) -> Iterator[Problem]:
    """Yields a Problem for each field that is refused or unknown."""
    family = FAMILIES[kind]
    own = read_fields(family)
    for key, value in config.items():
        known = key in own or key in ("model_type", "architectures", *IMPLEMENTATION_FIELDS)
        if known or value is None:
            continue
        found = _short(value)
        if key in REFUSED:
            allowed, why = REFUSED[key]
            if not any(
                value is each or (value == each and type(value) is type(each)) for each in allowed
            ):
                wanted = " or ".join(map(_short, allowed)) or "no such field"
                yield Problem(source, key, found, wanted, why)
        elif key in IGNORED or (key in ALL_FIELDS and value is False):
            continue
        elif key in ALL_FIELDS:
            yield Problem(source, key, found, f"no such field in a {kind}",
                          "it is one of other families: is model_type right?")  # fmt: skip
        else:
            near = nearest(key, own, cutoff=0.8)
            mend = f"did you mean {near[0]}? " if near else ""
            yield Problem(source, key, found, "a field whose meaning is known",
                          f"{mend}if it changes nothing, remove it")  # fmt: skip


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
