"""A search that a user watches: lines on stderr if it takes long, and Ctrl-C for what it has."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import typer
from rich.console import Console

from meshwright.cli.options import INTERRUPTED_STATUS
from meshwright.cli.progress import LINE_SECONDS, QUIET_SECONDS, SearchProgress, search_progress
from meshwright.cluster.files import load_cluster
from meshwright.errors import FitError, PlanError, Problem
from meshwright.model.load import load_model
from meshwright.plan.files import load_plan
from meshwright.plan.validate import validate_plan
from meshwright.search.planner import INTERRUPTED


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def watch_of(*, terminal: bool) -> tuple[SearchProgress, Clock, io.StringIO]:
    clock, text = Clock(), io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=120)
    return SearchProgress(console, clock), clock, text


def test_a_short_search_says_nothing():
    watch, clock, text = watch_of(terminal=False)
    watch.tell("searching", 3, 10)
    clock.now += QUIET_SECONDS * 0.99
    watch.tell("simulating", 0, 1)
    assert not watch.stop()
    watch.close()
    assert text.getvalue() == ""


def test_a_long_search_says_what_it_does_now_and_then():
    watch, clock, text = watch_of(terminal=False)
    clock.now += QUIET_SECONDS
    watch.tell("composing", 3, 12)
    watch.found(0.25)
    assert not watch.stop()
    clock.now += LINE_SECONDS
    assert not watch.stop()
    first, second = text.getvalue().splitlines()
    assert first.startswith("planning for 1 s: composing 25%")
    assert second.startswith("planning for 6 s: composing 25%; best so far 250 ms a step")
    assert "Ctrl-C ends it with the best plan so far" in second


def test_on_a_terminal_there_is_one_line_and_it_goes_away():
    watch, clock, text = watch_of(terminal=True)
    clock.now += QUIET_SECONDS
    for done in range(5):
        watch.tell("improving", done, 5)
        clock.now += LINE_SECONDS
    watch.close()
    assert "planning for" in text.getvalue()
    erase = "\x1b[2K"
    assert text.getvalue().rstrip().endswith(erase) or "\x1b[1A" in text.getvalue()
    watch.close()


def test_the_first_ctrl_c_asks_the_search_to_end_and_the_second_ends_it():
    watch, _, text = watch_of(terminal=False)
    watch.interrupt()
    assert watch.stop()
    assert "finishing with the best plan so far; Ctrl-C again ends at once" in text.getvalue()
    with pytest.raises(KeyboardInterrupt):
        watch.interrupt()


REFUSAL = PlanError(Problem("search", "interrupted", "no plan", "one"))


def interrupted(times: int, error: Exception | None = None) -> None:
    """A search that Ctrl-C meets so often, and that then ends with an error."""
    with search_progress():
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)
        if error is not None:
            raise error


def test_ctrl_c_is_noticed_while_it_is_watched_for_and_only_then():
    before = signal.getsignal(signal.SIGINT)
    with search_progress() as watch:
        assert not watch.stop()
        signal.raise_signal(signal.SIGINT)
        assert watch.stop()
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupted_search_without_a_plan_ends_with_its_own_status(capsys):
    with pytest.raises(typer.Exit) as left:
        interrupted(1, REFUSAL)
    assert left.value.exit_code == INTERRUPTED_STATUS == 130
    assert "search: interrupted: found no plan" in capsys.readouterr().err


def test_a_second_ctrl_c_ends_at_once(capsys):
    with pytest.raises(typer.Exit) as left:
        interrupted(2)
    assert left.value.exit_code == INTERRUPTED_STATUS
    assert "nothing was written" in capsys.readouterr().err


def test_errors_of_searches_that_nobody_interrupted_pass():
    with pytest.raises(FitError):
        interrupted(0, FitError(Problem("model", "memory", "too much", "less")))


def test_who_ignores_ctrl_c_goes_on_ignoring_it():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with search_progress() as watch:
            signal.raise_signal(signal.SIGINT)
            assert not watch.stop()
    finally:
        signal.signal(signal.SIGINT, before)


def test_threads_that_are_not_the_first_may_watch_too():
    seen = []

    def watching() -> None:
        with search_progress() as watch:
            seen.append(watch.stop())

    thread = threading.Thread(target=watching)
    thread.start()
    thread.join(timeout=30)
    assert seen == [False]


MANY = """\
format = 1
name = "many"
[[node]]
name = "n"
count = 6000
devices = ["1 x T4"]
network = { bandwidth = "10 Gbit/s", latency = "50 us" }
"""


@pytest.mark.heavy
def test_ctrl_c_on_a_large_cluster_leaves_a_plan_with_its_certificate(tmp_path: Path):
    """Sent as soon as the search is spoken of."""
    (tmp_path / "many.toml").write_text(MANY)
    arguments = ["plan", "--model", "gpt2-xl", "--cluster", "many.toml", "--global-batch", "4096"]
    process = subprocess.Popen(
        [sys.executable, "-m", "meshwright", *arguments],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stderr is not None
        first = process.stderr.readline()
        assert first.startswith("planning for"), first
        process.send_signal(signal.SIGINT)
        told, complained = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, complained
    assert "interrupted: plan.json holds the best plan found so far" in complained
    assert "Traceback" not in complained
    assert "planning for" not in told
    assert "wrote plan.json" in told
    plan = load_plan(tmp_path / "plan.json")
    graph = load_model("gpt2-xl", 1024, plan.job.precision)
    validate_plan(plan, graph, load_cluster(tmp_path / "many.toml"))
    said = json.loads((tmp_path / "plan.json").read_text())["prediction"]
    assert 0 < said["lower_bound_seconds"] < said["step_seconds"]
    assert said["dropped"][INTERRUPTED] == 1
