"""Emulated devices compute in turns, whatever becomes of one of them."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from meshwright.runtime.dilation import Dilation, Dilator
from meshwright.runtime.turns import Turn, turns_at_once

LIMIT_SECONDS = 30.0


def hold(folder: Path, pipe: Connection) -> None:
    """Takes the turn, says so, and keeps it until told to leave it, or for good."""
    turn = Turn(folder, 1)
    turn.take()
    pipe.send("mine")
    pipe.recv()
    turn.leave()
    pipe.send("left")
    pipe.recv()


@pytest.mark.parametrize("killed", [False, True])
def test_one_computes_until_it_leaves_or_ends(tmp_path: Path, killed: bool) -> None:
    ours, theirs = multiprocessing.get_context("forkserver").Pipe()
    other = multiprocessing.get_context("forkserver").Process(target=hold, args=(tmp_path, theirs))
    other.start()
    theirs.close()
    try:
        assert ours.poll(LIMIT_SECONDS)
        assert ours.recv() == "mine"
        second = Turn(tmp_path, 2)
        second.take()  # there are two, and only the first is taken
        assert second.mine
        second.leave()
        if killed:
            other.kill()
        else:
            ours.send("leave")
            assert ours.poll(LIMIT_SECONDS)
        turn = Turn(tmp_path, 1)
        turn.take()
        assert turn.mine
        turn.leave()
        assert not turn.mine
    finally:
        other.kill()
        other.join(LIMIT_SECONDS)


def test_half_of_the_cores_compute() -> None:
    assert [turns_at_once(cores) for cores in (1, 2, 3, 16)] == [1, 1, 1, 8]


def test_a_dilated_device_computes_between_begin_and_end() -> None:
    dilator = Dilator(Dilation(share=0.5))
    turn = dilator._turn
    assert turn is not None
    dilator.begin()
    dilator.catch_up()
    assert turn.mine
    dilator.end()
    assert not turn.mine
    dilator.resume()
    assert turn.mine
    assert dilator.stop() > 0
    assert not turn.mine
