"""Loads a model by name, from a `config.json` or from a hand-written file, as a LayerGraph."""

from __future__ import annotations

from pathlib import Path

from meshwright.cluster.spec import Precision
from meshwright.model.config import LanguageModel
from meshwright.model.files import load_file
from meshwright.model.hf import language_model
from meshwright.model.source import model_source
from meshwright.model.spec import LayerGraph
from meshwright.model.transformer.counted_graph import counted_graph


def load_model(source: str | Path, sequence: int, precision: Precision) -> LayerGraph:
    """Gives the LayerGraph of a known name, a `config.json` (or its folder), or a hand-written
    `.toml`; behind a colon stands how attention is computed (`model.source`). Examples:
    load_model("gpt2", 1024, "bf16"), load_model("gpt2:unfused", 1024, "bf16").

    Amounts in a hand-written file are taken as written; `sequence` and `precision` then only say
    what they are for. Raises ModelError.
    """
    found = model_source(source)
    if found.is_hand_written:
        return load_file(Path(found.base), sequence, precision)
    model = language_model(source, sequence)
    if model.family == "u-transformer":
        return _traced(model, sequence, precision)
    return counted_graph(model, sequence, precision)


def _traced(model: LanguageModel, sequence: int, precision: Precision) -> LayerGraph:
    """Traces the module of a family without formulas on fake tensors."""
    import torch

    from meshwright.model.trace import trace
    from meshwright.model.zoo.build import from_language_model

    with torch.device("meta"):
        module = from_language_model(model)
        tokens = torch.empty(1, sequence, dtype=torch.long)
    return trace(module, (tokens, tokens), precision, sequence, model.name)
