"""Reads mixtures of experts and latent attention from a config.json."""

from __future__ import annotations

from collections.abc import Iterator

from meshwright.errors import ModelError, Problem
from meshwright.model.transformer.configs import DecoderConfig
from meshwright.model.transformer.spec import Latent, Mixture


def latent_of(c: DecoderConfig, kind: str) -> Latent | None:
    """Reads the sizes of latent attention; None for families without it."""
    if not kind.startswith("deepseek"):
        return None
    assert c.kv_lora_rank is not None
    assert c.qk_nope_head_dim is not None
    assert c.qk_rope_head_dim is not None
    assert c.v_head_dim is not None
    return Latent(
        query_rank=c.q_lora_rank or 0,
        key_value_rank=c.kv_lora_rank,
        plain=c.qk_nope_head_dim,
        rotary=c.qk_rope_head_dim,
        value=c.v_head_dim,
    )


def mixture_of(c: DecoderConfig, kind: str, source: str) -> tuple[Mixture | None, int, int]:
    """Reads the mixture, its number of experts, and the inner width of one expert; for a dense
    model, None, 0 and the inner width of the feed-forward module."""
    if kind == "mixtral":
        _needed(c, source, "num_local_experts", "num_experts_per_tok")
        return Mixture(), c.num_local_experts, c.intermediate_size
    blocks = range(c.num_hidden_layers)
    if kind in ("qwen2_moe", "qwen3_moe"):
        _needed(c, source, "num_experts", "num_experts_per_tok")
        experts = c.num_local_experts or c.num_experts or 0
        dense = tuple(
            b for b in blocks if b in c.mlp_only_layers or (b + 1) % c.decoder_sparse_step
        )
        shared = c.shared_expert_intermediate_size or 0 if kind == "qwen2_moe" else 0
        mixture = Mixture(
            normalised=c.norm_topk_prob, shared=shared, shared_gate=kind == "qwen2_moe",
            dense=dense, dense_hidden=c.intermediate_size,
        )  # fmt: skip
        return mixture, experts, c.moe_intermediate_size or c.intermediate_size
    if kind.startswith("deepseek"):
        _needed(c, source, "n_routed_experts", "num_experts_per_tok")
        return _deepseek(c, kind, source), c.n_routed_experts or 0, c.moe_intermediate_size or 1
    return None, 0, c.intermediate_size


def _deepseek(c: DecoderConfig, kind: str, source: str) -> Mixture:
    free = kind == "deepseek_v3"
    grouped = c.topk_method != "greedy" and (c.n_group or 1) > 1
    ModelError.check(_choice_problems(c, free, grouped, source))
    groups = c.n_group or 1
    width = c.moe_intermediate_size or 1
    return Mixture(
        score="sigmoid" if c.scoring_func == "sigmoid" else "softmax",
        normalised=c.norm_topk_prob,
        scale=c.routed_scaling_factor,
        groups=groups if grouped else 1,
        groups_chosen=(c.topk_group or 1) if grouped else 1,
        group_score="two best" if free else "best",
        balanced=free,
        shared=(c.n_shared_experts or 0) * width,
        dense=tuple(range(min(c.first_k_dense_replace or 0, c.num_hidden_layers))),
        dense_hidden=c.intermediate_size,
    )


def _choice_problems(c: DecoderConfig, free: bool, grouped: bool, source: str) -> Iterator[Problem]:
    """Yields a Problem for each field that asks for another choice of experts than DeepSeek's two:
    V2's greedy or group-limited top-k, and V3's bias-balanced one without an auxiliary loss."""
    ways = ("noaux_tc",) if free else ("greedy", "group_limited_greedy")
    if c.topk_method not in ways:
        yield Problem(source, "topk_method", repr(c.topk_method), " or ".join(ways))
    score = "sigmoid" if free else "softmax"
    if c.scoring_func != score:
        yield Problem(source, "scoring_func", repr(c.scoring_func), score)
    if c.norm_topk_prob and not free:
        why = "transformers passes over it, other code does not"
        yield Problem(source, "norm_topk_prob", "True", "False in a deepseek_v2", why)
    if not grouped:
        return
    experts, groups, chosen = c.n_routed_experts or 1, c.n_group or 1, c.topk_group or 1
    if experts % groups or chosen > groups or (free and experts < 2 * groups):
        two = ", of two and more each" if free else ""
        wanted = f"a divisor of the {experts} experts{two}, and at least topk_group"
        yield Problem(source, "n_group", str(groups), wanted)
    elif experts // groups * chosen < c.num_experts_per_tok:
        wanted = f"groups that hold the {c.num_experts_per_tok} experts of a token"
        yield Problem(source, "topk_group", str(chosen), wanted)


def _needed(c: DecoderConfig, source: str, *names: str) -> None:
    wanted = "this field, which a mixture of experts needs"
    ModelError.check(
        Problem(source, name, "nothing", wanted) for name in names if not getattr(c, name)
    )
