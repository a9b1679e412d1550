"""Every option of every verb, and what it can be given that it must refuse, for fuzz.py."""

from __future__ import annotations

from dataclasses import dataclass

from fuzz_mutations import CONTROLS, DIGITS, PAYLOADS, Verdict

PLAN = "plan --model gpt-tiny --cluster cluster.toml --global-batch 4 --sequence 16 --budget 2s"
VERBS = {
    "plan": f"{PLAN} --precision fp32 --optimizer adamw --profile profile.json "
    "--forbid schedules -o out.json",
    "explain": "explain plan.json",
    "simulate": "simulate plan.json --cluster cluster.toml --profile profile.json --trace t.json "
    "--program p.txt --report r.html",
    "compare": "compare plan.json other.json --report r.html",
    "whatif": "whatif plan.json --without b --add 1xT4 --set link.network=1Gbit/s --budget 2s "
    "--forbid schedules -o out.toml",
    "export": "export plan.json --to pipelining-csv -o out",
    "reorder": "reorder plan.json --order gpipe -o out.json",
    "imported": "reorder plan.json --csv order.csv -o out.json",
    "profile": "profile --model gpt-tiny --sequence 16 --rows 1 --tensor 1 --precision fp32 "
    "--cluster cluster.toml --processes 1 -o out.json",
    "train": "train plan.json --data corpus.txt --steps 3 --learning-rate 1e-3 --warmup-steps 1 "
    "--clip-norm 1 --seed 0 --timeout 60 --report r.html --dry-run -o out",
    "calibrate": "calibrate run run2 --cluster cluster.toml -o out.json",
    "propose": "calibrate --propose 2 --model gpt-tiny --cluster cluster.toml --global-batch 4 "
    "--sequence 16 --precision fp32 --profile profile.json -o out",
    "discover": "discover -o out.toml",
    "merge": "discover --merge cluster.toml -o out.toml",
    "verify": "verify plan.json --against dp --cluster cluster.toml --profile profile.json "
    "--steps 3 -o out",
    "demo": "demo --steps 2 -o out",
    "testbed": "testbed run bed.toml --dry-run -- meshwright explain plan.json",
    "launch": "launch run --node a",
}
"""A good line for each; those that would train are only given what they must refuse, unless they
are among RUNS."""

NUMBERS = {
    "negative": "-3",
    "far below": "-1e30",
    "text": "many",
    "empty": "",
    "no number": "nan",
    "infinite": "inf",
    "beyond floats": "1e400",
    "superscript": "²",
    "digits": DIGITS,
    "huge": "1" + "0" * 30,
    "steering": CONTROLS[0],
    "payload": PAYLOADS[1],
    "markup": "[/x]",
}
"""By class: no number of ours is any of these."""
INPUTS = {
    "missing": "none.json",
    "folder": ".",
    "pipe": "pipe",
    "device": "/dev/zero",
    "terminal": "/dev/tty",
    "standard input": "/dev/stdin",
    "loop": "loop",
    "inside a file": "order.csv/x",
    "long": "n" * 5000,
    "steering": "x\x1b[2Jy",
    "markup": "[link=https://x]y[/link]",
    "binary": "tokens.npy",
}
OUTPUTS = {
    "folder": ".",
    "device": "/dev/zero",
    "pipe that nobody reads": "pipe",
    "loop": "loop",
    "inside a file": "order.csv/x",
    "long": "n" * 300,
    "endless": "n" * 5000,
    "steering": "x\x1b[2Jy",
    "no more room": "/dev/full",
}
FOLDERS = {
    "file": "order.csv",
    "device": "/dev/null",
    "loop": "loop",
    "inside a file": "order.csv/x",
    "long": "n" * 300,
    "steering": "x\x1b[2Jy",
}
WORDS = {
    "unknown": "frobnicate",
    "empty": "",
    "steering": CONTROLS[0],
    "payload": PAYLOADS[0],
    "markup": "[/x]",
    "long": "n" * 5000,
}
SORTS = {"number": NUMBERS, "input": INPUTS, "output": OUTPUTS, "folder": FOLDERS, "word": WORDS}


@dataclass(frozen=True)
class Option:
    """An option (or the argument `plan.json`) of a verb."""

    verb: str
    name: str
    sort: str
    zero: Verdict = "refused"
    """What becomes of 0, for a number."""


def _options(verb: str, sort: str, *names: str, zero: Verdict = "refused") -> list[Option]:
    return [Option(verb, name, sort, zero) for name in names]


OPTIONS = (
    *_options("plan", "number", "--global-batch", "--sequence", "--budget"),
    *_options("plan", "word", "--forbid"),
    *_options("plan", "input", "--cluster", "--profile", "--model"),
    *_options("plan", "word", "--precision", "--optimizer", "--model"),
    *_options("plan", "output", "-o"),
    *_options("explain", "input", "plan.json"),
    *_options("simulate", "input", "plan.json", "--cluster", "--profile"),
    *_options("simulate", "output", "--trace", "--program", "--report"),
    *_options("compare", "input", "plan.json", "other.json"),
    *_options("compare", "output", "--report"),
    *_options("whatif", "input", "plan.json"),
    *_options("whatif", "number", "--budget"),
    *_options("whatif", "word", "--without", "--add", "--set", "--forbid"),
    *_options("whatif", "output", "-o"),
    *_options("export", "input", "plan.json"),
    *_options("export", "word", "--to"),
    *_options("export", "folder", "-o"),
    *_options("reorder", "word", "--order"),
    *_options("reorder", "output", "-o"),
    *_options("imported", "input", "--csv"),
    *_options("profile", "number", "--sequence", "--rows", "--tensor", "--processes"),
    *_options("profile", "word", "--model", "--precision"),
    *_options("profile", "input", "--cluster"),
    *_options("profile", "output", "-o"),
    *_options("train", "input", "plan.json"),
    *_options("train", "number", "--steps", "--learning-rate", "--timeout"),
    *_options("train", "number", "--warmup-steps", "--clip-norm", "--seed", zero="accepted"),
    *_options("train", "output", "--report"),
    *_options("train", "folder", "-o"),
    *_options("calibrate", "input", "run", "--cluster"),
    *_options("calibrate", "output", "-o"),
    *_options("propose", "number", "--global-batch", "--sequence"),
    *_options("propose", "number", "--propose", zero="either"),
    *_options("propose", "word", "--model", "--precision"),
    *_options("propose", "input", "--cluster", "--profile"),
    *_options("propose", "folder", "-o"),
    *_options("discover", "output", "-o"),
    *_options("merge", "input", "cluster.toml"),
    *_options("merge", "output", "-o"),
    *_options("verify", "number", "--steps"),
    *_options("verify", "input", "plan.json", "--cluster", "--profile"),
    *_options("verify", "word", "--against"),
    *_options("verify", "folder", "-o"),
    *_options("demo", "number", "--steps"),
    *_options("demo", "folder", "-o"),
    *_options("testbed", "input", "bed.toml"),
    *_options("launch", "folder", "run"),
    *_options("launch", "word", "--node"),
)

ALSO_NAMED = {
    "-o": ("--output",),
    "--model": ("model",),
    "run": ("metrics.jsonl",),
    "--propose": ("calibrate",),
    "--global-batch": ("global_batch",),
    "--rows": ("rows",),
    "--processes": ("processes",),
    "--tensor": ("tensor",),
}
"""What a message may name in the place of an option."""
NO_CORPUS = {
    ("train", "--data", "missing"): "none.txt",
    ("train", "--data", "folder"): ".",
    ("train", "--data", "pipe"): "pipe",
    ("train", "--data", "device"): "/dev/zero",
    ("train", "--data", "empty"): "",
    ("train", "--data", "long"): "n" * 5000,
    ("train", "--data", "steering"): "x\x1b[2Jy",
}
"""Of a corpus any regular file will do, so that only these must be refused."""

RUNS: tuple[tuple[str, Verdict], ...] = (
    ("train plan.json --steps 2 --seed 9223372036854775807 -o out", "accepted"),
    ("train plan.json --steps 1 --warmup-steps 1000 --clip-norm 1e-9 -o out", "accepted"),
    ("train plan.json --steps 3 --clip-norm 0 --learning-rate 1e-30 --report r.html -o out",
     "accepted"),
    ("train plan.json --steps 2 --data tokens.bin --save-weights -o out", "accepted"),
    ("profile --model config.json --sequence 16 --rows 1 -o out.json", "accepted"),
    ("verify plan.json --against dp --steps 3 -o out", "accepted"),
    ("profile --model gpt-tiny --sequence 16 --rows 1048576 -o out.json", "refused"),
    ("profile --model gpt-tiny --sequence 16 --processes 4096 -o out.json", "refused"),
)  # fmt: skip
"""Runs of processes at the ends of their ranges."""


def line_with(verb: str, name: str, value: str) -> list[str]:
    """The arguments of a verb, with another value for one of them."""
    arguments = VERBS[verb].split()
    place = arguments.index(name)
    arguments[place + 1 if name.startswith("-") else place] = value
    return arguments


HARMLESS = {
    ("train", "pipe that nobody reads"),  # nothing is reported of what only is prepared
    ("verify", "empty"),  # no rivals
}
"""Verbs with classes that they need not refuse."""
