"""What is counted without torch, against a trace of the module that is described."""

from dataclasses import replace

import pytest
import torch
from published import PUBLISHED
from variants import LLAMA, VARIANTS

from meshwright.cost.peak_moments import peak_moments, temporary_bytes
from meshwright.model.config import NAMED, LanguageModel
from meshwright.model.hf import from_config
from meshwright.model.spec import LayerGraph
from meshwright.model.trace import trace
from meshwright.model.transformer.counted_graph import counted_graph
from meshwright.model.transformer.families import FAMILIES
from meshwright.model.transformer.layer_list import inputs_of
from meshwright.model.zoo.build import from_language_model

GPT = LanguageModel(
    name="g", family="gpt2", vocabulary=101, positions=32, width=48, layers=2, heads=4, kv_heads=4,
    head=12, hidden=160, tied=True,
)  # fmt: skip
SMALL = replace(LLAMA, architecture=None, name="l")
MIXTRAL = replace(SMALL, family="mixtral", experts=4, chosen=2)
ZOO = (
    GPT,
    replace(GPT, tied=False, name="untied"),
    SMALL,
    replace(SMALL, kv_heads=1, name="one"),
    MIXTRAL,
    replace(MIXTRAL, experts=6, chosen=3, name="three"),
)
EXACT = (
    "name", "cast_parameters", "forward_flops", "attention_flops", "unfused_flops",
    "backward_flops", "parameters", "frozen_parameters",
)  # fmt: skip
NEAR = ("saved_bytes", "traffic_bytes")
EXACT_ALONG = (
    "units", "parameters", "frozen_parameters", "forward_all_reduce_bytes",
    "backward_all_reduce_bytes",
)  # fmt: skip
NEAR_ALONG = ("flops", "saved_bytes")


SHORT = {
    "gpt2": {"n_layer": 2},
    "bloom": {"n_layer": 2},
    "t5": {"num_layers": 2, "num_decoder_layers": 2},
    "whisper": {"encoder_layers": 2, "decoder_layers": 2},
    "deepseek_v2": {"num_hidden_layers": 2, "n_routed_experts": 8},
    "deepseek_v3": {
        "num_hidden_layers": 2,
        "first_k_dense_replace": 1,
        "n_routed_experts": 16,
    },
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]},
}
"""What makes a model of a family two blocks deep, or as many as show all its kinds of blocks."""


def worst(layer, tensor, rows):
    """Bytes beyond what a layer keeps, at its worst moment."""
    model = LayerGraph(name="", sequence=1, precision="fp32", layers=(layer,), tensors=())
    return float(temporary_bytes(peak_moments(model, divided=tensor > 1), tensor, rows)[0])


REST = [pytest.param(each, marks=pytest.mark.slow) for each in ("fp32", "fp64")]
"""Without casts; `make test` counts in bf16, which has them."""


@pytest.mark.heavy
@pytest.mark.parametrize("precision", ["bf16", *REST])
@pytest.mark.parametrize("config", ZOO, ids=lambda c: f"{c.family}-{c.name}")
def test_a_module_written_by_hand_is_counted_as_it_is_traced(config, precision):
    check(config, precision)


@pytest.mark.parametrize("precision", ["bf16", REST[0]])
@pytest.mark.parametrize("config", VARIANTS, ids=lambda c: c.name)
def test_what_is_counted_is_what_the_module_does(config, precision):
    check(config, precision)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_counted_as_its_module_is_traced(family):
    """Of the smallest of its published models two blocks of a sixteenth of the words."""
    fields = min(
        (each for each in PUBLISHED.values() if each["model_type"] == family),
        key=lambda each: each.get("hidden_size", 0),
    )
    config = from_config(
        fields | SHORT.get(family, {"num_hidden_layers": 2}) | {"torch_dtype": None}, family
    )
    check(replace(config, vocabulary=config.vocabulary // 16), "bf16")


EIGHT = replace(GPT, name="eight", heads=8, kv_heads=8, head=6)
"""Four tensor ranks have two heads each. A single head needs no copy for its products, so that the
runs at two widths would not be of the same operations."""
UNFUSED = (
    EIGHT,
    SMALL,
    MIXTRAL,
    *(
        each
        for each in VARIANTS
        if each.name in ("bloom", "window", "window, uneven", "norms after", "scores capped")
    ),
)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("precision", ["bf16", REST[0]])
@pytest.mark.parametrize("config", UNFUSED, ids=lambda c: c.name)
def test_unfused_attention_is_counted_as_the_module_computes_it(config, precision, dropout):
    check(replace(config, attention="unfused", attention_dropout=dropout), precision)


@pytest.mark.slow
def test_a_u_transformer_has_unfused_attention_too():
    """Seven bytes of a score, on two levels of both sides and in the middle; fused attention saves
    a number for each query instead."""
    small = replace(NAMED["u-transformer-tiny"], attention="unfused", attention_dropout=0.1)
    found, plain = (
        saved_by_u_transformer(each) for each in (small, replace(small, attention="fused"))
    )
    scores = 2 * (4 * 64**2 + 8 * 16**2) + 16 * 4**2
    assert found - plain == pytest.approx(7 * scores, rel=0.02)


def saved_by_u_transformer(config):
    """Bytes that a traced U-Transformer saves."""
    with torch.device("meta"):
        model = from_language_model(config)
    batch = (torch.empty(2, 64, dtype=torch.long, device="meta"),) * 2
    return sum(layer.saved_bytes for layer in trace(model, batch, "bf16", divided=False).layers)


@pytest.mark.parametrize(
    ("precision", "dropout", "bytes_of_score"),
    [
        ("bf16", 0.0, 4 + 2),  # softmax, what the product reads
        ("bf16", 0.1, 4 + 2 + 1),  # and the mask
        ("fp32", 0.0, 4),  # both are one
        ("fp32", 0.1, 4 + 4 + 1),
    ],
)
def test_how_many_bytes_of_a_score_are_saved_follows_from_the_module(
    precision, dropout, bytes_of_score
):
    """Of two lengths, since only scores grow with the square."""
    config = replace(EIGHT, attention="unfused", attention_dropout=dropout)
    for width in (1, 2, 4):
        one, two, three = (
            held(counted_graph(config, length, precision).layers[1], width)
            for length in (8, 16, 24)
        )
        # The second difference of a + b S + c S^2 is 2 c h^2.
        scores = (three - 2 * two + one) / (2 * 8**2)
        assert scores == pytest.approx(bytes_of_score * config.heads / width)


def held(layer, width):
    """Bytes that a layer saves on one of several tensor ranks."""
    return layer.saved_bytes - layer.along("tensor").saved_bytes * (1 - 1 / width)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_fused_attention_saves_the_same_with_and_without_dropout(precision):
    plain, dropping = (
        counted_graph(replace(EIGHT, attention_dropout=p), 24, precision) for p in (0.0, 0.1)
    )
    assert [x.saved_bytes for x in plain.layers] == [x.saved_bytes for x in dropping.layers]
    assert plain.layers[1].signature != dropping.layers[1].signature


def check(config, precision):
    with torch.device("meta"):
        model = from_language_model(config)
    batch = tuple(
        torch.empty(
            (2, *each.shape), dtype=torch.long if each.index else torch.float32, device="meta"
        )
        for each in inputs_of(config, 24)
    )
    traced = trace(model, batch, precision, 24, config.name)
    graph = counted_graph(config, 24, precision)
    assert graph.tensors == traced.tensors
    assert graph.tied == traced.tied
    assert (graph.name, graph.sequence, graph.precision) == (config.name, 24, precision)
    assert len(graph.layers) == len(traced.layers)
    for ours, truth in zip(graph.layers, traced.layers, strict=True):
        both = ours.along("tensor"), truth.along("tensor")
        for (here, there), exact, near in (
            ((ours, truth), EXACT, NEAR), (both, EXACT_ALONG, NEAR_ALONG)
        ):  # fmt: skip
            for field in exact:
                assert getattr(here, field) == getattr(there, field), (ours.name, field)
            for field in near:
                wanted = pytest.approx(getattr(there, field), rel=0.01)
                assert getattr(here, field) == wanted, (ours.name, field)
        assert ours.fixed_saved_bytes == pytest.approx(truth.fixed_saved_bytes, rel=0.01, abs=1)
        for tensor, rows in ((1, 1), (1, 64), (2, 1), (2, 64)):
            if tensor == 1 or truth.along("tensor").moments:
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


def test_what_no_tensor_rank_divides_is_one_unit_and_what_they_divide_by_rows_has_any_width():
    """Patches of pictures, and embeddings narrower than the blocks, are computed whole."""
    pictures = from_config(PUBLISHED["vit-base"], "vit-base")
    narrow = replace(LLAMA, architecture=replace(LLAMA.architecture, embedding_width=24))
    units = [
        counted_graph(c, 64, "fp32").layers[0].along("tensor").units
        for c in (pictures, narrow, LLAMA)
    ]
    assert units == [1, 1, 0]


def test_both_precisions_of_two_bytes_are_counted_alike():
    one, other = (counted_graph(LLAMA, 64, precision).layers for precision in ("fp16", "bf16"))
    for layer, same in zip(one, other, strict=True):
        assert layer.traffic_bytes == same.traffic_bytes
        assert (layer.saved_bytes, layer.workspace_bytes) == (
            same.saved_bytes,
            same.workspace_bytes,
        )


def test_a_window_takes_attention_as_it_reaches():
    """2 S W - W^2 pairs of tokens instead of S^2: nearly a quarter at eight windows."""
    whole = replace(LLAMA, architecture=replace(LLAMA.architecture, windows=()))
    near = replace(LLAMA, architecture=replace(LLAMA.architecture, windows=(64, 64)))
    full, windowed = (
        counted_graph(c, 512, "bf16").layers[1].attention_flops for c in (whole, near)
    )
    assert windowed / full == (2 * 512 * 64 - 64**2) / 512**2
    short = counted_graph(near, 64, "bf16").layers[1].attention_flops
    assert short == counted_graph(whole, 64, "bf16").layers[1].attention_flops


@pytest.mark.parametrize("name", ["gpt-tiny", "llama-tiny", "mixtral-tiny"])
def test_the_described_module_is_the_one_written_by_hand(name):
    from meshwright.model.zoo.described import DescribedTransformer

    by_hand, described = (
        f(NAMED[name]).double() for f in (from_language_model, DescribedTransformer)
    )
    described.load_state_dict(by_hand.state_dict())
    tokens = torch.randint(0, 256, (2, 33), generator=torch.Generator().manual_seed(0))
    losses = [model(tokens[:, :-1], tokens[:, 1:]) for model in (by_hand, described)]
    assert losses[0].item() == losses[1].item()
    for loss in losses:
        loss.backward()
    wanted = dict(by_hand.named_parameters())
    assert all(torch.equal(p.grad, wanted[n].grad) for n, p in described.named_parameters())
