"""What a failed run comes down to: one cause, in the words of the rank that had it."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from meshwright.errors import DataError, Problem, TrainingError
from meshwright.records import dumps
from meshwright.runtime.failure import cause
from meshwright.runtime.run import Failure, failure_file

SUMMARY = """\
meshwright.runtime.worker FAILED
Failures:
[1]:
  time      : 2030-01-01_00:00:00
  rank      : {other} (local_rank: {other})
  exitcode  : {other_code} (pid: 11)
Root Cause (first observed failure):
[0]:
  rank      : {root} (local_rank: {root})
  exitcode  : {root_code} (pid: 10)
"""


def write(folder, log="", *failures):
    (folder / "launcher.log").write_text(log)
    for failure in failures:
        failure_file(folder, failure.rank).write_text(dumps(failure))


def failure(rank, kind="DataError", *, secondary=False, seconds=None):
    problem = Problem(f"rank {rank}", "0F0", "found", "wanted", "mend")
    return Failure(
        rank=rank,
        seconds=time.time() if seconds is None else seconds,
        kind=kind,
        problems=(problem,),
        secondary=secondary,
    )


def test_the_first_rank_that_failed_by_itself_is_the_cause(tmp_path):
    write(
        tmp_path,
        "",
        failure(0, "PeerLost", secondary=True, seconds=1.0),
        failure(2, seconds=3.0),
        failure(1, seconds=2.0),
    )
    found = cause(tmp_path, 1)
    assert type(found) is DataError
    assert str(found).startswith("rank 1: 0F0")


@pytest.mark.parametrize("swapped", [False, True])
def test_a_killed_process_is_the_cause_whoever_was_seen_to_fail_first(tmp_path, swapped):
    killed, noticed = {"r": 1, "c": -9}, {"r": 0, "c": 1}
    root, other = (noticed, killed) if swapped else (killed, noticed)
    log = SUMMARY.format(
        root=root["r"], root_code=root["c"], other=other["r"], other_code=other["c"]
    )
    write(tmp_path, log, failure(0, "PeerLost", secondary=True))
    found = cause(tmp_path, 1)
    assert type(found) is TrainingError
    assert str(found).startswith("rank 1: found a process that was ended by SIGKILL")
    assert "rank 0 found;" in str(found)


def test_a_process_that_stood_still_is_named_as_the_others_saw_it(tmp_path):
    noticed = failure(0, "PeerLost", secondary=True)
    problem = replace(
        noticed.problems[0], source="rank 1", field="", found="has gone (Timed out waiting)"
    )
    log = SUMMARY.format(root=1, root_code=-9, other=0, other_code=1)
    write(tmp_path, log, replace(noticed, problems=(problem,)))
    assert str(cause(tmp_path, 1)).startswith("rank 1: found has gone (Timed out waiting)")


def test_processes_that_torchrun_ended_itself_are_not_the_cause(tmp_path):
    write(tmp_path, SUMMARY.format(root=1, root_code=3, other=0, other_code=-15))
    assert str(cause(tmp_path, 1)).startswith("rank 1: found a process that ended with status 3")


def test_a_launcher_that_never_started_gives_its_last_words(tmp_path):
    write(tmp_path, "first\nno such option\n")
    assert "exit status 2: no such option" in str(cause(tmp_path, 2))
