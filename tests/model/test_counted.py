"""What is counted without torch, against a trace of the module that is described."""

import dataclasses

import pytest
import torch
from variants import LLAMA, VARIANTS

from meshwright.cost.moments import moments_table, temporaries
from meshwright.model.config import NAMED, LanguageModel
from meshwright.model.spec import LayerGraph
from meshwright.model.trace import trace
from meshwright.model.transformer.counted_graph import counted_graph
from meshwright.model.zoo.build import from_language_model

GPT = LanguageModel(
    name="g", family="gpt2", vocabulary=101, positions=32, width=48, layers=2, heads=4, kv_heads=4,
    head=12, hidden=160, tied=True,
)  # fmt: skip
SMALL = dataclasses.replace(LLAMA, architecture=None, name="l")
MIXTRAL = dataclasses.replace(SMALL, family="mixtral", experts=4, chosen=2)
ZOO = (
    GPT,
    dataclasses.replace(GPT, tied=False, name="untied"),
    SMALL,
    dataclasses.replace(SMALL, kv_heads=1, name="one"),
    MIXTRAL,
    dataclasses.replace(MIXTRAL, experts=6, chosen=3, name="three"),
)
EXACT = (
    "name", "cast_parameters", "forward_flops", "attention_flops", "backward_flops", "parameters",
    "tensor_units", "split_parameters", "forward_all_reduce_bytes", "backward_all_reduce_bytes",
)  # fmt: skip
NEAR = ("split_flops", "saved_bytes", "split_saved_bytes", "traffic_bytes")


def worst(layer, tensor, rows):
    """Bytes beyond what a layer keeps, at its worst moment."""
    model = LayerGraph(name="", sequence=1, precision="fp32", layers=(layer,), tensors=())
    return float(temporaries(moments_table(model, divided=tensor > 1), tensor, rows)[0])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("config", [*ZOO, *VARIANTS], ids=lambda c: f"{c.family}-{c.name}")
def test_what_is_counted_is_what_the_module_does(config, precision):
    with torch.device("meta"):
        model = from_language_model(config)
    batch = (torch.empty(2, 24, dtype=torch.long, device="meta"),) * 2
    traced = trace(model, batch, precision, name=config.name)
    graph = counted_graph(config, 24, precision)
    assert graph.tensors == traced.tensors
    assert graph.tied == traced.tied
    assert (graph.name, graph.sequence, graph.precision) == (config.name, 24, precision)
    assert len(graph.layers) == len(traced.layers) == config.layers + 2
    for ours, truth in zip(graph.layers, traced.layers, strict=True):
        for field in EXACT:
            assert getattr(ours, field) == getattr(truth, field), (ours.name, field)
        for field in NEAR:
            there = getattr(truth, field)
            assert getattr(ours, field) == pytest.approx(there, rel=0.01), (ours.name, field)
        assert ours.fixed_saved_bytes == pytest.approx(truth.fixed_saved_bytes, rel=0.01, abs=1)
        for tensor, rows in ((1, 1), (1, 64), (2, 1), (2, 64)):
            if tensor == 1 or truth.tensor_moments:
                most, really = (worst(layer, tensor, rows) for layer in (ours, truth))
                slack = 0.02 * rows * truth.saved_bytes
                assert most == pytest.approx(really, rel=0.08, abs=slack), (ours.name, tensor, rows)


def test_equal_blocks_share_a_signature_and_others_do_not():
    for graph in (counted_graph(GPT, 16, "fp32"), counted_graph(MIXTRAL, 16, "fp32")):
        first, *blocks, last = (layer.signature for layer in graph.layers)
        assert len(set(blocks)) == 1
        assert len({first, last, *blocks}) == 3
    assert counted_graph(GPT, 16, "fp32").layers[1].signature != (
        counted_graph(GPT, 17, "fp32").layers[1].signature
    )


def test_blocks_that_differ_have_signatures_of_their_own():
    by_name = {variant.name: variant for variant in VARIANTS}
    for name in ("window", "shared expert"):
        first, second = (
            layer.signature for layer in counted_graph(by_name[name], 24, "fp32").layers[1:3]
        )
        assert first != second


def test_a_window_takes_attention_as_it_reaches():
    """2 S W - W^2 pairs of tokens instead of S^2: nearly a quarter at eight windows."""
    whole = dataclasses.replace(
        LLAMA, architecture=dataclasses.replace(LLAMA.architecture, windows=())
    )
    near = dataclasses.replace(
        LLAMA, architecture=dataclasses.replace(LLAMA.architecture, windows=(64, 64))
    )
    full, windowed = (
        counted_graph(c, 512, "bf16").layers[1].attention_flops for c in (whole, near)
    )
    assert windowed / full == (2 * 512 * 64 - 64**2) / 512**2
    short = counted_graph(near, 64, "bf16").layers[1].attention_flops
    assert short == counted_graph(whole, 64, "bf16").layers[1].attention_flops


@pytest.mark.parametrize("name", ["gpt-tiny", "llama-tiny", "mixtral-tiny"])
def test_the_described_module_is_the_one_written_by_hand(name):
    from meshwright.model.zoo.described import Network

    by_hand, described = (f(NAMED[name]).double() for f in (from_language_model, Network))
    described.load_state_dict(by_hand.state_dict())
    tokens = torch.randint(0, 256, (2, 33), generator=torch.Generator().manual_seed(0))
    losses = [model(tokens[:, :-1], tokens[:, 1:]) for model in (by_hand, described)]
    assert losses[0].item() == losses[1].item()
    for loss in losses:
        loss.backward()
    wanted = dict(by_hand.named_parameters())
    assert all(torch.equal(p.grad, wanted[n].grad) for n, p in described.named_parameters())
