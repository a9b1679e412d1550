"""Ends processes of training runs at every moment, and looks for what is left of the runs.

python benchmarks/kills.py --count 100 --seed 0

Each trial starts `meshwright train`, waits for a moment, and sends a signal to one process of it:
the launcher, the process that ranks are forked from, or a rank. Wanted: no process of the run is
left, all have ended within five seconds (a process that was only stopped: within --timeout and five
seconds), and the launcher names the cause. Counts are printed for each process and moment.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import psutil

from meshwright.runtime.run_folder import METRICS, WEIGHTS

VICTIMS = ("launcher", "starter", "rank")
MOMENTS = ("start-up", "step", "step end", "writing", "teardown")
SIGNALS = {
    "launcher": (signal.SIGKILL, signal.SIGTERM, signal.SIGINT),
    "starter": (signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP),
    "rank": (signal.SIGKILL, signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP),
}
RANKS = 2
STEPS = 5
SILENCE_SECONDS = 3.0
"""The run's --timeout."""
END_SECONDS = 5.0
START_SECONDS = 120.0
TRIES = 30
"""Until a signal comes at the moment that it is meant for."""
CLUSTER = """\
format = 1
name = "here"
[[node]]
name = "here"
devices = ["2 x cpu"]
"""
MODEL = {
    "model_type": "gpt2",
    "vocab_size": 256,
    "n_positions": 64,
    "n_embd": 512,
    "n_layer": 6,
    "n_head": 8,
}
"""Its weights take long enough to write that a signal can come meanwhile: 76 MB."""


@dataclass(frozen=True)
class Trial:
    """One signal, and what came of it."""

    victim: str
    moment: str
    rank: int
    """Of the rank, if one was the victim."""
    number: signal.Signals
    seconds: float
    """Until every process of the run had ended."""
    status: int
    said: str
    left: int
    """Processes that had not ended in time."""

    @property
    def problems(self) -> list[str]:
        """What should not be so."""
        stopped = self.number == signal.SIGSTOP
        limit = END_SECONDS + (SILENCE_SECONDS if stopped else 0.0)
        found = []
        if self.left:
            found.append(f"{self.left} processes left")
        if self.seconds > limit:
            found.append(f"took {self.seconds:.1f} s of {limit:.1f}")
        if "Traceback" in self.said:
            found.append("a traceback")
        if not self._names_the_cause():
            found.append(f"status {self.status} and no cause in {self.said!r}")
        return found

    def _names_the_cause(self) -> bool:
        name = self.number.name
        if self.victim == "launcher":
            # Before it has begun to work, a signal ends it as it ends any process: its caller
            # is told by the status.
            early = self.moment == "start-up" or self.number == signal.SIGKILL
            spoke = self.status == 128 + self.number and self.said.strip() != ""
            return spoke or (early and self.status == -self.number)
        if self.victim == "starter":
            return self.status == 2 and "the process that ranks are forked from" in self.said
        return self.status == 2 and f"rank {self.rank}" in self.said and name in self.said


class Run:
    """A training run that is under way, and its processes."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder / name
        arguments = ["train", "plan.json", "-o", name, "--steps", str(STEPS), "--save-weights"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "meshwright", *arguments, "--timeout", str(SILENCE_SECONDS)],
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )
        self.launcher = psutil.Process(self.process.pid)

    def starter(self) -> psutil.Process | None:
        """The process that ranks are forked from, once there is one."""
        with suppress(psutil.NoSuchProcess):
            for child in self.launcher.children():
                if "meshwright.launch.fork_server" in child.cmdline():
                    return child
        return None

    def rank(self, number: int) -> psutil.Process | None:
        """A rank, once there is one."""
        starter = self.starter()
        with suppress(psutil.NoSuchProcess):
            for child in starter.children() if starter else ():
                if child.name() == f"rank {number}":
                    return child
        return None

    def everyone(self) -> list[psutil.Process]:
        """All processes of the run."""
        with suppress(psutil.NoSuchProcess):
            return [self.launcher, *self.launcher.children(recursive=True)]
        return []

    def victim(self, who: str, rank: int) -> psutil.Process | None:
        """The process of that name, once there is one."""
        if who == "launcher":
            return self.launcher
        return self.rank(rank) if who == "rank" else self.starter()

    def steps(self) -> int:
        """How many steps are done."""
        path = self.folder / METRICS
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def moment(self, who: str) -> str:
        """What the run is doing now, as its files tell. Ranks leave each other when the steps are
        done, ahead of the writing; the launcher takes down what it has started after it."""
        if (self.folder / WEIGHTS).exists():
            return "over" if who == "rank" else "teardown"
        if any(self.folder.glob(f".{WEIGHTS}.*")):
            return "writing"
        done = self.steps()
        if who == "rank" and done == STEPS:
            return "teardown"
        return "step" if done else "start-up"

    def end(self) -> None:
        """Kill whoever is left."""
        for process in self.everyone():
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def running(self) -> bool:
        """Whether the launcher has not ended yet."""
        return self.process.poll() is None


@contextmanager
def prepared() -> Iterator[tuple[Path, float, float]]:
    """A folder with a plan, and the seconds that a run takes to start and for a step."""
    with tempfile.TemporaryDirectory(prefix="meshwright-kills-") as name:
        folder = Path(name)
        (folder / "cluster.toml").write_text(CLUSTER)
        (folder / "config.json").write_text(json.dumps(MODEL))
        plan = "plan --model config.json --cluster cluster.toml --global-batch 4 --sequence 64"
        command = [sys.executable, "-m", "meshwright", *plan.split(), "--precision", "fp32"]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        began = time.monotonic()
        run = Run(folder, "undisturbed")
        wait(lambda: run.steps() or not run.running())
        started = time.monotonic() - began
        wait(lambda: run.steps() == STEPS or not run.running())
        step = (time.monotonic() - began - started) / max(1, STEPS - 1)
        wait(lambda: not run.running())
        assert run.process.stderr is not None
        assert run.process.returncode == 0, run.process.stderr.read()
        yield folder, started, step


def wait(
    condition: Callable[[], object], seconds: float = START_SECONDS, every: float = 0.0005
) -> bool:
    """Poll until a condition holds, at most so long."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(every)
    return True


def trial(
    folder: Path,
    name: str,
    victim: str,
    moment: str,
    draw: random.Random,
    pace: tuple[float, float],
) -> Trial | None:
    """One run and one signal; None if the run was not at that moment when the signal came."""
    started, step = pace
    run = Run(folder, name)
    number = draw.choice(SIGNALS[victim])
    rank = 0 if moment == "writing" else draw.randrange(RANKS)
    try:
        wait(lambda: run.victim(victim, rank) or not run.running(), every=0.01)
        target = run.victim(victim, rank)
        # A rank is there when much of the start is over.
        start_seconds = (0.3 if victim == "rank" else 0.8) * started
        everyone = _await(run, victim, moment, draw, start_seconds, step)
        at = run.moment(victim)
        if target is None or not run.running() or at != moment.replace("step end", "step"):
            return None
        with suppress(psutil.NoSuchProcess):
            target.send_signal(number)
        began = time.monotonic()
        limit = END_SECONDS + SILENCE_SECONDS + 10.0
        wait(lambda: not run.running(), limit)
        _, alive = psutil.wait_procs(everyone[1:], max(0.0, began + limit - time.monotonic()))
        seconds, left = time.monotonic() - began, len(alive) + run.running()
        if run.process.returncode == 0:
            return None  # it had done its work before the signal reached it
        run.end()
        text = run.process.communicate(timeout=END_SECONDS)[1]
        return Trial(victim, moment, rank, number, seconds, run.process.returncode, text, left)
    finally:
        run.end()
        run.process.communicate()


def _await(
    run: Run,
    victim: str,
    moment: str,
    draw: random.Random,
    start_seconds: float,
    step: float,
) -> list[psutil.Process]:
    """Return somewhere within that moment, if all goes well, with the processes of the run."""
    if moment == "start-up":
        time.sleep(draw.uniform(0, start_seconds))
        return run.everyone()
    wait(lambda: run.steps() or not run.running())
    everyone = run.everyone()
    if moment in ("step", "step end"):
        after = draw.randint(1, STEPS - 1)
        wait(lambda: run.steps() >= after or not run.running())
        time.sleep(draw.uniform(0.1, 0.9) * step if moment == "step" else 0.0)
    else:
        wait(lambda: run.moment(victim) == moment or not run.running())
        time.sleep(draw.uniform(0, 0.01))
    return everyone


def soak(count: int, seed: int, tell: Callable[[str], None] = lambda _: None) -> list[Trial]:
    """Runs `count` trials, spread evenly over victims and moments, in the order of the seed."""
    draw = random.Random(seed)
    cells = [*product(VICTIMS, MOMENTS)]
    rounds = -(-count // len(cells))
    order = [cell for _ in range(rounds) for cell in draw.sample(cells, len(cells))][:count]
    trials: list[Trial] = []
    with prepared() as (folder, started, step):
        for index, (victim, moment) in enumerate(order):
            found, tries = None, 0
            while found is None and tries < TRIES:
                found = trial(folder, f"{index}-{tries}", victim, moment, draw, (started, step))
                tries += 1
            assert found is not None, f"{victim} at {moment}: never hit in {TRIES} runs"
            trials.append(found)
            wrong = "; ".join(found.problems) or "ok"
            wrong += f" ({tries} runs)" if tries > 1 else ""
            tell(f"{index + 1:4} {victim:9}{moment:10}{found.number.name:8}"
                 f"{found.seconds:6.2f} s  {wrong}")  # fmt: skip
    return trials


def main() -> None:
    """Print every trial, the counts and what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    trials = soak(options.count, options.seed, lambda line: print(line, flush=True))
    counts = Counter((each.victim, each.moment) for each in trials)
    print(f"\n{'':10}" + "".join(f"{moment:>10}" for moment in MOMENTS))
    for victim in VICTIMS:
        print(f"{victim:10}" + "".join(f"{counts[victim, moment]:>10}" for moment in MOMENTS))
    bad = [each for each in trials if each.problems]
    quick = [each.seconds for each in trials if each.number != signal.SIGSTOP]
    print(f"\n{len(trials)} trials, {len(bad)} bad; longest end {max(quick):.2f} s")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
