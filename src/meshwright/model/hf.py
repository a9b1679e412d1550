"""Gives the LanguageModel (the sizes) for a known name or a Hugging Face `config.json`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from meshwright import files
from meshwright.errors import ModelError, Problem
from meshwright.model.config import NAMED, LanguageModel, size_problems
from meshwright.model.source import model_source, with_choices
from meshwright.model.transformer.attention_fields import attention_problems, chosen_attention
from meshwright.model.transformer.defaults import architecture_of
from meshwright.model.transformer.families import FAMILIES, Family
from meshwright.model.transformer.fields import read_fields, unread
from meshwright.records import parse, read
from meshwright.text import NAME_LETTERS, did_you_mean, nearest


def language_model(source: str | Path, sequence: int | None = None) -> LanguageModel:
    """Gives the sizes of a model by name or `config.json`, and how its attention is computed
    (`model.source`). Raises ModelError, also if `sequence` is longer than its position table."""
    found = model_source(source)
    model = with_choices(NAMED.get(found.base) or _from_file(found.base), found)
    if sequence is not None:
        wanted = "a whole number above 0"
        table = has_position_table(model)
        if table:
            wanted = f"1 to {model.positions}, the size of the position table"
        too_long = table and sequence > model.positions
        if sequence < 1 or too_long:
            raise ModelError(Problem(str(source), "sequence", str(sequence), wanted,
                                     "choose another --sequence"))  # fmt: skip
    return model


def has_position_table(model: LanguageModel) -> bool:
    """True if a position table limits the length of a sequence."""
    if model.family == "u-transformer":
        return True
    a = architecture_of(model)
    return a.position in ("learned", "sinusoidal") and a.picture is None


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
    """Turns a parsed config.json into a LanguageModel. Raises ModelError with every bad field."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        found = "nothing" if kind is None else repr(kind)
        mend = did_you_mean(kind, FAMILIES) if isinstance(kind, str) else ""
        mend = mend or "describe other models as a .toml file, or trace their nn.Module"
        wanted = "one of " + ", ".join(FAMILIES)
        raise ModelError(Problem(source, "model_type", found, wanted, mend))
    family = FAMILIES[kind]
    problems = [
        *unread(config, kind, source),
        *attention_problems(config, kind, source),
        *_head_problems(config, family, source),
    ]
    own = read_fields(family)
    given = {key: value for key, value in config.items() if key in own}
    try:
        parsed = parse(_filled(given, family), family.config, source=source, error=ModelError)
        name = str(parsed.name_or_path or Path(source).parent.name or kind)[-NAME_LETTERS:]
        model = family.read(parsed, name, source, kind)
        problems += size_problems(model, source, dict(family.names))
    except ModelError as error:
        raise ModelError(*problems, *error.problems) from None
    ModelError.check(problems)
    return replace(model, **chosen_attention(config, kind))


def _filled(given: dict[str, Any], family: Family) -> dict[str, Any]:
    """Adds the family's default for each field that the file lacks. A field that is null gets no
    such default: a null sliding_window means that there is no window."""
    usual = {key: value for key, value in family.usual.items() if key not in given}
    return usual | {key: value for key, value in given.items() if value is not None}


def _head_problems(config: dict[str, Any], family: Family, source: str) -> Iterator[Problem]:
    """Yields a Problem if `architectures` names another head than the one with the family's loss:
    such a model has other parameters."""
    heads = config.get("architectures")
    if heads is None or heads == []:
        return
    known = isinstance(heads, list) and all(isinstance(each, str) for each in heads)
    if not known or not any(each in family.heads for each in heads):
        yield Problem(
            source, "architectures", repr(heads)[:80], " or ".join(family.heads),
            "other heads have other parameters and losses: trace their nn.Module",
        )  # fmt: skip
