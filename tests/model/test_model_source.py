"""How attention is computed is said behind a model's name, or in its file, and stays with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from published import PUBLISHED

from meshwright.errors import ModelError
from meshwright.model.hf import from_config, language_model
from meshwright.model.load import load_model
from meshwright.model.source import model_source
from meshwright.model.spec import content_fingerprint
from meshwright.model.transformer.attention_fields import IMPLEMENTATIONS
from meshwright.model.zoo.build import build_model, vocabulary_of

GPT2 = {"model_type": "gpt2", "vocab_size": 64, "n_positions": 32, "n_embd": 16, "n_layer": 2,
        "n_head": 4}  # fmt: skip
LAYERS = 'name = "m"\n[[layer]]\nname = "a"\nforward = 1\n'


@pytest.mark.parametrize(
    ("choices", "kind", "dropout"),
    [
        ("unfused", "unfused", 0.0),
        ("fused", "fused", 0.0),
        ("attention=unfused", "unfused", 0.0),
        ("unfused,attention_dropout=0.1", "unfused", 0.1),
        ("attention_dropout=0.25, unfused", "unfused", 0.25),
        ("attention_dropout=0", "fused", 0.0),
    ],
)
def test_what_stands_behind_a_name_is_followed(choices: str, kind: str, dropout: float) -> None:
    model = language_model(f"gpt-tiny:{choices}")
    assert (model.attention, model.attention_dropout) == (kind, dropout)
    assert model.name == f"gpt-tiny:{choices}"
    assert model.width == language_model("gpt-tiny").width


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ("unfsed", r"attention: found 'unfsed'; wanted fused or unfused(?s:.*)'unfused'"),
        ("", "attention: found nothing"),
        ("attention=eager", "attention: found 'eager'"),
        ("atention_dropout=0.1", "'atention_dropout'(?s:.*)'attention_dropout'"),
        ("attention_dropout=1", "attention_dropout: found '1'(?s:.*)below 1"),
        ("attention_dropout=nan", "attention_dropout: found 'nan'"),
        ("attention_dropout=much", "attention_dropout: found 'much'"),
        ("attention_dropout", "attention: found 'attention_dropout'"),
        ("unfused,fused", "one choice of attention"),
    ],
)
def test_what_is_no_choice_is_refused_by_name(choices: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        load_model(f"gpt-tiny:{choices}", 16, "fp32")


def test_a_colon_in_a_path_or_behind_no_model_is_a_part_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "a:unfused"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(GPT2))
    assert model_source(folder).choices == ""
    assert language_model(folder).attention == "fused"
    assert language_model(f"{folder}:unfused").attention == "unfused"
    assert language_model(f"{folder / 'config.json'}:unfused").attention == "unfused"
    with pytest.raises(ModelError, match="unknown name 'gpt-huge:unfused'"):
        language_model("gpt-huge:unfused")


def test_amounts_of_a_hand_written_model_are_as_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    path.write_text(LAYERS)
    assert load_model(path, 8, "fp32").layers
    for source in (f"{path}:unfused", f"{path}:attention_dropout=0.1"):
        with pytest.raises(ModelError, match=r"attention: found '(?s:.*)hand-written"):
            load_model(source, 8, "fp32")
    path.write_text('attention = "unfused"\n' + LAYERS)
    with pytest.raises(ModelError, match="attention"):
        load_model(path, 8, "fp32")


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("value", IMPLEMENTATIONS)
def test_a_config_names_its_implementation(key: str, value: str) -> None:
    model = from_config(GPT2 | {key: value}, "c.json")
    wanted = ("unfused", 0.1) if value == "eager" else ("fused", 0.0)
    assert (model.attention, model.attention_dropout) == wanted


@pytest.mark.parametrize(
    ("name", "more", "dropout"),
    [
        ("gpt2", {"attn_pdrop": 0.2}, 0.2),
        ("llama-7b", {"attention_dropout": 0.3}, 0.3),
        ("llama-7b", {"attention_dropout": 0}, 0.0),
        ("bert-base", {}, 0.1),
        ("t5-small", {"dropout_rate": 0.15}, 0.15),
        ("vit-base", {}, 0.0),
    ],
)
def test_the_dropout_of_a_file_is_followed_where_attention_is_unfused(
    name: str, more: dict[str, Any], dropout: float
) -> None:
    config = PUBLISHED[name] | more
    assert from_config(config, "c").attention_dropout == 0.0
    model = from_config(config | {"attn_implementation": "eager"}, "c")
    assert (model.attention, model.attention_dropout) == ("unfused", dropout)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"attn_implementation": "egaer"}, r"attn_implementation: found 'egaer'(?s:.*)'eager'"),
        ({"attn_implementation": True}, "attn_implementation: found True"),
        ({"attn_implementation": "eager", "_attn_implementation": "sdpa"},
         "_attn_implementation: found 'sdpa'"),
        ({"attn_implementation": "eager", "attn_pdrop": 1.5}, r"attn_pdrop: found 1\.5"),
        ({"attn_implementation": "eager", "attn_pdrop": "some"}, "attn_pdrop: found 'some'"),
    ],
)  # fmt: skip
def test_a_config_with_another_implementation_is_refused(more: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        from_config(GPT2 | more, "c.json")


def test_a_choice_precedes_what_the_file_says(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(GPT2 | {"attn_implementation": "eager", "attn_pdrop": 0.2}))
    marks = {
        source: content_fingerprint(load_model(source, 16, "bf16"))
        for source in (str(path), f"{path}:fused", f"{path}:attention_dropout=0")
    }
    assert len({*marks.values()}) == 3
    found = language_model(f"{path}:fused")
    assert (found.attention, found.attention_dropout) == ("fused", 0.2)


def test_what_is_trained_is_what_was_named() -> None:
    model = build_model("llama-tiny:unfused,attention_dropout=0.1", 16)
    assert vocabulary_of("llama-tiny:unfused") == 256
    assert sum(p.numel() for p in model.parameters()) == sum(
        p.numel() for p in build_model("llama-tiny", 16).parameters()
    )
