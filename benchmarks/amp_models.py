"""The two models of the AMP paper's trials as LayerGraphs, entry by entry as in their record."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from meshwright.model.config import LanguageModel
from meshwright.model.spec import Division, Layer, LayerGraph, Tensor, Tied, with_division
from meshwright.model.transformer.counted_graph import counted_graph
from meshwright.model.unfused import MOVED, SAVED, with_unfused_attention

HALF = 2
"""Bytes of a number in fp16."""


def _nothing() -> Layer:
    return Layer(
        name="nothing",
        signature="",
        forward_flops=0.0,
        backward_flops=0.0,
        traffic_bytes=0.0,
        parameters=0,
        saved_bytes=0.0,
    )


def _chain(
    name: str, sequence: int, layers: list[Layer], cuts: list[float], tied: tuple[Tied, ...] = ()
) -> LayerGraph:
    """Layers in a row, each with a signature of its own: all were measured one by one."""
    return LayerGraph(
        name=name,
        sequence=sequence,
        precision="fp16",
        layers=tuple(
            replace(layer, name=f"{layer.name}.{index}", signature=f"{name}.{index}")
            for index, layer in enumerate(layers)
        ),
        tensors=tuple(
            Tensor(name=f"t{index}", bytes=size, producer=index, consumers=(index + 1,))
            for index, size in enumerate(cuts)
        ),
        tied=tied,
    )


def gpt2() -> LayerGraph:
    """GPT-2 medium of Megatron: embedding, nothing, 24 blocks, nothing twice, output projection,
    loss. The first and the last stage hold the embedding, which is tied; AMP counts two."""
    shape = LanguageModel(
        name="gpt2",
        family="gpt2",
        vocabulary=52256,
        positions=1024,
        width=1024,
        layers=24,
        heads=16,
        kv_heads=16,
        head=64,
        hidden=4096,
        tied=True,
    )
    # Megatron's kernels of 2022, with its dropout of a tenth, wrote the scores in fp16.
    plain = with_unfused_attention(counted_graph(shape, 1024, "fp16"), shape.heads)
    embedding, *blocks, head = plain.layers
    logits = float(1024 * 52256)
    written = logits * HALF
    projection = replace(head, traffic_bytes=written, saved_bytes=0.0, workspace_bytes=0.0)
    tensor = head.along("tensor")
    projection = with_division(projection, replace(tensor, traffic_bytes=written, saved_bytes=0.0))
    loss = replace(head, forward_flops=0.0, backward_flops=0.0, parameters=0)
    loss = replace(loss, traffic_bytes=head.traffic_bytes - written)
    loss = with_division(
        loss,
        replace(
            tensor,
            flops=0.0,
            traffic_bytes=tensor.traffic_bytes - written,
            parameters=0,
            forward_all_reduce_bytes=(),
            backward_all_reduce_bytes=(),
        ),
    )
    layers = [embedding, _nothing(), *blocks, _nothing(), _nothing(), projection, loss]
    stream = float(1024 * 1024 * HALF)
    tied = tuple(replace(each, layers=(0, len(layers) - 2)) for each in plain.tied)
    return _chain("gpt2", 1024, layers, [stream] * 28 + [written], tied)


def _transformer(tokens: int, width: int, window: int, heads: int) -> Layer:
    """A block on `tokens` tokens that attend within windows. Scores are written to memory; the
    measured times say that tensor ranks do not divide them."""
    stream, scores = float(tokens * width), float(tokens * window * heads)
    products, attention = 24.0 * tokens * width**2, 4.0 * tokens * window * width
    return Layer(
        name="block",
        signature="",
        forward_flops=products,
        attention_flops=attention,
        backward_flops=2 * products + 2.5 * attention,
        traffic_bytes=(38 * stream + MOVED * scores) * HALF,
        parameters=12 * width**2,
        saved_bytes=(17 * stream + SAVED * scores) * HALF,
        workspace_bytes=2 * scores * HALF,
        parallel=(
            Division(
                axis="tensor",
                units=heads,
                parameters=12 * width**2,
                flops=products,
                traffic_bytes=38 * stream * HALF * 12 / 17,
                saved_bytes=12 * stream * HALF,
                forward_all_reduce_bytes=(stream * HALF,) * 2,
                backward_all_reduce_bytes=(stream * HALF,) * 2,
            ),
        ),
    )


def transgan() -> LayerGraph:
    """TransGAN's generator, depths [12, 0, 0, 0, 0, 12], bottom width 9: twelve blocks of width
    1024 on 9 x 9 tokens, and after five doublings of the side twelve of width 16 on 288 x 288, with
    attention inside windows of 16 x 16."""
    wide, narrow = _transformer(81, 1024, 81, 4), _transformer(288**2, 16, 256, 4)
    layers = [_nothing()] * 3 + [wide] * 12 + [_nothing()] * 26 + [narrow] * 12 + [_nothing()] * 3
    first, last = float(81 * 1024 * HALF), float(288**2 * 16 * HALF)
    return _chain("transgan", 1, layers, [first] * 40 + [last] * 15)


MODELS = {"gpt2": gpt2, "transgan": transgan}


def model_of(record: dict[str, Any]) -> LayerGraph:
    """The model that a file of trials names, `GPT-2 medium` as well as `gpt2`; where it names none,
    the one with as many entries as the trials cut."""
    name = re.sub("[^a-z0-9]", "", str(record.get("model", "")).lower())
    for known, build in MODELS.items():
        if name.startswith(known):
            return build()
    entries = {row["stage_boundaries"][-1] for row in record["trials"]}
    for build in MODELS.values():
        if {len(build().layers)} == entries and not name:
            return build()
    raise SystemExit(f"unknown model {record.get('model')!r}; known: {', '.join(MODELS)}")
