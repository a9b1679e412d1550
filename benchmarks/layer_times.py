"""Times of single layers, as the authors of Zorse measured them, against those that we predict from
datasheets.

    python benchmarks/layer_times.py --times F.csv [--json OUT] [--fit]

Columns: model (one layer of it), device, sequence, precision, rows, forward_ms, backward_ms. For
each device type and precision: the median of ours / theirs, of forward and backward apart, with the
10th and 90th percentiles. `--fit` fits the shared numbers of `cluster/efficiency.py` again, to all
types and to all but one in turn: then the median of the one that was left out is printed too.

Only layers whose form is certain (llama, mistral) count; the file does not say what the layers of
bert, gpt and vit compute besides their products, and their rows are printed apart.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scores import write

from meshwright.cluster.catalog import catalog
from meshwright.cluster.efficiency import (
    ARCHITECTURES,
    SHARED,
    SharedFactors,
    with_reached_shares,
)
from meshwright.cluster.spec import DeviceType, Precision
from meshwright.cost.compute import roofline
from meshwright.model.config import LanguageModel
from meshwright.model.spec import Layer
from meshwright.model.transformer.counted_graph import counted_graph
from meshwright.model.unfused import with_unfused_attention

Array = NDArray[np.float64]

SHAPES = {
    "bert_large": ("gpt2", 1024, 16, 16, 4096),
    "gpt_1.3b": ("gpt2", 2048, 32, 32, 8192),
    "gpt_2.7b": ("gpt2", 2560, 32, 32, 10240),
    "gpt_6.7b": ("gpt2", 4096, 32, 32, 16384),
    "vit_g": ("gpt2", 1408, 16, 16, 6144),
    "llama_3b": ("llama", 3200, 32, 32, 8640),
    "llama_7b": ("llama", 4096, 32, 32, 11008),
    "llama_13b": ("llama", 5120, 40, 40, 13824),
    "llama_33b": ("llama", 6656, 52, 52, 17920),
    "llama_65b": ("llama", 8192, 64, 64, 22016),
    "mistral_7b": ("llama", 4096, 32, 8, 14336),
}
"""Family, width, heads, key-value heads and hidden width of a layer, from the published configs."""
UNCERTAIN = ("bert", "gpt", "vit")
DEVICES = {"a100x40": "A100-40", "w6800": "W6800"}
"""Names of the file that are not the catalogue's in small letters."""
PRECISIONS: Mapping[str, Precision] = {"float16": "fp16", "float32": "fp32", "bfloat16": "bf16"}
ODD = ("P40", "fp16")
"""Predicted, but not fitted to: its forward takes as long as its backward, at half the speed that
the same products have in fp32 on it and in 16 bits on a P100."""
NEUTRAL = SharedFactors(
    forward_exponent=0.6,
    backward_exponent=0.75,
    vector_exponent=0.75,
    vector_forward=1.0,
    vector_backward=1.0,
    integer_forward=1.0,
    integer_backward=1.0,
)
"""Where a fit begins, and what it is held to where the timings say little."""
FEWEST = 20
"""Rows below which a type's median says nothing."""


@dataclass(frozen=True, slots=True)
class Timing:
    """One row of the file."""

    device: str
    precision: Precision
    model: str
    layer: Layer
    rows: int
    seconds: Array
    """Of forward and backward."""


def device_name(text: str) -> str:
    """The catalogue's name of a device of the file. Raises SystemExit for one that is not there."""
    folded = {name.lower(): name for name in catalog()}
    name = DEVICES.get(text, folded.get(text.lower(), ""))
    if name not in catalog():
        raise SystemExit(f"unknown device {text!r}; known: {', '.join(catalog())}")
    return name


@lru_cache
def layer(model: str, sequence: int, precision: Precision) -> Layer:
    """One block of a model."""
    family, width, heads, kv_heads, hidden = SHAPES[model]
    shape = LanguageModel(
        name=model,
        family=family,
        vocabulary=32000,
        positions=max(sequence, 4096),
        width=width,
        layers=1,
        heads=heads,
        kv_heads=kv_heads,
        head=width // heads,
        hidden=hidden,
    )
    graph = counted_graph(shape, sequence, precision)
    if model.startswith(UNCERTAIN):
        graph = with_unfused_attention(graph, heads)
    return next(each for each in graph.layers if each.attention_flops)


def read(path: Path) -> list[Timing]:
    """The rows of the file."""
    with path.open(encoding="utf-8", newline="") as file:
        return [
            Timing(
                device=device_name(row["device"]),
                precision=PRECISIONS[row["precision"]],
                model=row["model"],
                layer=layer(row["model"], int(row["sequence"]), PRECISIONS[row["precision"]]),
                rows=int(row["rows"]),
                seconds=np.array([float(row["forward_ms"]), float(row["backward_ms"])]) / 1e3,
            )
            for row in csv.DictReader(file)
        ]


def device_type(name: str, shared: SharedFactors) -> DeviceType:
    """A catalogue type, with the shares that these factors give it where none is stated."""
    entry = catalog()[name]
    if entry.architecture is None or shared == SHARED:
        return entry.type
    known = entry.type.matmul_shares or {}
    fastest = max(entry.type.peak, key=_peak(entry.type))
    stated = {"attention_efficiency": 0.0}
    if fastest not in known:
        stated["matmul_efficiency"] = 0.0
    chip = ARCHITECTURES[entry.architecture]
    return with_reached_shares(entry.type, chip, entry.watts, stated, shared)


def _peak(kind: DeviceType) -> Callable[[Precision], float]:
    return lambda precision: kind.peak[precision]


def ratios(timings: Sequence[Timing], shared: SharedFactors = SHARED) -> Array:
    """Ours / theirs of each timing, forward and backward."""
    kinds = {name: device_type(name, shared) for name in {each.device for each in timings}}
    return np.array(
        [
            roofline(each.layer, kinds[each.device], each.precision, 1, each.rows) / each.seconds
            for each in timings
        ]
    )


Groups = dict[tuple[str, str], list[Timing]]


def by_type(timings: Sequence[Timing]) -> Groups:
    """The timings of each device type and precision."""
    found: Groups = {}
    for each in timings:
        found.setdefault((each.device, each.precision), []).append(each)
    return dict(sorted(found.items()))


def cost(groups: Groups, shared: SharedFactors) -> float:
    """The sum of the squared logarithms of all medians; a little for moving away from the start."""
    total = sum(
        float((np.log(np.median(ratios(each, shared), axis=0)) ** 2).sum())
        for each in groups.values()
    )
    moved = [np.log(getattr(shared, x.name) / getattr(NEUTRAL, x.name)) for x in fields(shared)]
    return total + 0.02 * float(np.square(moved).sum())


def fit(groups: Groups) -> SharedFactors:
    """The shared factors with the least cost, one after the other in ever smaller steps."""
    best, least, step = NEUTRAL, cost(groups, NEUTRAL), 0.2
    while step > 0.01:
        before = least
        for each in fields(best):
            for factor in (1 + step, 1 / (1 + step)):
                value = getattr(best, each.name) * factor
                if each.name.endswith("exponent") and value > 1:
                    continue
                tried = replace(best, **{each.name: value})
                if (found := cost(groups, tried)) < least:
                    best, least = tried, found
        step = step / 2 if least == before else step
    return best


def thinned(groups: Groups, most: int = 30) -> Groups:
    """Every n-th row of each type: enough for a median, and quick to predict."""
    return {key: each[:: max(len(each) // most, 1)] for key, each in groups.items()}


def line(name: str, found: Array) -> str:
    """A table row: rows, medians and 10th and 90th percentiles of forward and backward."""
    cells = []
    for column in found.T:
        low, middle, high = np.quantile(column, [0.1, 0.5, 0.9])
        cells.append(f"{middle:.2f} | {low:.2f} to {high:.2f}")
    return f"| {name} | {len(found)} | {' | '.join(cells)} |"


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--times", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--fit", action="store_true", help="fit again, leave each type out in turn")
    chosen = parser.parse_args()
    timings = read(chosen.times)
    certain = by_type([each for each in timings if not each.model.startswith(UNCERTAIN)])
    others = by_type([each for each in timings if each.model.startswith(UNCERTAIN)])
    print("| type | rows | forward, ours / theirs | spread | backward | spread |")
    print("|---|---|---|---|---|---|")
    medians: dict[str, list[float]] = {}
    for (device, precision), own in certain.items():
        found = ratios(own)
        print(line(f"{device} {precision}", found))
        if len(own) >= FEWEST:
            medians[f"{device} {precision}"] = [float(x) for x in np.median(found, axis=0)]
    for (device, precision), own in others.items():
        for model in sorted({each.model for each in own}):
            found = ratios([each for each in own if each.model == model])
            print(line(f"{device} {precision} {model} (form uncertain)", found))
    left_out = leaving_one_out(certain) if chosen.fit else {}
    write(chosen.json, {"medians": medians, "leaving_one_type_out": left_out})
    return 0


def leaving_one_out(groups: Groups) -> dict[str, list[float]]:
    """Prints the factors that all types give, and the medians of each type by factors that were
    fitted to the others."""
    counted = {key: each for key, each in groups.items() if len(each) >= FEWEST}
    few = thinned({key: each for key, each in counted.items() if key != ODD})
    print(f"fitted to all: {fit(few)}")
    found = {}
    for device in sorted({device for device, _ in counted}):
        factors = fit({key: each for key, each in few.items() if key[0] != device})
        for key, own in counted.items():
            if key[0] == device:
                medians = np.median(ratios(own, factors), axis=0)
                found[" ".join(key)] = [float(x) for x in medians]
                print(f"| {' '.join(key)} from the others | {medians[0]:.2f} | {medians[1]:.2f} |")
    return found


if __name__ == "__main__":
    sys.exit(main())
