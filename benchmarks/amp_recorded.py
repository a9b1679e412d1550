"""AMP's recorded predictions against ours, row by row.

    python benchmarks/amp_recorded.py --data DIR

DIR holds profiles.json, homogeneous_trials.json and het_model_trials.json: the measurements and
predictions published with AMP's code (github.com/MccRee177/AMP). Exits 1 unless every recorded
strategy is enumerated, its partition is the same and its prediction within 1 %. The one strategy
that AMP enumerates without trying it (the last of its ranking) has no row to compare with; it must
rank behind all recorded ones.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from meshwright.rivals import amp

TOLERANCE = 0.01
WORD_BITS = 32


@dataclass(frozen=True, slots=True)
class Row:
    """One recorded strategy and our prediction of it."""

    prediction: amp.AmpPrediction
    recorded_bounds: tuple[int, ...]
    recorded_seconds: float

    @property
    def error(self) -> float:
        """Relative, signed."""
        return self.prediction.seconds / self.recorded_seconds - 1


@dataclass(frozen=True, slots=True)
class Comparison:
    """One recorded set."""

    name: str
    rows: tuple[Row, ...]
    missing: int
    """Recorded strategies that we did not enumerate."""
    extra: tuple[amp.AmpPrediction, ...]
    """Enumerated strategies without a record."""
    seconds: float

    @property
    def largest_error(self) -> float:
        """Relative, absolute value."""
        return max(abs(row.error) for row in self.rows)

    @property
    def equal_partitions(self) -> int:
        """Rows with the recorded layer assignment."""
        return sum(row.prediction.bounds == row.recorded_bounds for row in self.rows)

    @property
    def spearman(self) -> float:
        """Rank correlation of our predictions with the recorded ones."""
        ours = _ranks([row.prediction.seconds for row in self.rows])
        theirs = _ranks([row.recorded_seconds for row in self.rows])
        return float(np.corrcoef(ours, theirs)[0, 1])

    @property
    def holds(self) -> bool:
        """Same strategies, same partitions, predictions within the tolerance."""
        worst = max(row.prediction.seconds for row in self.rows)
        return (
            self.missing == 0
            and all(p.seconds > worst for p in self.extra)
            and self.equal_partitions == len(self.rows)
            and self.largest_error <= TOLERANCE
        )


def _ranks(values: list[float]) -> np.ndarray:
    """Ranks with ties averaged, equal to the record's four decimals."""
    rounded = np.round(values, 4)
    return np.array(
        [(rounded < value).sum() + ((rounded == value).sum() + 1) / 2 for value in rounded]
    )


def gpt2(forward: dict[int, tuple[float, ...]]) -> amp.AmpModel:
    """GPT-2 medium: embedding, no-op, 24 layers, two no-ops, output embedding, no-op. A no-op hands
    on what the entry before it made."""
    hidden, sequence, vocabulary, layers = 1024, 1024, 52256, 24
    return amp.AmpModel(
        forward_seconds=forward,
        assigned=tuple(range(layers + 6)),
        uniform=(2, layers, 4),
        boundary_words={
            tensor: (float(sequence * hidden),) * (layers + 4)
            + (sequence * vocabulary / tensor,) * 2
            for tensor in forward
        },
        parameter_words=(0.0,) * 2 + (12.0 * hidden**2,) * layers + (0.0,) * 4,
        embedding_words=float(hidden * vocabulary),
        embeddings=(0, layers + 4),
    )


def transgan(forward: dict[int, tuple[float, ...]]) -> amp.AmpModel:
    """TransGAN, depths [12, 0, 0, 0, 0, 12], bottom width 9. AMP assigns the entry and the 24
    transformer layers only, and its even cut counts 24 of these 25."""
    hidden, bottom = 1024, 9
    wide, narrow = tuple(range(3, 15)), tuple(range(41, 53))
    parameters = [0.0] * len(forward[1])
    for entry in wide:
        parameters[entry] = 12.0 * hidden**2
    for entry in narrow:
        parameters[entry] = 12.0 * (hidden / 64) ** 2
    return amp.AmpModel(
        forward_seconds=forward,
        assigned=(0, *wide, *narrow),
        uniform=(0, 24, 0),
        boundary_words={tensor: (float(hidden * bottom**2),) * 25 for tensor in forward},
        parameter_words=tuple(parameters),
    )


def _cluster(network_gbit: float, inside_gbit: float) -> amp.AmpCluster:
    node = amp.AmpNode(network=network_gbit * 1e9 / WORD_BITS, inside=inside_gbit * 1e9 / WORD_BITS)
    return amp.AmpCluster(devices_per_node=4, nodes=(node,) * 4)


SETS = {
    "homogeneous_trials": ("gpt2_G4", gpt2, _cluster(50, 50)),
    "het_model_trials": ("transgan_P3", transgan, _cluster(10, 170)),
}


def _key(trial: dict[str, Any]) -> amp.Strategy:
    return amp.Strategy(
        tensor=trial["tensor_parallel"],
        data=trial["data_parallel"],
        stages=trial["pipeline_parallel"],
        micro_batch=trial["micro_batch_size"],
    )


def compare(folder: Path, name: str) -> Comparison:
    """Run AMP on one recorded set. Its seconds count the search alone, not the reading."""
    profile, build, cluster = SETS[name]
    times = json.loads((folder / "profiles.json").read_text())["forward_seconds_per_sample"]
    record = json.loads((folder / f"{name}.json").read_text())
    model = build({int(tensor): tuple(row) for tensor, row in times[profile].items()})
    start = time.perf_counter()
    ranking = amp.rank(model, cluster, record["global_batch_size"])
    seconds = time.perf_counter() - start
    recorded = {_key(trial): trial for trial in record["trials"]}
    rows = tuple(
        Row(
            prediction=prediction,
            recorded_bounds=tuple(recorded[prediction.strategy]["stage_boundaries"]),
            recorded_seconds=recorded[prediction.strategy]["amp_predicted_step_seconds"],
        )
        for prediction in ranking
        if prediction.strategy in recorded
    )
    return Comparison(
        name=name,
        rows=rows,
        missing=len(recorded) - len(rows),
        extra=tuple(p for p in ranking if p.strategy not in recorded),
        seconds=seconds,
    )


def _print(found: Comparison) -> None:
    print(f"\n{found.name}\n  dp tp pp  mb   ours s   AMP s    error  partition")
    for row in found.rows:
        s = row.prediction.strategy
        same = "same" if row.prediction.bounds == row.recorded_bounds else "DIFFERENT"
        print(
            f"  {s.data:2} {s.tensor:2} {s.stages:2} {s.micro_batch:3}"
            f" {row.prediction.seconds:8.4f} {row.recorded_seconds:7.4f} {row.error:+8.4%}"
            f"  {same} {list(row.prediction.bounds)}"
        )
    for extra in found.extra:
        print(f"  enumerated, no record: {extra.strategy} {extra.seconds:.4f} s")
    print(
        f"  {len(found.rows)} rows, {found.missing} missing; partitions equal "
        f"{found.equal_partitions}; largest error {found.largest_error:.4%}; "
        f"Spearman {found.spearman:.6f}; {found.seconds:.2f} s"
    )


def main() -> int:
    """Print both sets; 0 if they hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, required=True, help="folder of AMP's records")
    folder = parser.parse_args().data
    found = [compare(folder, name) for name in SETS]
    for comparison in found:
        _print(comparison)
    print(f"\nboth sets in {sum(c.seconds for c in found):.2f} s")
    return 0 if all(c.holds for c in found) else 1


if __name__ == "__main__":
    sys.exit(main())
