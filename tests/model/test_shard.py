"""The table of what tensor ranks hold, and that shares put together are the whole."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

from meshwright.model.shard import (
    Column,
    Row,
    Tile,
    Vocabulary,
    VocabularyHead,
    VocabularyLoss,
    chunk,
    common_tiles,
    held,
    holder,
    slices,
    splits,
    tensor_units,
    within,
)
from meshwright.model.zoo.gpt import GPT
from meshwright.model.zoo.llama import Llama
from meshwright.model.zoo.moe import Mixtral


@given(size=st.integers(0, 300), width=st.integers(1, 20))
def test_chunks_are_consecutive_and_differ_by_one_at_most(size, width):
    shares = [chunk(size, width, index) for index in range(width)]
    assert shares[0][0] == 0
    assert shares[-1][1] == size
    assert all(a[1] == b[0] for a, b in pairwise(shares))
    sizes = [last - first for first, last in shares]
    assert max(sizes) - min(sizes) <= 1
    assert sizes[0] == max(sizes)


@given(
    size=st.integers(0, 300),
    widths=st.lists(st.integers(1, 12), min_size=1, max_size=4, unique=True),
)
def test_common_tiles_are_whole_shares_of_every_width(size, widths):
    """Whatever the size, also where no width divides it."""
    split = Column(parts=(size, 2 * size))
    tiles = common_tiles(widths)
    for width in widths:
        for index in range(width):
            own = held(split, "weight", (3 * size, 5), width, index)
            mine = [slices(split, "weight", (3 * size, 5), tile) for tile in tiles
                    if holder(tile, width) == index]  # fmt: skip
            for part in range(2):
                pieces = [tile.ranges[part] for tile in mine]
                assert (pieces[0][0], pieces[-1][1]) == own.ranges[part]
                assert all(a[1] == b[0] for a, b in pairwise(pieces))


def test_a_tile_lies_in_each_part_of_what_a_rank_holds():
    split = Column(parts=(8, 4, 4))
    own = held(split, "weight", (16, 10), 2, 1)
    tile = slices(split, "weight", (16, 10), Tile(first=3, last=4, of=4))
    assert within(own, tile).ranges == ((2, 4), (5, 6), (7, 8))


def test_fused_projections_are_divided_part_by_part():
    ranges = held(Column(parts=(8, 4, 4)), "weight", (16, 10), 2, 1)
    assert ranges is not None
    assert (ranges.dim, ranges.ranges) == (-2, ((4, 8), (10, 12), (14, 16)))
    bias = held(Column(parts=(8, 4, 4)), "bias", (16,), 2, 0)
    assert bias is not None
    assert (bias.dim, bias.ranges) == (-1, ((0, 4), (8, 10), (12, 14)))


def test_what_is_held_in_full():
    assert held(Row(), "bias", (16,), 2, 0) is None
    assert held(VocabularyLoss(), "weight", (16, 2), 2, 0) is None
    row = held(Row(), "weight", (4, 16, 6), 3, 2)
    assert row is not None
    assert (row.dim, row.ranges) == (-1, ((4, 6),))


def test_an_uneven_vocabulary_gives_some_ranks_one_more():
    for how in (Vocabulary(), VocabularyHead()):
        shares = [held(how, "weight", (11, 4), 4, index) for index in range(4)]
        assert [s.ranges for s in shares if s] == [((0, 3),), ((3, 6),), ((6, 9),), ((9, 11),)]


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
            part = held(how, own, tuple(tensor.shape), width, index)
            if part is not None:
                pieces = [tensor.narrow(part.dim, a, b - a) for a, b in part.ranges]
                state[f"{name}.{own}"] = torch.cat(pieces, part.dim)
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
    logits = [F.linear(head.norm(x), weight[slice(*s.ranges[0])]) for s in shares if s]
    assert torch.equal(head.loss(torch.cat(logits, -1), targets), head(x, targets))
