"""Builds the torch module of a model from its name or `config.json`."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from meshwright.errors import ModelError, Problem
from meshwright.model.config import LanguageModel
from meshwright.model.hf import language_model
from meshwright.model.source import model_source
from meshwright.model.transformer.spec import FUSED
from meshwright.model.zoo.described import DescribedTransformer
from meshwright.model.zoo.gpt import GPT
from meshwright.model.zoo.llama import Llama
from meshwright.model.zoo.mixtral import Mixtral
from meshwright.model.zoo.u_transformer import UTransformer


def vocabulary_of(source: str | Path) -> int:
    """Gives the number of tokens in a model's vocabulary. Raises ModelError."""
    return _trainable(source, None).vocabulary


def build_model(source: str | Path, sequence: int) -> nn.Module:
    """Builds a model that takes (tokens, targets), both (rows, sequence), and gives the mean loss.

    Its weights are freshly initialised, and it has no dropout but that of attention weights, if the
    source or the file asks for it. Under `with torch.device("meta")` it takes no memory. Raises
    ModelError.

    Example: build_model("gpt2", 1024).
    """
    return from_language_model(_trainable(source, sequence))


def _trainable(source: str | Path, sequence: int | None) -> LanguageModel:
    if model_source(source).is_hand_written:
        wanted = "a name or a config.json"
        mend = "a hand-written model can be planned and simulated only: it has no code"
        raise ModelError(Problem(str(source), "", "a hand-written model", wanted, mend))
    model = language_model(source, sequence)
    if model.architecture is not None and model.architecture.task != "next token":
        wanted = "a decoder of text, which is trained on a file of tokens"
        mend = "plan and simulate it; to train it, give its nn.Module and your data to an Engine"
        raise ModelError(Problem(str(source), "model_type", repr(model.family), wanted, mend))
    return model


def from_language_model(c: LanguageModel) -> nn.Module:
    """Builds the module of a family with these sizes."""
    # The modules written by hand have fused attention only.
    chosen = c.kernel != FUSED and c.family != "u-transformer"
    if c.architecture is not None or chosen:
        return DescribedTransformer(c)
    if c.family == "gpt2":
        return GPT(
            vocabulary=c.vocabulary,
            positions=c.positions,
            width=c.width,
            heads=c.heads,
            layers=c.layers,
            hidden=c.hidden,
            tied=c.tied,
        )
    if c.family == "u-transformer":
        return UTransformer(
            vocabulary=c.vocabulary,
            positions=c.positions,
            width=c.width,
            heads=c.heads,
            layers=c.layers,
            levels=c.levels,
            kernel=c.kernel,
        )
    numbers = {
        "vocabulary": c.vocabulary,
        "width": c.width,
        "heads": c.heads,
        "kv_heads": c.kv_heads,
        "layers": c.layers,
        "hidden": c.hidden,
        "head": c.head,
    }
    if c.family == "llama":
        return Llama(**numbers, tied=c.tied, base=c.rotary_base)
    experts = {"experts": c.experts, "chosen": c.chosen}
    return Mixtral(**numbers, **experts, tied=c.tied, base=c.rotary_base)
