"""Plans and small models whose training must equal one process's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from adapters import tuned
from meshwright.cluster.spec import Precision
from meshwright.model.config import AttentionKind, LanguageModel
from meshwright.model.transformer.spec import Architecture, Latent, Mixture, Norm, Rotary
from meshwright.model.zoo.described import DescribedTransformer
from meshwright.model.zoo.gpt import GPT
from meshwright.model.zoo.llama import Llama
from meshwright.model.zoo.mixtral import Mixtral
from meshwright.model.zoo.u_transformer import UTransformer
from meshwright.model.zoo.uneven import Uneven
from meshwright.plan.spec import (
    BoundaryKind,
    Pipeline,
    Plan,
    ScheduleName,
    Stage,
    StateDivision,
)
from worlds import plan_by_hand

VOCABULARY, SEQUENCE, ROWS = 33, 8, 8
"""The vocabulary divides by no tensor width."""


class Shared(nn.Module):
    """Learned positions, without rows, that every block reads: they cross every cut whole, and
    their gradient comes back from every row; so does a mask, without gradient."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(6, 6)

        def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
            return torch.tanh(self.map(x + positions)) * mask

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(SEQUENCE, 6)
        self.tokens = nn.Embedding(VOCABULARY, 6)
        self.blocks = nn.ModuleList(Shared.Block() for _ in range(3))
        self.out = nn.Linear(6, VOCABULARY)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        positions = self.positions(steps)
        mask = (steps % 3 > 0).to(positions.dtype)[:, None]
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x, positions, mask)
        logits = self.out(x)
        return nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten())


def gpt(
    tied: bool = True, dropout: float = 0.0, layers: int = 3, width: int = 16, heads: int = 4
) -> nn.Module:
    """Layers: embedding, blocks, head."""
    size = {"vocabulary": VOCABULARY, "positions": SEQUENCE, "width": width, "heads": heads}
    return GPT(**size, layers=layers, tied=tied, dropout=dropout)


def grouped(attention: AttentionKind = "fused", attention_dropout: float = 0.0) -> nn.Module:
    """A Llama with two query heads to each key-value head, and the attention that is asked for."""
    return DescribedTransformer(
        LanguageModel(
            name="grouped", family="llama", vocabulary=VOCABULARY, positions=SEQUENCE, width=16,
            layers=3, heads=4, kv_heads=2, head=4, hidden=24, attention=attention,
            attention_dropout=attention_dropout,
        )
    )  # fmt: skip


class Idle(nn.Module):
    """A parameter that takes part in the forward, but not in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = gpt()
        self.idle = nn.Linear(1, 1)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        loss = self.inner(tokens, targets)
        return loss + self.idle(loss.detach()[None]).sum().detach() * 0


def plain() -> nn.Module:
    """Embedding and head apart: they may be held in different tensor widths."""
    return gpt(tied=False)


def six_heads() -> nn.Module:
    """Divides by two and by three."""
    return gpt(tied=False, heads=6, width=12)


def mixtral() -> nn.Module:
    """Experts, each divided."""
    return Mixtral(
        vocabulary=VOCABULARY, width=16, heads=4, kv_heads=2, layers=2, hidden=24, experts=3
    )


def llama() -> nn.Module:
    """Five layers, grouped-query attention."""
    return Llama(vocabulary=VOCABULARY, width=16, heads=4, kv_heads=2, layers=3, hidden=24)


def described(architecture: dict[str, Any], **sizes: Any) -> Callable[[], nn.Module]:
    """A Llama of four blocks that differs in some ways. Layers: embedding, blocks, head."""
    plain: dict[str, Any] = {"norm": Norm(kind="rms"), "position": "rotary", "activation": "silu",
                             "rotary": Rotary(features=4), "gated": True}  # fmt: skip
    model: dict[str, Any] = {"name": "m", "family": "m", "vocabulary": VOCABULARY, "width": 12,
                             "positions": SEQUENCE, "layers": 4, "heads": 4, "kv_heads": 2,
                             "head": 4, "hidden": 16}  # fmt: skip
    made = Architecture(**(plain | architecture))
    return lambda: DescribedTransformer(LanguageModel(**(model | sizes), architecture=made))


BIASED = described({"query_bias": True, "out_bias": True, "feed_bias": True, "activation": "gelu",
                    "windows": (3, 0, 3, 0), "head_bias": True})  # fmt: skip
CAPPED = described({"place": "both", "score_cap": 5.0, "logit_cap": 3.0, "windows": (3, 0, 3, 0),
                    "query_norm": "head", "embedding_scale": 3.0}, tied=True)  # fmt: skip
SHARED = described({"mixture": Mixture(normalised=False, shared=8, shared_gate=True, dense=(0,),
                                       dense_hidden=16)}, experts=3, chosen=2)  # fmt: skip
LATENT = described(
    {"mixture": Mixture(score="sigmoid", groups=2, group_score="two best", balanced=True, shared=8),
     "latent": Latent(query_rank=6, key_value_rank=6, plain=4, rotary=4, value=4)},
    experts=4, chosen=2, kv_heads=4, head=8,
)  # fmt: skip


def uneven() -> nn.Module:
    """Eight layers of uneven cost with three skip connections."""
    return Uneven(vocabulary=VOCABULARY, widths=(8, 12, 16, 6), hidden=(8, 16, 12, 4, 20, 8))


def u_transformer() -> nn.Module:
    """Eleven layers; two skip connections over the middle, which is a quarter of the wider one."""
    return UTransformer(
        vocabulary=VOCABULARY, positions=SEQUENCE, width=8, heads=2, layers=1, levels=2
    )


def pipeline(
    micro_batches: int, rows: int, *stages: tuple[int, str] | tuple[int, str, tuple[int, ...]]
) -> Pipeline:
    """Stages as (layers, devices): "ab cd" is two replicas of two tensor ranks, "ab again"
    one that recomputes."""
    made, first = [], 0
    for layers, mesh, *shares in stages:
        replicas = mesh.removesuffix("again").split()
        devices = tuple(tuple(f"n:{name}" for name in replica) for replica in replicas)
        share = cast("tuple[int, ...] | None", shares[0] if shares else None)
        held, again = (first, first + layers), mesh.endswith("again")
        made.append(Stage(layers=held, devices=devices, rows=share, recompute=again))
        first += layers
    return Pipeline(micro_batches=micro_batches, rows=rows, stages=tuple(made))


def crossing(kind: BoundaryKind, made: Pipeline) -> Pipeline:
    """The same pipeline with all its boundaries of one kind."""
    first, *others = made.stages
    return replace(made, stages=(first, *(replace(stage, boundary=kind) for stage in others)))


def divided(made: Pipeline) -> Pipeline:
    """The same pipeline with the optimizer states of all its stages divided."""
    states = StateDivision(optimizer="all")
    return replace(made, stages=tuple(replace(stage, states=states) for stage in made.stages))


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and the way it is trained."""

    model: Callable[[], nn.Module]
    pipelines: tuple[Pipeline, ...]
    schedule: ScheduleName = "1f1b"
    precision: Precision = "fp64"
    clip_norm: float = 0.1
    equals: Callable[[], nn.Module] | None = None
    """What one process trains to compare with, if that is another module with the same numbers."""

    @property
    def world_size(self) -> int:
        return len(self.plan.devices)

    @property
    def plan(self) -> Plan:
        made = plan_by_hand(
            *self.pipelines, schedule=self.schedule, sequence=SEQUENCE, precision=self.precision
        )
        return replace(made, devices=tuple(sorted(made.devices)))


def batch(step: int) -> tuple[Tensor, Tensor]:
    """The global batch of a step, the same wherever it is asked for."""
    generator = torch.Generator().manual_seed(1000 + step)
    text = torch.randint(0, VOCABULARY, (ROWS, SEQUENCE + 1), generator=generator)
    return text[:, :-1], text[:, 1:]


KINDS: tuple[BoundaryKind, ...] = ("direct", "scatter_gather", "broadcast")

BOUNDARIES: dict[str, tuple[Callable[[], nn.Module], Pipeline]] = {
    "1x2 to 2x1": (plain, pipeline(2, 4, (2, "ab"), (3, "c d"))),
    "2x1 to 1x2, skips": (uneven, pipeline(4, 2, (3, "a b"), (5, "cd"))),
    "2x1 of 3:1 rows to 1x2, tensors without rows": (
        Shared,
        pipeline(2, 4, (3, "a b", (3, 1)), (3, "cd")),
    ),
    "1x2 to 1x2": (llama, pipeline(4, 2, (2, "ab"), (3, "cd"))),
    "1x3 to 1x2, odd sizes": (
        six_heads,
        pipeline(2, 4, (2, "abc"), (3, "de")),
    ),
    "2x1 of 3:1 rows to 1x4": (plain, pipeline(2, 4, (2, "a b", (3, 1)), (3, "cdef"))),
    "replicas of tp1 and tp2 to 1x3": (
        six_heads,
        pipeline(2, 4, (2, "a bc", (1, 3)), (3, "def")),
    ),
    "2x2 to 1x3": (six_heads, pipeline(4, 2, (2, "ab cd"), (3, "efg"))),
    "1x4, 2x1, 1x2, skips": (
        uneven,
        pipeline(2, 4, (3, "abcd"), (2, "e f", (1, 3)), (3, "gh")),
    ),
    "2x2 to 2x2 of 3:1 rows": (llama, pipeline(2, 4, (2, "ab cd"), (3, "ef gh", (3, 1)))),
}


def boundary_cases() -> Iterator[
    tuple[BoundaryKind, str, Callable[[], nn.Module], Pipeline, ScheduleName]
]:
    """Every kind of boundary between every pair of meshes, schedules in turn."""
    for number, (name, (model, made)) in enumerate(BOUNDARIES.items()):
        for kind in KINDS:
            yield kind, name, model, made, ("1f1b", "gpipe")[number % 2]


CASES: dict[str, Case] = {
    "one process": Case(model=gpt, pipelines=(pipeline(2, 4, (5, "a")),)),
    "one process, skips": Case(model=uneven, pipelines=(pipeline(4, 2, (8, "a")),)),
    "recomputed, experts": Case(model=mixtral, pipelines=(pipeline(2, 4, (4, "a again")),)),
    "pp2 recomputed, skips": Case(
        model=uneven, pipelines=(pipeline(4, 2, (3, "a again"), (5, "b again")),)
    ),
    "tp2 pp2, the first recomputed, tied": Case(
        model=gpt, pipelines=(pipeline(4, 2, (2, "ab again"), (3, "cd")),)
    ),
    "tp2, unfused attention as fused": Case(
        model=partial(grouped, "unfused"),
        pipelines=(pipeline(2, 4, (5, "ab")),),
        equals=grouped,
    ),
    "dp2, tied": Case(model=gpt, pipelines=(pipeline(2, 4, (5, "a b")),)),
    "dp2, states divided, tied": Case(model=gpt, pipelines=(divided(pipeline(2, 4, (5, "a b"))),)),
    "dp3, states divided, skips": Case(
        model=uneven, pipelines=(divided(pipeline(2, 4, (8, "a b c", (2, 1, 1)))),)
    ),
    "pipelines of 2 and 1 stages, states divided, tied": Case(
        model=gpt,
        pipelines=(divided(pipeline(3, 2, (2, "a"), (3, "b"))), divided(pipeline(1, 2, (5, "c")))),
    ),
    "dp2 tp2, first stage's states divided, tied": Case(
        model=gpt,
        pipelines=(
            Pipeline(
                micro_batches=2,
                rows=4,
                stages=(
                    divided(pipeline(2, 4, (3, "ab cd"))).stages[0],
                    pipeline(2, 4, (3, "ab cd"), (2, "ef gh")).stages[1],
                ),
            ),
        ),
    ),
    "dp2 pp2 zb-v, states divided, tied": Case(
        model=gpt,
        pipelines=(divided(pipeline(2, 4, (1, "a b"), (2, "c d"), (1, "c d"), (1, "a b"))),),
        schedule="zb-v",
    ),
    "dp2, shares 3:1": Case(model=llama, pipelines=(pipeline(2, 4, (5, "a b", (3, 1))),)),
    "tp2, tied": Case(model=gpt, pipelines=(pipeline(2, 4, (5, "ab")),)),
    "tp2, experts": Case(model=mixtral, pipelines=(pipeline(2, 4, (4, "ab")),)),
    "tp2, skips": Case(model=uneven, pipelines=(pipeline(1, 8, (8, "ab")),)),
    "pp2 of 1 and 4 layers, tied": Case(model=gpt, pipelines=(pipeline(4, 2, (1, "a"), (4, "b")),)),
    "pp2 gpipe, skips": Case(
        model=uneven, pipelines=(pipeline(4, 2, (3, "a"), (5, "b")),), schedule="gpipe"
    ),
    "two pipelines, batch 6:2, tied": Case(
        model=gpt, pipelines=(pipeline(3, 2, (5, "a")), pipeline(1, 2, (5, "b")))
    ),
    "pp2, tensors without rows": Case(
        model=Shared, pipelines=(pipeline(2, 4, (3, "a"), (3, "b")),)
    ),
    "pp2, nothing but tensors without rows": Case(
        model=Shared, pipelines=(pipeline(2, 4, (1, "a"), (5, "b")),)
    ),
    "tp2 pp2, biases and windows": Case(
        model=BIASED, pipelines=(pipeline(4, 2, (3, "ab"), (3, "cd")),)
    ),
    "tp2, shared experts": Case(model=SHARED, pipelines=(pipeline(2, 4, (6, "ab")),)),
    "dp2 pp2, latent attention": Case(
        model=LATENT, pipelines=(pipeline(2, 4, (2, "a b"), (4, "c d")),)
    ),
    "2BP, capped scores and windows, tied": Case(
        model=CAPPED, pipelines=(pipeline(4, 2, (3, "a"), (3, "b")),), schedule="1f1b-2bp"
    ),
    "dp2 pp2": Case(model=llama, pipelines=(pipeline(2, 4, (2, "a b"), (3, "c d")),)),
    "tp2 pp2, tied": Case(model=gpt, pipelines=(pipeline(4, 2, (2, "ab"), (3, "cd")),)),
    "dp2 tp2, tied": Case(model=gpt, pipelines=(pipeline(2, 4, (5, "ab cd")),)),
    "pp4, skips": Case(
        model=uneven, pipelines=(pipeline(4, 2, (1, "a"), (3, "b"), (2, "c"), (2, "d")),)
    ),
    "pp4 gpipe, tied": Case(
        model=gpt,
        pipelines=(pipeline(8, 1, (1, "a"), (1, "b"), (2, "c"), (1, "d")),),
        schedule="gpipe",
    ),
    "unequal pipelines of 3 and 1 stages, tied": Case(
        model=gpt,
        pipelines=(pipeline(3, 2, (2, "a"), (2, "b"), (1, "c")), pipeline(2, 1, (5, "d"))),
    ),
    "dp3 before dp1": Case(
        model=uneven, pipelines=(pipeline(2, 4, (4, "a b c", (2, 1, 1)), (4, "d")),)
    ),
    "dp1, dp2, dp1, tensors without rows": Case(
        model=Shared, pipelines=(pipeline(2, 4, (2, "a"), (2, "b c", (1, 3)), (2, "d")),)
    ),
    "tp2 before dp2": Case(model=llama, pipelines=(pipeline(2, 4, (2, "ab"), (3, "c d")),)),
    "dp2 tp2 pp2, tied": Case(model=gpt, pipelines=(pipeline(2, 4, (2, "ab cd"), (3, "ef gh")),)),
    "pp8, skips": Case(
        model=uneven, pipelines=(pipeline(8, 1, *((1, device) for device in "abcdefgh")),)
    ),
    "replicas of tp2 and tp1, rows 3:1, tied": Case(
        model=gpt, pipelines=(pipeline(2, 4, (5, "ab c", (3, 1))),)
    ),
    "replicas of tp1 and tp2, skips": Case(
        model=uneven, pipelines=(pipeline(2, 4, (8, "a bc", (1, 3))),)
    ),
    "tied, embedding tp2, head tp1": Case(
        model=gpt, pipelines=(pipeline(4, 2, (2, "ab"), (3, "c")),)
    ),
    "replicas of tp1 and tp3, uneven heads": Case(
        model=lambda: gpt(heads=3, width=12), pipelines=(pipeline(2, 4, (5, "a bcd")),)
    ),
    "replicas of tp1 and tp2, experts": Case(
        model=mixtral, pipelines=(pipeline(2, 4, (4, "a bc", (1, 3))),)
    ),
    "pipelines of tp2 and tp1, grouped queries": Case(
        model=llama,
        pipelines=(pipeline(2, 3, (5, "ab")), pipeline(1, 2, (5, "c"))),
    ),
    "tp2 pp2 and tp1 pp2, tied, batch 6:2": Case(
        model=gpt,
        pipelines=(
            pipeline(3, 2, (2, "ab"), (3, "cd")),
            pipeline(2, 1, (3, "e"), (2, "f")),
        ),
    ),
    "tp4 and tp2 pp2, tied, 6:2": Case(
        model=gpt,
        pipelines=(pipeline(2, 3, (5, "abcd")), pipeline(2, 1, (2, "ef"), (3, "gh"))),
    ),
    "tp1+2 before tp2+3, three widths of a layer": Case(
        model=lambda: gpt(heads=6, width=12),
        pipelines=(pipeline(2, 4, (2, "a bc", (1, 3)), (3, "de fgh", (3, 1))),),
    ),
    "tp3 and tp2 pp2 of tp1+1, gpipe": Case(
        model=lambda: gpt(heads=6, width=12),
        pipelines=(pipeline(1, 4, (5, "abc")), pipeline(2, 2, (1, "de"), (4, "f gh", (1, 1)))),
        schedule="gpipe",
    ),
    "unequal pipelines of tensor ranks": Case(
        model=lambda: gpt(tied=False),
        pipelines=(
            pipeline(3, 2, (2, "a b"), (2, "cd"), (1, "e")),
            pipeline(1, 2, (2, "f"), (2, "gh"), (1, "i")),
        ),
    ),
    "pp2 1f1b-2bp, skips": Case(
        model=uneven, pipelines=(pipeline(4, 2, (3, "a"), (5, "b")),), schedule="1f1b-2bp"
    ),
    "pp2 gpipe-2bp-batched, tied": Case(
        model=gpt, pipelines=(pipeline(4, 2, (2, "a"), (3, "b")),), schedule="gpipe-2bp-batched"
    ),
    "pp2 1f1b-2bp, tensors without rows": Case(
        model=Shared, pipelines=(pipeline(2, 4, (3, "a"), (3, "b")),), schedule="1f1b-2bp"
    ),
    "pp2 zb-v, tied": Case(
        model=gpt,
        pipelines=(pipeline(4, 2, (1, "a"), (2, "b"), (1, "b"), (1, "a")),),
        schedule="zb-v",
    ),
    "pp2 interleaved, skips": Case(
        model=uneven,
        pipelines=(pipeline(4, 2, (2, "a"), (3, "b"), (1, "a"), (2, "b")),),
        schedule="interleaved-1f1b",
    ),
    "dp2 pp2 zb-h1, shares 3:1": Case(
        model=llama,
        pipelines=(pipeline(2, 4, (2, "a b", (3, 1)), (3, "c d", (1, 3))),),
        schedule="zb-h1",
    ),
    "tp2 pp2 zb-h2, tied": Case(
        model=gpt, pipelines=(pipeline(4, 2, (2, "ab"), (3, "cd")),), schedule="zb-h2"
    ),
    "tp2 pp2 gpipe-2bp-batched, experts": Case(
        model=mixtral,
        pipelines=(pipeline(4, 2, (2, "ab"), (2, "cd")),),
        schedule="gpipe-2bp-batched",
    ),
    "two pipelines of 2, 1f1b-2bp-batched, tied": Case(
        model=gpt,
        pipelines=(pipeline(3, 2, (2, "a"), (3, "b")), pipeline(1, 2, (4, "c"), (1, "d"))),
        schedule="1f1b-2bp-batched",
    ),
    "dp2 pp2 zb-v, tied": Case(
        model=gpt,
        pipelines=(pipeline(2, 4, (1, "a b"), (2, "c d"), (1, "c d"), (1, "a b")),),
        schedule="zb-v",
    ),
    "two pipelines, interleaved-2bp, tied": Case(
        model=gpt,
        pipelines=(
            pipeline(2, 2, (1, "a"), (1, "b"), (2, "a"), (1, "b")),
            pipeline(2, 2, (2, "c"), (1, "d"), (1, "c"), (1, "d")),
        ),
        schedule="interleaved-1f1b-2bp",
    ),
    "pp4 zb-h1, skips": Case(
        model=uneven,
        pipelines=(pipeline(8, 1, (1, "a"), (3, "b"), (2, "c"), (2, "d")),),
        schedule="zb-h1",
    ),
    "pp2 1f1b-2bp, recomputed, skips": Case(
        model=uneven,
        pipelines=(pipeline(4, 2, (3, "a again"), (5, "b again")),),
        schedule="1f1b-2bp",
    ),
    "pp2 eager, u-transformer": Case(
        model=u_transformer,
        pipelines=(pipeline(8, 1, (5, "a"), (6, "b")),),
        schedule="eager-1f1b",
    ),
    "tp2 to dp1 by broadcast, eager, u-transformer": Case(
        model=u_transformer,
        pipelines=(crossing("broadcast", pipeline(8, 1, (5, "ab"), (6, "c"))),),
        schedule="eager-1f1b",
    ),
    "2x1 of 3:1 rows to 1x2 by scatter-gather, eager, u-transformer": Case(
        model=u_transformer,
        pipelines=(
            crossing("scatter_gather", pipeline(2, 4, (6, "a b again", (3, 1)), (5, "cd"))),
        ),
        schedule="eager-1f1b",
    ),
    "tp1 and tp2, interleaved, by broadcast, tied": Case(
        model=gpt,
        pipelines=(
            crossing("broadcast", pipeline(8, 1, (1, "a"), (1, "bc"), (1, "a"), (2, "bc"))),
        ),
        schedule="interleaved-1f1b",
    ),
    "tp1 and tp2, zb-v, by broadcast": Case(
        model=lambda: gpt(tied=False),
        pipelines=(
            crossing("broadcast", pipeline(8, 1, (1, "a"), (2, "bc"), (1, "bc"), (1, "a"))),
        ),
        schedule="zb-v",
    ),
    "pp2 zb-v, recomputed, experts": Case(
        model=mixtral,
        pipelines=(pipeline(4, 2, (1, "a again"), (1, "b again"), (1, "b again"), (1, "a again")),),
        schedule="zb-v",
    ),
    "dp2 of 3:1 rows, adapters": Case(
        model=tuned(VOCABULARY, 0, 1, 2), pipelines=(pipeline(2, 4, (5, "a b", (3, 1))),)
    ),
    "tp2, adapters": Case(model=tuned(VOCABULARY, 0, 1, 2), pipelines=(pipeline(2, 4, (5, "ab")),)),
    "pp2, adapters behind a stage that trains nothing": Case(
        model=tuned(VOCABULARY, 2), pipelines=(pipeline(4, 2, (2, "a"), (3, "b")),)
    ),
    "pp2 1f1b-2bp, adapters": Case(
        model=tuned(VOCABULARY, 0, 1, 2),
        pipelines=(pipeline(4, 2, (3, "a"), (2, "b")),),
        schedule="1f1b-2bp",
    ),
    "pp2 gpipe-2bp-batched, adapters before a stage that trains nothing": Case(
        model=tuned(VOCABULARY, 0),
        pipelines=(pipeline(4, 2, (2, "a"), (3, "b")),),
        schedule="gpipe-2bp-batched",
    ),
    "pp2 recomputed, adapters": Case(
        model=tuned(VOCABULARY, 1, 2), pipelines=(pipeline(4, 2, (2, "a again"), (3, "b again")),)
    ),
    "pp2 zb-v, nothing but the head trained": Case(
        model=tuned(VOCABULARY, head=True),
        pipelines=(pipeline(4, 2, (1, "a"), (2, "b"), (1, "b"), (1, "a")),),
        schedule="zb-v",
    ),
    "pp2 eager, frozen and tied": Case(
        model=tuned(VOCABULARY, 0, 2, tied=True),
        pipelines=(pipeline(8, 1, (2, "a"), (3, "b")),),
        schedule="eager-1f1b",
    ),
    "frozen and tied, embedding tp2, head tp1": Case(
        model=tuned(VOCABULARY, 1, tied=True), pipelines=(pipeline(4, 2, (2, "ab"), (3, "c")),)
    ),
    "replicas of tp2 and tp1, rows 3:1, adapters": Case(
        model=tuned(VOCABULARY, 0, 2), pipelines=(pipeline(2, 4, (5, "ab c", (3, 1))),)
    ),
    "pp3, the middle and the last train nothing": Case(
        model=tuned(VOCABULARY, 0), pipelines=(pipeline(4, 2, (2, "a"), (2, "b"), (1, "c")),)
    ),
    "tp2 pp2 zb-h2, adapters": Case(
        model=tuned(VOCABULARY, 0, 1, 2),
        pipelines=(pipeline(4, 2, (2, "ab"), (3, "cd")),),
        schedule="zb-h2",
    ),
    "two pipelines of dp2 and of 2 stages, adapters": Case(
        model=tuned(VOCABULARY, 1, 2),
        pipelines=(pipeline(2, 3, (5, "a b", (2, 1))), pipeline(2, 1, (2, "c"), (3, "d"))),
    ),
} | {
    f"{kind}, {name}": Case(model=model, pipelines=(crossing(kind, made),), schedule=schedule)
    for kind, name, model, made, schedule in boundary_cases()
}
