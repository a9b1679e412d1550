"""Reads what `--model` names: a model, and behind a colon how its attention is computed.

    gpt2-xl:unfused    config.json:unfused,attention_dropout=0.1    config.json:fused

The choice is a part of the model's source, so plans, run folders and profiles that hold the source
reproduce it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from meshwright import files
from meshwright.errors import ModelError, Problem
from meshwright.model.config import NAMED, AttentionKind, LanguageModel
from meshwright.records import record
from meshwright.text import NAME_LETTERS, did_you_mean

DROPOUT = "attention_dropout"
_KINDS = get_args(AttentionKind)
_WANTED = f"{' or '.join(_KINDS)}, and {DROPOUT}=0.1"


@record
class ModelSource:
    """Holds the parts of a model's source."""

    base: str
    """A name, a path of a config.json (or its folder), or of a model.toml."""
    choices: str = ""
    """What stands behind the colon, such as `unfused,attention_dropout=0.1`."""

    @property
    def is_hand_written(self) -> bool:
        """True if the base is a model.toml, which states its layers' amounts."""
        return self.base.endswith(".toml")

    def at(self, base: str) -> str:
        """Gives the same choices for a model that is found elsewhere, as text."""
        return f"{base}:{self.choices}" if self.choices else base


def model_source(source: str | Path) -> ModelSource:
    """Divides a source at its last colon, unless the whole of it is a path that exists, or what
    stands before the colon is no model. Raises ModelError for choices of a model.toml, whose
    amounts are taken as written."""
    whole = str(source)
    base, colon, choices = whole.rpartition(":")
    if not colon or files.exists(Path(whole)) or not _is_model(base):
        return ModelSource(base=whole)
    if not choices.strip():
        raise ModelError(Problem(whole, "attention", "nothing behind the colon", _WANTED))
    found = ModelSource(base=base, choices=choices)
    if found.is_hand_written:
        mend = "write the bytes of the scores into saved, traffic and workspace of its layers"
        wanted = "nothing behind the colon: the amounts of a hand-written model are as they stand"
        raise ModelError(Problem(whole, "attention", repr(choices), wanted, mend))
    return found


def _is_model(base: str) -> bool:
    return base in NAMED or base.endswith((".json", ".toml")) or files.is_folder(Path(base or "?"))


def with_choices(model: LanguageModel, source: ModelSource) -> LanguageModel:
    """Gives the model with the attention that its source names, and the choice behind its name.
    Raises ModelError for a choice that there is not."""
    if not source.choices:
        return model
    chosen: dict[str, Any] = {}
    for each in source.choices.split(","):
        chosen |= _choice(each.strip(), chosen, source.at(source.base))
    name = f"{model.name}:{source.choices}"[-NAME_LETTERS:]
    return replace(model, name=name, **chosen)


def _choice(text: str, before: Mapping[str, Any], source: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    field, given = (key, value) if equals else ("attention", key)
    if field in before:
        raise ModelError(Problem(source, field, repr(given), f"one choice of {field}"))
    if field == "attention" and given in _KINDS:
        return {field: given}
    if field == DROPOUT:
        return {DROPOUT: _probability(given, source)}
    field = "attention" if field == "attention" else repr(field)
    mend = did_you_mean(given if field == "attention" else key, (*_KINDS, DROPOUT))
    raise ModelError(Problem(source, field, repr(given), _WANTED, mend))


def _probability(text: str, source: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        wanted = "a probability from 0 to below 1"
        raise ModelError(Problem(source, DROPOUT, repr(text), wanted))
    return value
