"""Language models by name, or by Hugging Face `config.json`: their numbers."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

from pydantic import Field

from meshwright import files
from meshwright.errors import ModelError, Problem
from meshwright.model.config import (
    NAMED,
    Experts,
    Family,
    Heads,
    Hidden,
    LanguageModel,
    Layers,
    Positions,
    RotaryBase,
    Vocabulary,
    Width,
    problems_of,
    rotary,
)
from meshwright.records import Line, parse, read, record
from meshwright.text import NAME_LETTERS, nearest

T = TypeVar("T")

FAMILIES: dict[str, Family] = {
    "gpt2": "gpt2",
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "mixtral",
}

Epsilon = Annotated[float, Field(gt=0, lt=1)]
"""Added to a variance. The modules of `model.zoo` have their own, so that it is checked and no
more."""


@record
class Gpt2Config:
    """What is looked at in the config.json of a GPT-2."""

    vocab_size: Vocabulary
    n_positions: Positions
    n_embd: Width
    n_layer: Layers
    n_head: Heads
    n_inner: Hidden | None = None
    tie_word_embeddings: bool = True
    layer_norm_epsilon: Epsilon | None = None
    name_or_path: Annotated[Line, Field(alias="_name_or_path")] = ""


@record
class RopeParameters:
    """`rope_parameters` of a newer config."""

    rope_theta: RotaryBase | None = None


@record
class LlamaConfig:
    """What is looked at in the config.json of a Llama, Mistral or Mixtral."""

    vocab_size: Vocabulary
    max_position_embeddings: Positions
    hidden_size: Width
    num_hidden_layers: Layers
    num_attention_heads: Heads
    intermediate_size: Hidden
    num_key_value_heads: Heads | None = None
    head_dim: Width | None = None
    tie_word_embeddings: bool = False
    rms_norm_eps: Epsilon | None = None
    rope_theta: RotaryBase | None = None
    rope_parameters: RopeParameters = RopeParameters()
    num_local_experts: Experts = 0
    num_experts_per_tok: Experts = 0
    name_or_path: Annotated[Line, Field(alias="_name_or_path")] = ""


_GPT2_NAMES = {
    "vocabulary": "vocab_size",
    "positions": "n_positions",
    "width": "n_embd",
    "layers": "n_layer",
    "heads": "n_head",
    "hidden": "n_inner",
}
_LLAMA_NAMES = {
    "vocabulary": "vocab_size",
    "positions": "max_position_embeddings",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "hidden": "intermediate_size",
    "kv_heads": "num_key_value_heads",
    "head": "head_dim",
    "experts": "num_local_experts",
    "chosen": "num_experts_per_tok",
}


def language_model(source: str | Path, sequence: int | None = None) -> LanguageModel:
    """The numbers of a model by name or `config.json`. Raises ModelError, also where `sequence` is
    too long for it."""
    model = NAMED.get(str(source)) or _from_file(str(source))
    if sequence is not None:
        wanted = "a whole number above 0"
        table = not rotary(model.family)
        if table:
            wanted = f"1 to {model.positions}, the size of the position table"
        too_long = table and sequence > model.positions
        if sequence < 1 or too_long:
            raise ModelError(Problem(str(source), "sequence", str(sequence), wanted,
                                     "choose another --sequence"))  # fmt: skip
    return model


def _from_file(source: str) -> LanguageModel:
    path = Path(source)
    if source and files.is_folder(path):
        path = path / "config.json"
    if not source or (path.suffix != ".json" and not files.exists(path)):
        near = nearest(source, NAMED, cutoff=0.4)
        mend = f"did you mean {near[0]}?" if near else "give a config.json or a .toml file"
        wanted = "a path, or one of " + ", ".join(NAMED)
        raise ModelError(Problem("model", "", f"unknown name {source!r}", wanted, mend))
    return from_config(read(path, error=ModelError), str(path))


def from_config(config: dict[str, Any], source: str) -> LanguageModel:
    """A Hugging Face config as a LanguageModel. Raises ModelError with every field at fault."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        found = "nothing" if kind is None else repr(kind)
        wanted = "one of " + ", ".join(FAMILIES)
        mend = "describe other models as a .toml file, or trace their nn.Module"
        raise ModelError(Problem(source, "model_type", found, wanted, mend))
    given = {key: value for key, value in config.items() if value is not None}
    name = str(given.get("_name_or_path") or Path(source).parent.name or kind)[-NAME_LETTERS:]
    if FAMILIES[kind] == "gpt2":
        model, names = _gpt2(_parsed(given, Gpt2Config, source), name, source), _GPT2_NAMES
    else:
        llama = _parsed(given, LlamaConfig, source)
        model, names = _llama(llama, FAMILIES[kind], name, source), _LLAMA_NAMES
    ModelError.check(problems_of(model, source, names))
    return model


def _parsed(given: dict[str, Any], kind: type[T], source: str) -> T:
    """Of all that a config holds, what a record asks for."""
    known = {
        "_" + f.name if f.name == "name_or_path" else f.name for f in fields(cast("Any", kind))
    }
    own = {key: value for key, value in given.items() if key in known}
    rope = own.get("rope_parameters")
    if isinstance(rope, dict):
        theta = rope.get("rope_theta")
        own["rope_parameters"] = {} if theta is None else {"rope_theta": theta}
    return parse(own, kind, source=source, error=ModelError)


def _gpt2(c: Gpt2Config, name: str, source: str) -> LanguageModel:
    return LanguageModel(
        name=name,
        family="gpt2",
        vocabulary=c.vocab_size,
        positions=c.n_positions,
        width=c.n_embd,
        layers=c.n_layer,
        heads=c.n_head,
        kv_heads=c.n_head,
        head=_head(c.n_embd, c.n_head, _GPT2_NAMES, source),
        hidden=c.n_inner or 4 * c.n_embd,
        tied=c.tie_word_embeddings,
    )


def _llama(c: LlamaConfig, family: Family, name: str, source: str) -> LanguageModel:
    """Raises ModelError."""
    mixture = family == "mixtral"
    if mixture:
        wanted = "this field, which a mixture of experts needs"
        ModelError.check(
            Problem(source, field, "nothing", wanted)
            for field in ("num_local_experts", "num_experts_per_tok")
            if not getattr(c, field)
        )
    return LanguageModel(
        name=name,
        family=family,
        vocabulary=c.vocab_size,
        positions=c.max_position_embeddings,
        width=c.hidden_size,
        layers=c.num_hidden_layers,
        heads=c.num_attention_heads,
        kv_heads=c.num_key_value_heads or c.num_attention_heads,
        head=c.head_dim or _head(c.hidden_size, c.num_attention_heads, _LLAMA_NAMES, source),
        hidden=c.intermediate_size,
        tied=c.tie_word_embeddings,
        experts=c.num_local_experts if mixture else 0,
        chosen=c.num_experts_per_tok if mixture else 0,
        rotary_base=float(c.rope_theta or c.rope_parameters.rope_theta or 10000.0),
    )


def _head(width: int, heads: int, names: dict[str, str], source: str) -> int:
    """Features of a head where the config does not say. Raises ModelError."""
    if width % heads:
        wanted = f"a divisor of {names['width']} = {width}"
        raise ModelError(Problem(source, names["heads"], str(heads), wanted))
    return width // heads
