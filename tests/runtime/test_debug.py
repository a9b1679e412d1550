"""Debug mode names the message that was another, and the layer that made a number which is none."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Case, Idle, batch, crossing, gpt, pipeline
from ranks import outcomes, run_ranks
from torch import Tensor, nn

from meshwright.errors import LaunchError, PlanError, TrainingError
from meshwright.program.instructions import Instruction
from meshwright.program.operations import Op
from meshwright.runtime.debug import MessageHeaders
from meshwright.runtime.engine import Engine
from meshwright.runtime.run_folder import TrainingOptions
from meshwright.runtime.world import PeerLost

TWO = Case(model=gpt, pipelines=(pipeline(4, 2, (2, "a"), (3, "b")),))
WIDER = Case(model=gpt, pipelines=(crossing("broadcast", pipeline(4, 2, (2, "a"), (3, "bc"))),))
SPLIT = replace(TWO, schedule="1f1b-2bp")


def engine_of(case: Case, **options: Any) -> Engine:
    torch.manual_seed(5)
    make = options.pop("optimizer", lambda p: torch.optim.SGD(p, lr=1e-2))
    chosen = TrainingOptions(clip_norm=0, **options)
    return Engine(case.model(), case.plan, inputs=batch(0), optimizer=make, options=chosen)


def rows(first: int, last: int) -> tuple[Tensor, ...]:
    return tuple(t[first:last] for t in batch(0))


def losses(_: int, cases: list[Case]) -> list[tuple[float, float]]:
    found = []
    for case in cases:
        for debug in (False, True):
            with engine_of(case, debug=debug) as engine:
                found.append([engine.step(rows).loss for _ in range(2)])
    return [(a[-1], b[-1]) for a, b in zip(found[::2], found[1::2], strict=True)]


@pytest.mark.slow
def test_debugging_changes_no_number() -> None:
    for plain, debugged in run_ranks(2, losses, [TWO, SPLIT])[0]:
        assert plain == debugged


@pytest.mark.slow
def test_debugging_a_broadcast_changes_no_number() -> None:
    for plain, debugged in run_ranks(3, losses, [WIDER])[0]:
        assert plain == debugged


def skips_a_broadcast(rank: int) -> str:
    engine = engine_of(WIDER, debug=True)
    engine.steps += rank == 0
    with pytest.raises(TrainingError) as caught:
        engine.step(rows)
    return f"{type(caught.value).__name__} {caught.value}"


def test_a_broadcast_of_another_step_is_refused() -> None:
    results = [text for good, text in outcomes(3, skips_a_broadcast) if good]
    assert any("wanted activation 0 of step 0, micro-batch 0" in text for text in results), results


# Headers.


def skips_a_step(rank: int) -> str:
    engine = engine_of(TWO, debug=True)
    engine.step(rows)
    engine.steps += rank == 0
    with pytest.raises(TrainingError) as caught:
        engine.step(rows)
    return f"{type(caught.value).__name__} {caught.value}"


@pytest.mark.slow
def test_a_rank_that_is_a_step_ahead_is_named_by_its_peer() -> None:
    results = [text for good, text in outcomes(2, skips_a_step) if good]
    told = [text for text in results if text.startswith("TrainingError")]
    assert told, results
    assert "1RECV_F0 peer=0" in told[0]
    assert "from rank 0: activation 0 of step 2, micro-batch 0" in told[0]
    assert "wanted activation 0 of step 1, micro-batch 0" in told[0]


def exchanged(rank: int, sent: dict[str, Any]) -> str:
    """What rank 1 says of a message that it awaits from rank 0."""
    import torch.distributed as dist

    headers = MessageHeaders(torch.device("cpu"))
    op = Op.RECV_F if rank else Op.SEND_F
    i = Instruction(op=op, stage=rank, micro_batch=2, peer=1 - rank, rows=(0, 2))
    tensor = torch.ones(2, 3)

    def post(message: Tensor, tag: int) -> Any:
        return (dist.irecv if rank else dist.isend)(message, 1 - rank, tag=tag)

    if rank == 0:
        i = i._replace(micro_batch=sent.get("micro_batch", 2), stage=sent.get("stage", 0))
        tensor = sent.get("tensor", tensor)
        for work in headers.send(i, 0, tensor, 5, post)[:1]:
            work.wait()
        return ""
    work = headers.receive(i, 0, torch.zeros(2, 3), 5, post)
    with pytest.raises(TrainingError) as caught:
        work.wait()
    return str(caught.value)


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        ({"micro_batch": 3}, "micro-batch 3: 2x3 float32"),
        ({"stage": 2}, "micro-batch 2: 2x3 float32, after stage 2"),
        ({"tensor": torch.ones(2, 4)}, "micro-batch 2: 2x4 float32"),
        ({"tensor": torch.ones(2, 3).bfloat16()}, "micro-batch 2: 2x3 bfloat16"),
    ],
)
def test_a_message_of_another_kind_is_refused(sent: dict[str, Any], words: str) -> None:
    text = run_ranks(2, exchanged, sent)[1]
    assert f"from rank 0: activation 0 of step 0, {words}" in text
    assert "wanted activation 0 of step 0, micro-batch 2: 2x3 float32" in text


# Numbers that are none.


class Poison(nn.Module):
    """Harmless, until a step and a micro-batch; then its forward or backward makes none."""

    def __init__(self, inner: nn.Module, backward: bool) -> None:
        super().__init__()
        self.inner = inner
        self.backward = backward
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        self.calls += 1
        if self.calls != 7:  # the third micro-batch of the second step
            return y
        if not self.backward:
            return y / 0.0
        return y + torch.sqrt(y.sum(-1, keepdim=True) * 0.0)


def poisoned(rank: int, case: Case, backward: bool) -> str:
    engine = engine_of(case, debug=True)
    if rank == 1:
        block = engine._own.stages[1].stage.parts[1].module
        (name,) = [n for n, m in block.named_modules() if n.endswith("mlp")]
        parent = block.get_submodule(name.rpartition(".")[0])
        parent.mlp = Poison(parent.mlp, backward)
    engine.step(rows)
    with pytest.raises(TrainingError) as caught:
        engine.step(rows)
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize("case", [TWO, SPLIT], ids=["1f1b", "1f1b-2bp"])
@pytest.mark.parametrize("backward", [False, True])
def test_the_first_number_that_is_none_is_traced_to_its_layer(case: Case, backward: bool) -> None:
    results = run_ranks(2, poisoned, case, backward)
    way = "backward" if backward else "forward"
    where = r"TrainingError: step 1, micro-batch 2, stage 1: (layer|parameter) blocks\.2"
    assert re.match(rf"{where}[\w.]*, {way}: found", results[1]), results[1]
    assert results[0].startswith(PeerLost.__name__)


# Parameters without gradient, where backwards come in two parts.


def idle(_: int, case: Case) -> str:
    with pytest.raises(TrainingError) as caught:
        engine_of(case).step(rows)
    return str(caught.value)


def test_a_parameter_without_gradient_is_named_after_split_backwards() -> None:
    case = replace(SPLIT, model=Idle, pipelines=(pipeline(4, 2, (2, "a"), (4, "b")),))
    for text in run_ranks(2, idle, case):
        assert "idle.weight: found no gradient" in text
        assert "blocks" not in text


# Compiled layers.


def one_block() -> nn.Module:
    return gpt(layers=1)


def compiled(_: int, compile_it: bool) -> float:
    from torch._inductor import config as inductor

    # Not by a pool of processes, each of which would import PyTorch first.
    inductor.compile_threads = 1
    case = Case(model=one_block, pipelines=(pipeline(2, 4, (3, "a")),))
    with engine_of(case, compile=compile_it) as engine:
        engine.step(rows)
        return engine.step(rows).loss


@pytest.mark.slow
def test_compiled_layers_give_the_same_loss() -> None:
    plain, fast = (run_ranks(1, compiled, each, limit=300)[0] for each in (False, True))
    assert fast == pytest.approx(plain, rel=1e-9)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (SPLIT, "schedule: found 1f1b-2bp, with backwards in two parts"),
        (Case(model=gpt, pipelines=(pipeline(2, 4, (5, "ab")),)), "found tensor width 2"),
    ],
)
def test_what_cannot_be_compiled_is_refused_before_any_process_is_met(
    case: Case, words: str
) -> None:
    with pytest.raises(PlanError, match=words):
        engine_of(case, compile=True)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    hide: Callable[[str], None] = lambda _: None  # noqa: E731
    monkeypatch.setattr("shutil.which", hide)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(LaunchError, match=r"CXX: found none of g\+\+"):
        engine_of(Case(model=gpt, pipelines=(pipeline(2, 4, (5, "a")),)), compile=True)
