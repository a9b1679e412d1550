"""The table of what tensor ranks hold, and that shares put together are the whole."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from meshwright.layout.shares import Share, own_share
from meshwright.layout.tiles import within
from meshwright.model.shard import (
    Column,
    Row,
    Vocabulary,
    VocabularyHead,
    VocabularyLoss,
    divided_dim,
    splits,
    tensor_units,
    tile_of,
)
from meshwright.model.zoo.gpt import GPT
from meshwright.model.zoo.llama import Llama
from meshwright.model.zoo.mixtral import Mixtral


def held(split, parameter, shape, width, index):
    """What a rank holds."""
    return tile_of(split, parameter, shape, own_share(width, index))


def test_a_share_lies_in_each_part_of_what_a_rank_holds():
    split = Column(parts=(8, 4, 4))
    own = held(split, "weight", (16, 10), 2, 1)
    tile = tile_of(split, "weight", (16, 10), Share(first=3, last=4, of=4))
    assert within(own, tile) == tuple((rows, (0, 10)) for rows in ((2, 4), (5, 6), (7, 8)))


def test_fused_projections_are_divided_part_by_part():
    tile = held(Column(parts=(8, 4, 4)), "weight", (16, 10), 2, 1)
    assert tile == tuple((rows, (0, 10)) for rows in ((4, 8), (10, 12), (14, 16)))
    bias = held(Column(parts=(8, 4, 4)), "bias", (16,), 2, 0)
    assert bias == (((0, 4),), ((8, 10),), ((12, 14),))


def test_what_is_held_in_full():
    for split, name, shape in (
        (None, "weight", (3, 4)), (Row(), "bias", (16,)), (VocabularyLoss(), "weight", (16, 2))
    ):  # fmt: skip
        assert divided_dim(split, name) is None
        assert held(split, name, shape, 2, 0) == (tuple((0, size) for size in shape),)
    assert held(Row(), "weight", (4, 16, 6), 3, 2) == (((0, 4), (0, 16), (4, 6)),)


def test_an_uneven_vocabulary_gives_some_ranks_one_more():
    for how in (Vocabulary(), VocabularyHead()):
        shares = [held(how, "weight", (11, 4), 4, index) for index in range(4)]
        assert [rows for ((rows, _),) in shares] == [(0, 3), (3, 6), (6, 9), (9, 11)]


def test_a_models_own_table_wins_over_its_modules():
    model = GPT(vocabulary=10, positions=4, width=8, heads=2, layers=1)
    model.tensor_split = {"blocks.0.mlp.up": Row()}
    table = splits(model, ("embedding", "blocks.0", "head"))
    assert table["embedding.tokens"] == Vocabulary()
    assert table["blocks.0.attention.qkv"] == Column(parts=(8, 8, 8))
    assert table["blocks.0.mlp.up"] == Row()
    assert tensor_units(model, ("blocks.0",)) == 2
    assert tensor_units(model, ("embedding",)) == 0


MODELS = {
    "gpt": lambda: GPT(vocabulary=13, positions=8, width=16, heads=4, layers=1),
    "llama": lambda: Llama(vocabulary=13, width=16, heads=4, kv_heads=2, layers=1, hidden=24),
    "mixtral": lambda: Mixtral(
        vocabulary=13, width=16, heads=4, kv_heads=2, layers=1, hidden=24, experts=4
    ),
}


def share_of(block: nn.Module, width: int, index: int) -> dict[str, torch.Tensor]:
    state = dict(block.named_parameters())
    for name, how in block.tensor_split.items():
        for own, tensor in block.get_submodule(name).named_parameters():
            tile = held(how, own, tuple(tensor.shape), width, index)
            pieces = [tensor[tuple(slice(*ends) for ends in box)] for box in tile]
            state[f"{name}.{own}"] = torch.cat(pieces, divided_dim(how, own) or 0)
    return state


@pytest.mark.parametrize("name", MODELS)
def test_the_ranks_summands_of_attention_and_mlp_add_up_to_the_whole(name):
    torch.manual_seed(0)
    block = MODELS[name]().double().blocks[0]
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    for inner, row in (("attention", "out"), ("mlp", "down")):
        module = block.get_submodule(inner)
        bias = getattr(module.get_submodule(row), "bias", None)
        summands = []
        for index in range(2):
            state = share_of(block, 2, index)
            mine = {k.removeprefix(f"{inner}."): v for k, v in state.items() if k.startswith(inner)}
            if bias is not None:
                mine[f"{row}.bias"] = bias if index == 0 else torch.zeros_like(bias)
            summands.append(functional_call(module, mine, (x,)))
        torch.testing.assert_close(sum(summands), module(x), rtol=1e-12, atol=1e-12)


def test_divided_logits_put_together_give_the_loss():
    torch.manual_seed(0)
    head = MODELS["gpt"]().double().head
    x, targets = torch.randn(2, 5, 16, dtype=torch.float64), torch.randint(13, (2, 5))
    weight = head.linear.weight
    shares = [held(VocabularyHead(), "weight", (13, 16), 3, index) for index in range(3)]
    logits = [F.linear(head.norm(x), weight[slice(*rows)]) for ((rows, _),) in shares]
    assert torch.equal(head.loss(torch.cat(logits, -1), targets), head(x, targets))
