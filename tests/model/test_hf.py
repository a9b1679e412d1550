"""Models by name and config.json, and what is said about bad ones."""

import dataclasses
import json
import math
import subprocess
import sys

import pytest
import torch
from published import PUBLISHED

from meshwright.errors import ModelError
from meshwright.model.config import NAMED
from meshwright.model.hf import from_config, language_model
from meshwright.model.load import load_model
from meshwright.model.spec import num_parameters
from meshwright.model.transformer.counted_graph import counted_graph
from meshwright.model.transformer.families import FAMILIES
from meshwright.model.transformer.fields import IGNORED, REFUSED
from meshwright.model.zoo.build import build_model, from_language_model, vocabulary_of

GPT2 = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, "n_embd": 768,
        "n_layer": 12, "n_head": 12}  # fmt: skip
LLAMA = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 8192,
         "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "intermediate_size": 14336, "rope_theta": 500000.0,
         "rms_norm_eps": 1e-5}  # fmt: skip
MIXTRAL = LLAMA | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-13b", 13_015_864_320),
        ("llama-2-70b", 68_976_648_192),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3-70b", 70_553_706_496),
        ("mistral-7b", 7_241_732_096),
        ("mixtral-8x7b", 46_702_792_704),
    ],
)
def test_known_models_have_their_published_number_of_parameters(name, parameters):
    assert num_parameters(load_model(name, 1024, "bf16")) == parameters


@pytest.mark.parametrize(("name", "billions"), [("u-transformer-1b", 1), ("u-transformer-2b", 2)])
def test_our_own_models_are_as_large_as_their_names_say(name, billions):
    with torch.device("meta"):
        module = from_language_model(NAMED[name])
    found = sum(each.numel() for each in module.parameters())
    assert found == pytest.approx(billions * 1e9, rel=0.05)


def test_our_own_models_have_eight_heads_and_the_tiny_one_four():
    heads = {name: (NAMED[name].heads, NAMED[name].head) for name in NAMED if name[:2] == "u-"}
    assert heads == {
        "u-transformer-1b": (8, 76),
        "u-transformer-2b": (8, 108),
        "u-transformer-tiny": (4, 16),
    }


def test_a_config_is_the_model_of_that_name(tmp_path):
    for name, config in (("gpt2", GPT2), ("llama-3-8b", LLAMA)):
        path = tmp_path / name / "config.json"
        path.parent.mkdir()
        path.write_text(json.dumps(config))
        graph = load_model(path, 512, "bf16")
        assert graph == load_model(name, 512, "bf16")
        assert load_model(path.parent, 512, "bf16") == graph
        assert vocabulary_of(path) == config["vocab_size"]


def test_fields_that_configs_may_leave_out():
    model = from_config({k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}, "c")
    assert (model.kv_heads, model.head, model.tied, model.rotary_base) == (32, 128, False, 5e5)
    model = from_config(LLAMA | {"head_dim": 64, "tie_word_embeddings": True}, "c")
    assert (model.head, model.tied) == (64, True)
    nested = {k: v for k, v in LLAMA.items() if k != "rope_theta"}
    assert from_config(nested | {"rope_parameters": {"rope_theta": 7.0}}, "c").rotary_base == 7.0
    assert from_config(GPT2 | {"n_inner": None}, "c").hidden == 3072
    assert from_config(GPT2 | {"n_inner": 100}, "c").hidden == 100
    assert from_config(LLAMA | {"model_type": "mistral"}, "c").family == "mistral"
    assert from_config(MIXTRAL, "c").experts == 8


def test_the_base_of_rotary_frequencies_may_be_any_number_above_0():
    for base in (0.5, 1.0, 1e15):
        assert from_config(LLAMA | {"rope_theta": base}, "c").rotary_base == base
    with pytest.raises(ModelError, match="rope_theta: found 0"):
        from_config(LLAMA | {"rope_theta": 0.0}, "c")


@pytest.mark.parametrize("name", ["gpt-tiny", "llama-tiny", "mixtral-tiny", "u-transformer-tiny"])
def test_tiny_models_are_built_and_predict_bytes(name):
    model = build_model(name, 32)
    assert sum(p.numel() for p in model.parameters()) == num_parameters(
        load_model(name, 32, "fp32")
    )
    assert vocabulary_of(name) == NAMED[name].vocabulary == 256


def without(config: dict[str, object], field: str) -> dict[str, object]:
    return {key: value for key, value in config.items() if key != field}


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (without(GPT2, "model_type"), "c.json: model_type: found nothing; wanted one of gpt2"),
        (GPT2 | {"model_type": "bart"}, "model_type: found 'bart'(?s:.*)Did you mean"),
        (without(GPT2, "n_embd"), "n_embd: found nothing; wanted this field"),
        (GPT2 | {"n_layer": "12"}, "n_layer: found '12'"),
        (GPT2 | {"n_layer": True}, "n_layer: found True"),
        (GPT2 | {"n_layer": 0}, "n_layer: found 0"),
        (GPT2 | {"vocab_size": -5}, "vocab_size: found -5"),
        (GPT2 | {"vocab_size": 10**30}, "vocab_size: found 1000.*wanted at most 10,000,000"),
        (GPT2 | {"n_layer": 12.0}, "n_layer: found 12.0; wanted a whole number"),
        (GPT2 | {"layer_norm_epsilon": math.inf}, "layer_norm_epsilon: found inf"),
        (LLAMA | {"rms_norm_eps": 1.0}, "rms_norm_eps: found 1.0; wanted less than 1"),
        (LLAMA | {"tie_word_embeddings": math.nan}, "tie_word_embeddings: found nan"),
        (LLAMA | {"tie_word_embeddings": 1}, "tie_word_embeddings: found 1; wanted true or false"),
        (LLAMA | {"rope_parameters": {"rope_theta": -1.0}}, "rope_parameters.rope_theta: found -1"),
        (LLAMA | {"_name_or_path": "a\nb"}, "_name_or_path: found 'a"),
        (LLAMA | {"model_type": ["llama"]}, "model_type: found \\['llama'\\]"),
        (GPT2 | {"n_head": 7}, "n_head: found 7; wanted a divisor of n_embd = 768"),
        (LLAMA | {"num_key_value_heads": 5}, "num_key_value_heads: found 5; wanted a divisor of"),
        (LLAMA | {"head_dim": 63}, "head_dim: found 63; wanted an even number"),
        (without(MIXTRAL, "num_local_experts"), "num_local_experts: found nothing"),
        (MIXTRAL | {"num_experts_per_tok": 9}, "num_experts_per_tok: found 9; wanted between 1"),
    ],
)
def test_a_bad_config_is_told_field_by_field(config, text):
    with pytest.raises(ModelError, match=text):
        from_config(config, "c.json")


def test_all_bad_fields_are_told_at_once():
    with pytest.raises(ModelError) as caught:
        from_config(LLAMA | {"hidden_size": -1, "num_hidden_layers": 1.5, "vocab_size": None}, "c")
    assert [p.field for p in caught.value.problems] == [
        "vocab_size", "hidden_size", "num_hidden_layers",
    ]  # fmt: skip


def test_unknown_names_get_a_suggestion():
    with pytest.raises(ModelError, match=r"unknown name 'gpt2xl'(?s:.*)did you mean gpt2-xl\?"):
        load_model("gpt2xl", 128, "bf16")
    with pytest.raises(ModelError, match=r"give a config\.json"):
        load_model("zzzz", 128, "bf16")


def test_files_that_are_not_there_or_not_json(tmp_path):
    with pytest.raises(ModelError, match=r"no\.json: found no such file"):
        load_model(tmp_path / "no.json", 128, "bf16")
    broken = tmp_path / "config.json"
    broken.write_text("{")
    with pytest.raises(ModelError, match="well-formed JSON"):
        load_model(tmp_path, 128, "bf16")


@pytest.mark.parametrize("sequence", [0, 1025])
def test_a_sequence_must_fit_the_position_table(sequence):
    with pytest.raises(ModelError, match=r"sequence: found .* wanted 1 to 1024"):
        load_model("gpt2", sequence, "bf16")
    for name in ("gpt2", "u-transformer-tiny"):
        with pytest.raises(ModelError, match="wanted 1 to 1024"):
            build_model(name, sequence)


def test_rotary_positions_have_no_table_to_exceed():
    assert language_model("llama-2-7b", 100_000).positions == 4096
    with pytest.raises(ModelError, match="whole number above 0"):
        language_model("llama-2-7b", 0)


def test_a_hand_written_model_cannot_be_built():
    with pytest.raises(ModelError, match="it has no code"):
        build_model("model.toml", 128)


@pytest.mark.heavy
def test_describing_models_imports_no_torch():
    code = (
        "import sys; import meshwright.model.load, meshwright.model.shard; "
        "meshwright.model.load.load_model('gpt2', 128, 'bf16'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_changes_the_model_is_followed():
    """Biases, activation, scaled rotary positions, windows, epsilons: none is passed over."""
    plain = from_config(LLAMA, "c")
    for more in (
        {"attention_bias": True},
        {"mlp_bias": True},
        {"hidden_act": "gelu"},
        {"rms_norm_eps": 1e-6},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"model_type": "mistral", "sliding_window": 4096},
    ):
        assert from_config(LLAMA | more, "c").architecture != plain.architecture, more
    biased = load_graph(LLAMA | {"attention_bias": True, "num_hidden_layers": 2})
    bare = load_graph(LLAMA | {"num_hidden_layers": 2})
    assert num_parameters(biased) - num_parameters(bare) == 2 * (4096 + 1024 + 1024 + 4096)


def load_graph(config):
    return counted_graph(from_config(config, "c"), 64, "fp32")


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (LLAMA | {"quantization_config": {"bits": 4}},
         "quantization_config: found (?s:.*)full precision"),
        (LLAMA | {"text_config": {}}, "text_config: found"),
        (LLAMA | {"attention_bais": True}, "attention_bais: (?s:.*)did you mean attention_bias"),
        (LLAMA | {"brand_new": 1}, "brand_new: found 1; wanted a field whose meaning is known"),
        (LLAMA | {"q_lora_rank": 8}, "q_lora_rank: found 8; wanted no such field in a llama"),
        (LLAMA | {"hidden_act": "swoosh"}, "hidden_act: found 'swoosh'"),
        (LLAMA | {"architectures": ["LlamaForSequenceClassification"]},
         "architectures: found .*Classification.*wanted LlamaForCausalLM"),
        (LLAMA | {"architectures": "LlamaForCausalLM"}, "architectures: found 'LlamaForCausalLM'"),
        (LLAMA | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
         "rope_scaling.rope_type: found 'dynamic'; wanted one of default, linear"),
        (LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}},
         "rope_scaling.low_freq_factor: found nothing"),
        (LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": math.nan}},
         "rope_scaling.factor: found nan"),
        (LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "extra": 1}},
         "rope_scaling.extra: found 1"),
        (LLAMA | {"model_type": "mistral", "sliding_window": -1}, "sliding_window: found -1"),
        (LLAMA | {"model_type": "gemma3"}, "model_type: found 'gemma3'.*"),
        (MIXTRAL | {"output_router_logits": True}, "output_router_logits: found True"),
        (GPT2 | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused_by_name(config, text):
    with pytest.raises(ModelError, match=text):
        from_config(config, "c.json")


def test_fields_of_no_account_and_fields_that_are_off_are_accepted():
    config = LLAMA | {
        "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16", "bos_token_id": 1,
        "transformers_version": "4.31", "use_cache": True, "attention_dropout": 0.0,
        "quantization_config": None, "use_sliding_window": False, "initializer_range": 0.02,
    }  # fmt: skip
    assert from_config(config, "c") == from_config(LLAMA, "c")


def test_a_first_llama_has_no_positions_and_2048_of_them():
    config = without(LLAMA, "max_position_embeddings")
    assert from_config(config, "c").positions == 2048


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_read_whole(name):
    model = from_config(PUBLISHED[name], "c.json")
    assert num_parameters(counted_graph(model, 128, "bf16")) > 10**7


def test_every_field_is_followed_or_of_no_account_or_refused_but_not_two_of_these():
    assert not IGNORED.keys() & REFUSED.keys()
    for family in FAMILIES.values():
        names = {each.name for each in dataclasses.fields(family.config)}
        assert set(family.follows) <= names, family.heads
        assert set(family.usual) <= names, family.heads


@pytest.mark.parametrize("name", ["bert-base", "vit-base", "t5-small", "whisper-tiny"])
def test_what_is_no_decoder_of_text_is_planned_but_not_trained_from_its_config(name, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(PUBLISHED[name]))
    assert load_model(path, 128, "bf16").layers
    with pytest.raises(ModelError, match=r"a decoder of text(?s:.*)Engine"):
        build_model(path, 128)


def test_t5_divides_what_its_output_projection_reads_by_the_root_of_the_width():
    """If that is the embedding; 512 numbers wide, as Mesh TensorFlow scaled it."""
    tied = from_config(PUBLISHED["t5-small"], "t5-small")
    assert tied.architecture.logit_scale == pytest.approx(1 / math.sqrt(512))
    untied = from_config(PUBLISHED["t5-small"] | {"tie_word_embeddings": False}, "t5-small")
    assert untied.architecture.logit_scale is None
