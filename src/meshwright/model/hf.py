"""Language models by name, or by Hugging Face `config.json`: their numbers."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

from meshwright.errors import ModelError, Problem
from meshwright.model.config import NAMED, Family, LanguageModel, problems_of, rotary
from meshwright.records import read

FAMILIES: dict[str, Family] = {
    "gpt2": "gpt2",
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "mixtral",
}

_GPT2_FIELDS = {
    "vocabulary": "vocab_size",
    "positions": "n_positions",
    "width": "n_embd",
    "layers": "n_layer",
    "heads": "n_head",
}
_LLAMA_FIELDS = {
    "vocabulary": "vocab_size",
    "positions": "max_position_embeddings",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "hidden": "intermediate_size",
}
_MIXTRAL_FIELDS = _LLAMA_FIELDS | {"experts": "num_local_experts", "chosen": "num_experts_per_tok"}
_FIELDS: dict[Family, dict[str, str]] = {
    "gpt2": _GPT2_FIELDS,
    "llama": _LLAMA_FIELDS,
    "mixtral": _MIXTRAL_FIELDS,
}
_OPTIONAL = {"kv_heads": "num_key_value_heads", "head": "head_dim", "hidden": "n_inner"}


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
    if path.is_dir():
        path = path / "config.json"
    if path.suffix != ".json" and not path.exists():
        near = get_close_matches(source, NAMED, n=1, cutoff=0.4)
        mend = f"did you mean {near[0]}?" if near else "give a config.json or a .toml file"
        wanted = "a path, or one of " + ", ".join(NAMED)
        raise ModelError(Problem("model", "", f"unknown name {source!r}", wanted, mend))
    return from_config(read(path, error=ModelError), str(path))


def from_config(config: dict[str, Any], source: str) -> LanguageModel:
    """A Hugging Face config as a LanguageModel. Raises ModelError with every field at fault."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        found = "nothing" if kind is None else repr(kind)
        wanted = "one of " + ", ".join(FAMILIES)
        mend = "describe other models as a .toml file, or trace their nn.Module"
        raise ModelError(Problem(source, "model_type", found, wanted, mend))
    family = FAMILIES[kind]
    fields = _FIELDS[family]
    present = {own: theirs for own, theirs in _OPTIONAL.items() if config.get(theirs) is not None}
    fields = fields | {k: v for k, v in present.items() if (family == "gpt2") == (v == "n_inner")}
    ModelError.check(_unreadable(config, fields, source))
    numbers = {own: int(config[theirs]) for own, theirs in fields.items()}
    heads, width = numbers["heads"], numbers["width"]
    if "head" not in numbers and (heads < 1 or width % heads):
        wanted = f"a divisor of {fields['width']} = {width}"
        raise ModelError(Problem(source, fields["heads"], str(heads), wanted))
    defaults = {"kv_heads": heads, "head": width // max(heads, 1), "hidden": 4 * width}
    model = LanguageModel(
        name=str(config.get("_name_or_path") or Path(source).parent.name or kind),
        family=family,
        tied=config.get("tie_word_embeddings", family == "gpt2") is True,
        rotary_base=_rotary_base(config),
        **cast("dict[str, Any]", defaults | numbers),
    )
    ModelError.check(problems_of(model, source, _OPTIONAL | fields))
    return model


def _unreadable(config: dict[str, Any], fields: dict[str, str], source: str) -> list[Problem]:
    return [
        Problem(source, theirs, repr(config.get(theirs, "nothing")), "a whole number above 0")
        for theirs in fields.values()
        if type(config.get(theirs)) is not int or config[theirs] < 1
    ]


def _rotary_base(config: dict[str, Any]) -> float:
    parameters = config.get("rope_parameters")
    nested = parameters.get("rope_theta") if isinstance(parameters, dict) else None
    return float(config.get("rope_theta") or nested or 10000.0)
