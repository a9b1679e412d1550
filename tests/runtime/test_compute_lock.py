"""Emulated devices compute in turns, whatever becomes of one of them."""

from __future__ import annotations

import multiprocessing
import time
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from cases import Case, batch, gpt, pipeline
from ranks import run_ranks, start_server

from meshwright.emulation.compute_lock import ComputeLock, devices_at_once
from meshwright.emulation.dilation import (
    SLICE_SECONDS,
    SOON_SECONDS,
    Dilation,
    Dilator,
    dilation_observer,
)
from meshwright.plan.spec import ScheduleName
from meshwright.runtime.engine import Engine
from meshwright.runtime.run_folder import TrainingOptions

LIMIT_SECONDS = 30.0


def hold(folder: Path, pipe: Connection) -> None:
    """Takes the turn, says so, and keeps it until told to leave it, or for good."""
    turn = ComputeLock(folder, 1)
    turn.acquire()
    pipe.send("mine")
    pipe.recv()
    turn.release()
    pipe.send("left")
    pipe.recv()


@pytest.mark.parametrize("killed", [False, True])
def test_one_computes_until_it_leaves_or_ends(tmp_path: Path, killed: bool) -> None:
    start_server()
    ours, theirs = multiprocessing.get_context("forkserver").Pipe()
    other = multiprocessing.get_context("forkserver").Process(target=hold, args=(tmp_path, theirs))
    other.start()
    theirs.close()
    try:
        assert ours.poll(LIMIT_SECONDS)
        assert ours.recv() == "mine"
        second = ComputeLock(tmp_path, 2)
        second.acquire()  # there are two, and only the first is taken
        assert second.held
        second.release()
        if killed:
            other.kill()
        else:
            ours.send("leave")
            assert ours.poll(LIMIT_SECONDS)
        turn = ComputeLock(tmp_path, 1)
        turn.acquire()
        assert turn.held
        turn.release()
        assert not turn.held
    finally:
        other.kill()
        other.join(LIMIT_SECONDS)


def test_half_of_the_cores_compute() -> None:
    assert [devices_at_once(cores) for cores in (1, 2, 3, 16)] == [1, 1, 1, 8]


def test_a_dilated_device_computes_between_begin_and_end() -> None:
    dilator = Dilator(Dilation(share=0.5))
    turn = dilator._turn
    assert turn is not None
    dilator.begin()
    dilator.catch_up()
    assert turn.held
    dilator.end()
    assert not turn.held
    dilator.resume()
    assert turn.held
    assert dilator.stop() > 0
    assert not turn.held


@pytest.mark.parametrize("slices", [0.1, 1.5])
def test_between_layers_others_compute_if_a_device_has_for_long(slices: float) -> None:
    dilator = Dilator(Dilation(share=0.5))
    turn = dilator._turn
    assert turn is not None
    told: list[str] = []
    leave, take = turn.release, turn.acquire
    turn.release = lambda: (told.append("leave"), leave())[1]  # type: ignore[method-assign]
    turn.acquire = lambda: (told.append("take"), take())[1]  # type: ignore[method-assign]
    began = time.perf_counter()
    dilator.begin()
    end = time.thread_time() + slices * SLICE_SECONDS
    while time.thread_time() < end:
        pass
    dilator.pause()
    assert turn.held
    assert told == (["take", "leave", "take"] if slices > 1 else ["take"])
    if slices > 1:
        assert time.perf_counter() - began >= dilator.lasted
    dilator.stop()


def test_a_device_is_late_only_if_it_did_not_stand_idle() -> None:
    dilator = Dilator(Dilation(share=0.5))

    def busy(seconds: float) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    for idle, given_back in ((0.0, 0.5), (2 * SOON_SECONDS, 0.0)):
        dilator.begin()
        dilator.end()
        dilator._late = 0.5
        dilator.wait_between(partial(busy, idle))
        began = time.perf_counter()
        dilator.begin()
        assert began - dilator._wall == pytest.approx(given_back, abs=0.25)
        dilator.stop()


def pauses(_: int, case: Case) -> int:
    """How often a device may let others compute in a step."""
    count = [0]

    def counted(_: Dilator) -> None:
        count[0] += 1

    Dilator.pause = counted  # type: ignore[method-assign]
    torch.manual_seed(5)
    with Engine(
        case.model(),
        case.plan,
        inputs=batch(0),
        optimizer=lambda p: torch.optim.SGD(p, lr=1e-2),
        options=TrainingOptions(clip_norm=0),
        observer=dilation_observer(Dilator(Dilation(share=0.5))),
    ) as engine:
        engine.step(lambda a, b: tuple(t[a:b] for t in batch(0)))
    return count[0]


@pytest.mark.parametrize("schedule", ["1f1b", "1f1b-2bp"])
def test_every_layer_is_a_place_to_pause_forwards_and_backwards(schedule: ScheduleName) -> None:
    case = Case(model=gpt, pipelines=(pipeline(4, 2, (2, "a"), (3, "b again")),), schedule=schedule)
    assert run_ranks(2, pauses, case) == [4 * 2 * 2, 4 * 2 * 3]
