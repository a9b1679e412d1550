"""What a failed run comes down to: one cause, in the words of the rank that had it."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
from torch.distributed import DistNetworkError

from meshwright.errors import DataError, LaunchError, Problem, TrainingError
from meshwright.launch.fork_server import EventKind, ProcessEvent
from meshwright.launch.root_cause import root_cause
from meshwright.records import dumps, plain
from meshwright.runtime.failure import is_communication_error
from meshwright.runtime.run_folder import Failure, failure_file

START = 1000.0


def event(
    rank: int, kind: EventKind, seconds: float, status: int = 0, said: str = ""
) -> ProcessEvent:
    return ProcessEvent(rank=rank, seconds=START + seconds, kind=kind, status=status, said=said)


def failure(
    rank: int, seconds: float, kind: str = "DataError", found: str = "found", source: str = ""
) -> Failure:
    return Failure(
        rank=rank,
        seconds=START + seconds,
        kind=kind,
        problems=(Problem(source or f"rank {rank}", "", found, "wanted"),),
        secondary=kind == "PeerLost",
    )


def said(words: Failure) -> ProcessEvent:
    seconds = words.seconds - START
    return event(words.rank, "said", seconds, said=json.dumps(plain(words)))


def ended(rank: int, seconds: float, status: int = 1) -> ProcessEvent:
    return event(rank, "exited", seconds, status)


def text_of(events: Sequence[ProcessEvent], folder: Path) -> str:
    return str(root_cause(events, folder, since=START))


def test_the_first_rank_that_failed_by_itself_is_the_cause(tmp_path: Path) -> None:
    words = [failure(0, 1, "PeerLost"), failure(2, 3), failure(1, 2)]
    found = root_cause([*map(said, words), ended(0, 1.1), ended(2, 3.1), ended(1, 2.1)], tmp_path,
                  since=START)  # fmt: skip
    assert type(found) is DataError
    assert str(found).startswith("rank 1: found")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_a_process_that_a_signal_ended_is_the_cause_and_who_noticed_is_told(
    tmp_path: Path, number: signal.Signals
) -> None:
    lost = ended(1, 1, -number)
    noticed = failure(0, 1.5, "PeerLost", "has gone", source="rank 1")
    text = text_of([lost, said(noticed), ended(0, 1.6)], tmp_path)
    assert text.startswith(f"rank 1: found a process that was ended by {number.name}")
    assert "rank 0 noticed: rank 1 has gone" in text
    assert str(tmp_path) in text


def test_what_came_first_is_the_cause_whatever_kind_it_is(tmp_path: Path) -> None:
    early, late = failure(0, 1), ended(1, 2, -signal.SIGKILL)
    assert text_of([said(early), ended(0, 1.1), late], tmp_path).startswith("rank 0: found found")
    early_end = ended(1, 0.5, -signal.SIGKILL)
    assert text_of([early_end, said(early)], tmp_path).startswith("rank 1: found a process that")


def test_a_rank_that_stands_still_is_the_cause_where_others_only_noticed(tmp_path: Path) -> None:
    stopped = event(1, "stopped", 1, -signal.SIGSTOP)
    noticed = said(failure(0, 9, "PeerLost"))
    text = text_of([stopped, noticed, ended(0, 9.1)], tmp_path)
    assert text.startswith("rank 1: found a process that was stopped by SIGSTOP")
    gone_on = event(1, "continued", 2)
    assert "stopped" not in text_of([stopped, gone_on, noticed, ended(0, 9.1)], tmp_path)
    own = said(failure(2, 5))
    assert text_of([stopped, own, ended(2, 5.1)], tmp_path).startswith("rank 2: found found")


def test_what_pytorch_says_of_messages_tells_of_others() -> None:
    lost = "[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 3000ms for recv operation"
    assert is_communication_error(RuntimeError(lost))
    assert is_communication_error(DistNetworkError("the client socket has failed"))
    assert not is_communication_error(RuntimeError("shapes cannot be multiplied\nNCCL"))
    assert not is_communication_error(OSError("Connection"))


def test_a_process_that_ends_without_a_word_is_named_with_its_status(tmp_path: Path) -> None:
    text = text_of([ended(1, 1, 3), ended(0, 2, 0)], tmp_path)
    assert text.startswith("rank 1: found a process that ended with status 3")


def test_the_store_is_missed_like_a_rank(tmp_path: Path) -> None:
    text = text_of([ended(-1, 1, -signal.SIGKILL)], tmp_path)
    assert text.startswith("the process that keeps the store: found a process that was ended by")


def test_a_process_that_the_system_refuses_is_told_with_the_mend(tmp_path: Path) -> None:
    found = root_cause([event(3, "refused", 1, said="Resource temporarily unavailable")], tmp_path,
                  since=START)  # fmt: skip
    assert type(found) is LaunchError
    assert "rank 3: found Resource temporarily unavailable" in str(found)
    assert "ulimit -u" in str(found)


def test_words_of_other_machines_are_read_from_the_folder_but_not_those_of_old_runs(
    tmp_path: Path,
) -> None:
    failure_file(tmp_path, 5).write_text(dumps(failure(5, 2, found="of this run")))
    failure_file(tmp_path, 4).write_text(dumps(failure(4, -3600, found="of an old run")))
    noticed = [said(failure(0, 9, "PeerLost")), ended(0, 9.1)]
    assert text_of(noticed, tmp_path).startswith("rank 5: found of this run")


@pytest.mark.parametrize("text", ["", "{", '{"rank": 1}', "\x00" * 9, "[" * 5000])
def test_words_that_a_full_disk_cut_short_hide_no_other_cause(tmp_path: Path, text: str) -> None:
    failure_file(tmp_path, 1).write_text(text)
    events = [event(1, "said", 1, said=text), ended(1, 1.1, 7)]
    assert text_of(events, tmp_path).startswith("rank 1: found a process that ended with status 7")


def test_an_exception_that_is_none_of_ours_points_to_the_logs(tmp_path: Path) -> None:
    found = root_cause(
        [said(failure(0, 1, "ZeroDivisionError")), ended(0, 1.1)], tmp_path, since=START
    )
    assert type(found) is TrainingError
    assert f"logs are in {tmp_path}" in str(found)


def test_a_name_that_is_no_error_of_ours_is_never_called(tmp_path: Path) -> None:
    """`kind` comes from a file that others may have written."""
    words = failure(0, 1, "dataclass")
    assert type(root_cause([said(words), ended(0, 1.1)], tmp_path, since=START)) is TrainingError
