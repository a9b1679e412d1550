"""Models by name, by Hugging Face `config.json`, or by hand: to the planner's LayerGraph."""

from __future__ import annotations

from pathlib import Path

from meshwright.cluster.spec import Precision
from meshwright.model.config import LanguageModel
from meshwright.model.files import load_file
from meshwright.model.hf import language_model
from meshwright.model.spec import LayerGraph
from meshwright.model.transformer.counted_graph import counted_graph


def load_model(source: str | Path, sequence: int, precision: Precision) -> LayerGraph:
    """The LayerGraph of a known name, a `config.json` (or its folder), or a hand-written `.toml`.

    In a hand-written file amounts are as they are written: `sequence` and `precision` name what
    they were written for. Raises ModelError.
    """
    if str(source).endswith(".toml"):
        return load_file(Path(source), sequence, precision)
    model = language_model(source, sequence)
    if model.family == "u-transformer":
        return _traced(model, sequence, precision)
    return counted_graph(model, sequence, precision)


def _traced(model: LanguageModel, sequence: int, precision: Precision) -> LayerGraph:
    """Of a family without formulas: its module is run on fake tensors."""
    import torch

    from meshwright.model.trace import trace
    from meshwright.model.zoo.build import from_language_model

    with torch.device("meta"):
        module = from_language_model(model)
        tokens = torch.empty(1, sequence, dtype=torch.long)
    return trace(module, (tokens, tokens), precision, sequence, model.name)
