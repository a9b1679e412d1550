"""The engine beyond parity: random numbers, precisions, measured steps, and everything that stops
a run."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import ROWS, Case, Idle, batch, gpt, grouped, llama, pipeline
from ranks import outcomes, run_ranks
from torch import Tensor, nn

from meshwright.emulation import core_speed
from meshwright.emulation.dilation import Dilation, Dilator, dilation_observer
from meshwright.errors import LaunchError, TrainingError
from meshwright.model.trace import trace
from meshwright.program.compile import compile_plan
from meshwright.program.operations import Op
from meshwright.program.timeline import interval_label
from meshwright.runtime.engine import Engine
from meshwright.runtime.observer import Observer
from meshwright.runtime.run_folder import TrainingOptions
from meshwright.runtime.seeds import layer_seed, rows_seed
from meshwright.runtime.world import PeerLost, connect, launcher_ranks

Rows = Callable[[int, int], tuple[Tensor, ...]]


def rows_of(step: int) -> Rows:
    """A step's batch, as the engine asks for it."""
    whole = batch(step)
    return lambda first, last: tuple(t[first:last] for t in whole)


def engine_of(case: Case, *, clip_norm: float = 0, **others: Any) -> Engine:
    """An engine with the same weights everywhere."""
    torch.manual_seed(5)
    choices = {"optimizer": lambda p: torch.optim.AdamW(p, lr=1e-2), **others}
    options = TrainingOptions(seed=3, clip_norm=clip_norm)
    return Engine(case.model(), case.plan, inputs=batch(0), options=options, **choices)


def losses(_: int, cases: list[Case], steps: int = 4) -> list[list[float]]:
    """Losses of some cases, one after another."""
    found = []
    for case in cases:
        with engine_of(case, clip_norm=1.0) as engine:
            found.append([engine.step(rows_of(step % 2)).loss for step in range(steps)])
    return found


# Dropout.


def dropping() -> nn.Module:
    return gpt(dropout=0.2)


def seeded_losses(steps: int, slice_rows: int) -> list[float]:
    """Plain PyTorch over slices of rows, every layer's generator seeded as documented."""
    torch.manual_seed(5)
    model = dropping().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    place = {"step": 0, "row": 0}

    def seed(name: str) -> Callable[..., None]:
        return lambda *_: (
            torch.manual_seed(layer_seed(3, name) ^ rows_seed(place["step"], place["row"])) and None
        )

    for name in ("embedding", "blocks.0", "blocks.1", "blocks.2", "head"):
        model.get_submodule(name).register_forward_pre_hook(seed(name))
    found = []
    for step in range(steps):
        optimizer.zero_grad()
        place["step"], total = step, 0.0
        for row in range(0, ROWS, slice_rows):
            place["row"] = row
            loss = model(*rows_of(step % 2)(row, row + slice_rows)) * slice_rows / ROWS
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        found.append(total)
    return found


def test_dropout_depends_on_rows_and_not_on_the_plan() -> None:
    plans = [
        Case(model=dropping, pipelines=(pipeline(4, 2, (2, "a"), (3, "b")),)),
        Case(model=dropping, pipelines=(pipeline(2, 4, (5, "a b again")),)),
        Case(model=dropping, pipelines=(pipeline(3, 2, (5, "a")), pipeline(1, 2, (5, "b")))),
    ]
    found = run_ranks(2, losses, [*plans, replace(plans[0], model=gpt)])[0]
    wanted = seeded_losses(4, 2)
    for each in found[:3]:
        assert each == pytest.approx(wanted, rel=1e-9)
    assert found[3] != pytest.approx(wanted, rel=1e-3), "dropout was not active"


def dropping_heads() -> nn.Module:
    return grouped("unfused", 0.2)


@pytest.mark.slow
def test_tensor_ranks_drop_other_weights_than_one_rank_with_all_heads() -> None:
    """With the same slices of rows, all other numbers are the same."""
    stages, ranks = ((2, "a"), (3, "b")), ((5, "ab again"),)
    cases = [Case(model=dropping_heads, pipelines=(pipeline(4, 2, *s),)) for s in (stages, ranks)]
    plain = [replace(case, model=grouped) for case in cases]
    first, second = run_ranks(2, losses, [*cases, *plain])
    for one, other in zip(first, second, strict=True):
        assert one == pytest.approx(other, rel=1e-12)
    whole, divided, *without = first
    assert without[0] == pytest.approx(without[1], rel=1e-9)
    assert divided != pytest.approx(whole, rel=1e-6)
    assert divided != pytest.approx(without[0], rel=1e-6), "dropout was not active"


# Precision.


def test_lower_precisions_stay_close() -> None:
    base = Case(model=gpt, pipelines=(pipeline(2, 4, (2, "a"), (3, "b")),))
    kinds = [replace(base, precision=p) for p in ("fp64", "fp32", "bf16", "fp16")]
    double, single, bf16, fp16 = run_ranks(2, losses, kinds, 6)[0]
    assert single == pytest.approx(double, rel=1e-4)
    assert bf16 == pytest.approx(double, rel=3e-2)
    assert fp16 == pytest.approx(double, rel=3e-2)
    assert bf16 != double


# Weights on the meta device.


def meta_parameters(_: int, cases: list[Case]) -> list[Any]:
    found = []
    for case in cases:
        with torch.device("meta"):
            model = case.model()
        options = TrainingOptions(seed=3, clip_norm=0)
        with Engine(
            model, case.plan, inputs=batch(0), optimizer=torch.optim.SGD, options=options
        ) as engine:
            found.append(engine.parameters())
    return found


def test_initial_weights_do_not_depend_on_the_plan() -> None:
    one = Case(model=gpt, pipelines=(pipeline(2, 4, (5, "a")),))
    two = [
        Case(model=gpt, pipelines=(pipeline(2, 4, (2, "a"), (3, "b")),)),
        Case(model=gpt, pipelines=(pipeline(2, 4, (5, "ab")),)),
    ]
    three = [Case(model=gpt, pipelines=(pipeline(2, 4, (5, "ab c")),))]
    wanted = run_ranks(1, meta_parameters, [one])[0][0]
    for found in (
        *run_ranks(2, meta_parameters, two)[0],
        *run_ranks(3, meta_parameters, three)[0],
    ):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert wanted["blocks.0.mlp.up.weight"].std() > 0.01


# A measured step.


def recorded(rank: int, case: Case) -> Any:
    with engine_of(case) as engine:
        engine.step(rows_of(0))
        result, timeline = engine.record(rows_of(1))
        plain = engine.step(rows_of(0))
        assert (timeline is None) == (rank != 0)
        return result.loss, plain.loss, timeline, engine.program, engine.memory_bytes()


@pytest.mark.parametrize("stages", [((2, "a"), (3, "b c")), ((5, "ab c"),)])
def test_a_recorded_step_has_every_instruction_in_order(stages: Any) -> None:
    case = Case(model=llama, pipelines=(pipeline(4, 2, *stages),))
    ranks = run_ranks(3, recorded, case)
    loss, _, timeline, program, memory = ranks[0]
    assert loss == ranks[1][0]
    assert timeline.source == "measured"
    for rank, instructions in enumerate(program.ranks):
        own = [i for i in timeline.intervals if i.rank == rank]
        assert sorted(i.label for i in own) == sorted(interval_label(i) for i in instructions)
        compute = sorted((i for i in own if i.stream == "compute"), key=lambda i: i.start_seconds)
        assert all(a.end_seconds <= b.start_seconds for a, b in pairwise(compute))
        assert all(0 <= i.start_seconds <= i.end_seconds for i in own)
        assert max(i.end_seconds for i in own) <= timeline.step_seconds
        points = [m for m in timeline.memory if m.rank == rank]
        assert max(m.bytes for m in points) > points[0].bytes == points[-1].bytes > 0
    arrived = {(i.rank, i.micro_batch): i.end_seconds for i in timeline.intervals
               if i.op is Op.RECV_F}  # fmt: skip
    used = {(i.rank, i.micro_batch): i.start_seconds for i in timeline.intervals
            if i.op is Op.FORWARD}  # fmt: skip
    assert all(used[key] >= end for key, end in arrived.items())
    assert memory > 1e7


# Who looks on.


def observed(_: int, case: Case) -> tuple[list[Any], list[Any], list[str]]:
    """What computes in a step, what an observer is told of, and what it was called for."""
    told: list[Any] = []
    called: list[str] = []

    def waiting(wait: Callable[[], Any]) -> Any:
        assert all(end for _, end in told[-1:]), "inside an instruction"
        called.append("waiting")
        return wait()

    def inside(wait: Callable[[], Any]) -> Any:
        assert not told[-1][1], "outside an instruction"
        called.append("inside")
        return wait()

    observer = Observer(
        attach=lambda model, own: called.append(f"{len(model.layers)} {sorted(own.stages)}"),
        before=lambda i: told.append((i, False)),
        after=lambda i: told.append((i, True)),
        posting=lambda: called.append("posting"),
        waiting=waiting,
        waiting_inside=inside,
    )
    with engine_of(case, observer=observer, clip_norm=1.0) as engine:
        engine.step(rows_of(0))
        computing = (Op.FORWARD, Op.BACKWARD, Op.OPTIMIZER_STEP)
        own = [i for i in engine.program.ranks[engine.rank] if i.op in computing]
    return [(i, end) for i in own for end in (False, True)], told, called


def test_an_observer_is_told_of_computing_and_called_for_every_wait() -> None:
    case = Case(model=gpt, pipelines=(pipeline(2, 4, (2, "ab"), (3, "c")),))
    for rank, (computing, told, called) in enumerate(run_ranks(3, observed, case)):
        assert told == computing
        assert called[0] == f"5 {[rank // 2]}"
        assert ("inside" in called) == (rank < 2)
        assert "waiting" in called


def failing(_: int, case: Case) -> list[str]:
    called: list[str] = []

    def fails(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError

    observer = Observer(
        before=lambda _: called.append("before"),
        after=lambda _: called.append("after"),
        failed=lambda: called.append("failed"),
    )
    engine = engine_of(case, observer=observer)
    engine._own.stages[0].stage.forward = fails  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        engine.step(rows_of(0))
    engine.close()
    return called


def test_an_observer_is_told_of_a_failure_in_place_of_the_end() -> None:
    case = Case(model=gpt, pipelines=(pipeline(2, 4, (5, "a")),))
    assert run_ranks(1, failing, case) == [["before", "failed"]]


# Slower devices.


def busy(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_dilation_stretches_computing_and_not_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = core_speed.usual_seconds()
    monkeypatch.setattr(core_speed, "sample_seconds", lambda: usual)
    dilator = Dilator(Dilation(share=0.25))
    start = time.perf_counter()
    dilator.begin()
    busy(0.02)
    dilator.end()
    middle = time.perf_counter()
    assert middle - start >= 0.08
    dilator.resume()
    dilator.end()
    assert time.perf_counter() - middle < 0.02


def dilated(_: int, case: Case) -> Any:
    with engine_of(case) as engine:
        engine.step(rows_of(0))
        cpu = time.thread_time()
        engine.step(rows_of(1))
        cpu = time.thread_time() - cpu
    with engine_of(case, observer=dilation_observer(Dilator(Dilation(share=0.1)))) as engine:
        engine.step(rows_of(0))
        result = engine.step(rows_of(1))
        return result.loss, result.seconds, cpu


def test_a_dilated_run_is_slower_and_equal() -> None:
    case = Case(model=gpt, pipelines=(pipeline(2, 4, (5, "ab")),))
    slow = run_ranks(2, dilated, case)
    assert slow[0][0] == run_ranks(2, losses, [case], 2)[0][0][1]
    assert slow[0][1] > 3 * slow[0][2]


# What stops a run.


class NotANumber(nn.Module):
    """A loss that is none from the first step."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = gpt()
        self.last = nn.Linear(1, 1)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        loss = self.inner(tokens, targets)
        return (self.last(loss[None]) * float("nan")).sum()


def stopped(_: int, case: Case) -> tuple[str, bool]:
    """What a first step says, and whether the weights are still the initial ones."""
    engine = engine_of(case)
    before = [one.parameter.detach().clone() for one in engine._own.local_parameters]
    with pytest.raises(TrainingError) as caught:
        engine.step(rows_of(0))
    after = [one.parameter for one in engine._own.local_parameters]
    same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    engine.close()
    return str(caught.value), same


def test_a_loss_that_is_no_number_stops_every_rank_before_the_weights_change() -> None:
    case = Case(model=NotANumber, pipelines=(pipeline(2, 4, (2, "a"), (4, "b")),))
    for text, same in run_ranks(2, stopped, case):
        assert "step 0: loss: found nan" in text
        assert same


def test_a_parameter_without_gradient_is_named_on_every_rank() -> None:
    case = Case(model=Idle, pipelines=(pipeline(2, 4, (2, "a"), (4, "b")),))
    for text, same in run_ranks(2, stopped, case):
        assert "idle.weight: found no gradient" in text
        assert "idle.bias" in text
        assert "blocks" not in text
        assert same


def dies(rank: int, case: Case, victim: int) -> str:
    engine = engine_of(case)
    engine.step(rows_of(0))

    def rows(first: int, last: int) -> tuple[Tensor, ...]:
        if rank == victim and first > 0:
            os._exit(7)
        return rows_of(1)(first, last)

    start = time.monotonic()
    try:
        while time.monotonic() < start + 20:
            engine.step(rows)
    except PeerLost as lost:
        return f"{time.monotonic() - start:.1f} {lost}"
    raise AssertionError("nobody noticed")


@pytest.mark.parametrize("victim", [0, 3])
def test_when_a_rank_dies_every_other_says_so_and_ends(victim: int) -> None:
    case = Case(model=gpt, pipelines=(pipeline(4, 2, (2, "a b"), (3, "c d")),))
    results = outcomes(4, dies, case, victim, limit=40)
    assert results[victim] == (False, "ended without a word")
    for rank, (good, text) in enumerate(results):
        if rank != victim:
            assert good, text
            assert float(text.split()[0]) < 10
            assert "has gone or stopped answering" in text


def stops(rank: int, case: Case, victim: int) -> str:
    """What a rank says when another one is stopped in the middle of a step."""
    torch.manual_seed(5)
    model, plan = case.model(), case.plan
    program = compile_plan(plan, trace(model.double(), batch(0), "fp64", plan.job.sequence, "any"))
    engine = Engine(
        model, plan, inputs=batch(0), optimizer=lambda p: torch.optim.SGD(p, lr=1e-2),
        options=TrainingOptions(clip_norm=0),
        world=connect(plan, program, timeout_seconds=STALL_SECONDS),
    )  # fmt: skip
    pids: list[int] = [0] * engine.world.size
    dist.all_gather_object(pids, os.getpid())
    engine.step(rows_of(0))

    def rows(first: int, last: int) -> tuple[Tensor, ...]:
        if rank == victim and first > 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        return rows_of(1)(first, last)

    start = time.monotonic()
    try:
        engine.step(rows)
    except PeerLost as lost:
        with suppress(ProcessLookupError):  # another rank has killed it
            os.kill(pids[victim], signal.SIGKILL)
        assert time.monotonic() - start < 2 * STALL_SECONDS
        return str(lost)
    raise AssertionError("nobody noticed")


STALL_SECONDS = 12.0


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 3])
def test_when_a_rank_stops_every_other_names_it_in_the_same_words(victim: int) -> None:
    layers = (pipeline(4, 2, (2, "a"), (1, "b"), (1, "c"), (1, "d")),)
    results = outcomes(4, stops, Case(model=gpt, pipelines=layers), victim, limit=60)
    texts = {text for rank, (_, text) in enumerate(results) if rank != victim}
    assert all(good for rank, (good, _) in enumerate(results) if rank != victim), results
    assert len(texts) == 1, texts
    assert texts.pop().startswith(f"rank {victim}: found has gone or stopped answering (noticed by")


def test_processes_that_build_different_models_are_found() -> None:
    case = Case(model=gpt, pipelines=(pipeline(4, 2, (2, "a"), (3, "b")),))
    results = outcomes(2, mistaken_width, case, limit=40)
    assert any("build the same model" in text for good, text in results if not good), results


def mistaken_width(rank: int, case: Case) -> None:
    from meshwright.model.zoo.gpt import GPT

    width = 16 if rank == 0 else 24
    size = {"vocabulary": 33, "positions": 8, "heads": 4, "layers": 3}
    engine_of(replace(case, model=lambda: GPT(**size, width=width)))


def test_missing_launcher_variables_are_named_with_the_mend() -> None:
    plan = Case(model=gpt, pipelines=(pipeline(2, 4, (5, "a b")),)).plan
    with pytest.raises(LaunchError) as caught:
        launcher_ranks(plan, {"RANK": "0", "WORLD_SIZE": "2"})
    text = str(caught.value)
    assert "LOCAL_RANK, MASTER_ADDR, MASTER_PORT" in text
    assert "meshwright.launch(plan)" in text


@pytest.mark.parametrize(("size", "found"), [("3", "3 processes"), ("two", "'two'")])
def test_a_world_of_the_wrong_size_is_refused(size: str, found: str) -> None:
    plan = Case(model=gpt, pipelines=(pipeline(2, 4, (5, "a b")),)).plan
    environ = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    with pytest.raises(LaunchError, match=found):
        launcher_ranks(plan, {**environ, "WORLD_SIZE": size})


def too_many(_: int, case: Case) -> str:
    with pytest.raises(LaunchError) as caught:
        engine_of(case)
    return str(caught.value)


def test_a_group_of_the_wrong_size_is_refused() -> None:
    case = Case(model=gpt, pipelines=(pipeline(2, 4, (5, "a")),))
    assert all("found 2 processes; wanted 1" in text for text in run_ranks(2, too_many, case))


def engines_left(_: int) -> tuple[int, int]:
    """Engines that are still there after three were closed, and the hooks on the model's
    parameters."""
    case = Case(model=gpt, pipelines=(pipeline(4, 2, (2, "a"), (3, "b")),))
    for _turn in range(3):
        model = case.model()
        options = TrainingOptions(clip_norm=1.0)
        with Engine(model, case.plan, inputs=batch(0), optimizer=sgd_of, options=options) as engine:
            engine.step(lambda a, b: tuple(t[a:b] for t in batch(0)))
        del engine
    gc.collect()
    left = sum(isinstance(each, Engine) for each in gc.get_objects())
    return left, sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())


def sgd_of(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-2)


def test_a_closed_engine_leaves_nothing_behind() -> None:
    assert run_ranks(2, engines_left) == [(0, 0), (0, 0)]
