"""Formulas against a trace of the module they describe."""

import dataclasses

import pytest
import torch

from meshwright.cost.moments import moments_table, temporaries
from meshwright.model.analytic import layer_graph
from meshwright.model.config import LanguageModel
from meshwright.model.spec import LayerGraph
from meshwright.model.trace import trace
from meshwright.model.zoo.build import from_language_model

GPT = LanguageModel(
    name="g", family="gpt2", vocabulary=101, positions=32, width=48, layers=2, heads=4, kv_heads=4,
    head=12, hidden=160, tied=True,
)  # fmt: skip
LLAMA = LanguageModel(
    name="l", family="llama", vocabulary=99, positions=64, width=40, layers=2, heads=6, kv_heads=2,
    head=8, hidden=72,
)  # fmt: skip
MIXTRAL = dataclasses.replace(LLAMA, family="mixtral", experts=4, chosen=2)
MODELS = [
    GPT,
    dataclasses.replace(GPT, tied=False, name="untied"),
    LLAMA,
    dataclasses.replace(LLAMA, kv_heads=6, tied=True, name="tied"),
    dataclasses.replace(LLAMA, kv_heads=1, name="one"),
    MIXTRAL,
    dataclasses.replace(MIXTRAL, experts=6, chosen=3, name="three"),
]
EXACT = (
    "name", "cast_parameters",
    "forward_flops", "attention_flops", "backward_flops", "parameters", "tensor_units",
    "split_parameters", "forward_all_reduce_bytes", "backward_all_reduce_bytes",
)  # fmt: skip


def worst(layer, tensor, rows):
    """Bytes beyond what a layer keeps, at its worst moment."""
    model = LayerGraph(name="", sequence=1, precision="fp32", layers=(layer,), tensors=())
    return float(temporaries(moments_table(model, divided=tensor > 1), tensor, rows)[0])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("config", MODELS, ids=lambda c: f"{c.family}-{c.name}")
def test_formulas_agree_with_the_trace(config, precision):
    with torch.device("meta"):
        model = from_language_model(config)
    batch = (torch.empty(2, 24, dtype=torch.long, device="meta"),) * 2
    traced = trace(model, batch, precision, name=config.name)
    graph = layer_graph(config, 24, precision)
    assert graph.tensors == traced.tensors
    assert graph.tied == traced.tied
    assert (graph.name, graph.sequence, graph.precision) == (config.name, 24, precision)
    assert len(graph.layers) == len(traced.layers) == config.layers + 2
    for ours, truth in zip(graph.layers, traced.layers, strict=True):
        for field in EXACT:
            assert getattr(ours, field) == getattr(truth, field), (ours.name, field)
        assert ours.split_flops == pytest.approx(truth.split_flops)
        assert ours.saved_bytes == pytest.approx(truth.saved_bytes), ours.name
        assert ours.split_saved_bytes == pytest.approx(truth.split_saved_bytes), ours.name
        assert ours.traffic_bytes == pytest.approx(truth.traffic_bytes, rel=0.06), ours.name
        assert ours.fixed_saved_bytes == pytest.approx(truth.fixed_saved_bytes, abs=64), ours.name
        for tensor, rows in ((1, 1), (1, 64), (2, 1), (2, 64)):
            if tensor == 1 or truth.tensor_moments:
                most, really = (worst(layer, tensor, rows) for layer in (ours, truth))
                slack = 0.02 * rows * truth.saved_bytes
                assert most == pytest.approx(really, rel=0.12, abs=slack), (ours.name, tensor, rows)


def test_equal_blocks_share_a_signature_and_others_do_not():
    for graph in (layer_graph(GPT, 16, "fp32"), layer_graph(MIXTRAL, 16, "fp32")):
        first, *blocks, last = (layer.signature for layer in graph.layers)
        assert len(set(blocks)) == 1
        assert len({first, last, *blocks}) == 3
    assert layer_graph(GPT, 16, "fp32").layers[1].signature != (
        layer_graph(GPT, 17, "fp32").layers[1].signature
    )
