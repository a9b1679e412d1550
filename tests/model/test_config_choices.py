"""Configurations that leave open what is computed are refused by the field that would say it."""

import pytest
from tiny_configs import TINY

from meshwright.errors import ModelError
from meshwright.model.hf import from_config

_QWEN2_MOE = {key: value for key, value in TINY["qwen2_moe, windows"].items()
              if key != "layer_types"}  # fmt: skip
_V2, _V3 = TINY["deepseek_v2"], TINY["deepseek_v3"]


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (_QWEN2_MOE, "layer_types: found nothing"),
        (TINY["qwen3_moe, window"] | {"layer_types": ["full_attention"] * 4}, "layer_types: found"),
        (TINY["llama, linear"] | {"rope_scaling": {"full_attention": {}}}, "full_attention: found"),
        (TINY["gemma3_text"] | {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: found"),
        (_V2 | {"norm_topk_prob": True}, "norm_topk_prob: found True"),
        (_V2 | {"topk_method": "noaux_tc"}, "topk_method: found 'noaux_tc'; wanted greedy or"),
        (_V2 | {"scoring_func": "sigmoid"}, "scoring_func: found 'sigmoid'; wanted softmax"),
        (_V2 | {"n_group": 3}, "n_group: found 3"),
        (_V2 | {"topk_group": 1}, "topk_group: found 1; wanted groups that hold the 3 experts"),
        (_V3 | {"topk_method": "greedy"}, "topk_method: found 'greedy'; wanted noaux_tc"),
        (_V3 | {"scoring_func": "softmax"}, "scoring_func: found 'softmax'; wanted sigmoid"),
        (_V3 | {"n_group": 8}, "n_group: found 8; wanted a divisor of the 8 experts, of two"),
        (_V3 | {"topk_group": 5}, "n_group: found 4"),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(config, text):
    with pytest.raises(ModelError, match=text):
        from_config(config, "c")


def test_a_window_that_is_not_used_is_none():
    for window in (8, 0, None):
        config = _QWEN2_MOE | {"use_sliding_window": False, "sliding_window": window}
        assert from_config(config, "c").architecture.windows == ()


def test_each_of_the_names_of_a_share_of_turned_features_is_read():
    plain = {key: value for key, value in TINY["gpt_neox"].items() if key != "rotary_pct"}
    table = {"rope_type": "default", "rope_theta": 10000.0}
    for given, turned in (
        ({}, 4),
        ({"rotary_pct": 0.5}, 8),
        ({"partial_rotary_factor": 0.5}, 8),
        ({"rotary_pct": 0.5, "rope_parameters": table | {"partial_rotary_factor": 0.75}}, 12),
    ):
        model = from_config(plain | {"hidden_size": 64} | given, "c")
        assert model.architecture.rotary.features == turned


@pytest.mark.parametrize(("name", "period"), [("gemma3_text", 6), ("olmo3", 4)])
def test_a_file_that_says_nothing_of_windows_has_its_familys(name, period):
    """Every sixth block of Gemma 3, and every fourth of Olmo 3, sees all that came before."""
    config = TINY[f"{name}, bare"] | {"num_hidden_layers": 12, "sliding_window": 8}
    windows = from_config(config, "c").architecture.windows
    assert [n for n, window in enumerate(windows, 1) if not window] == [*range(period, 13, period)]
