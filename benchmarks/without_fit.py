"""Predictions of published runs with no constant fitted to them: each set of runs is left out.

    python benchmarks/without_fit.py --data FOLDER [--pairs] [--json OUT]

FOLDER holds amp/, llmfoundry/ and vtrain/. The constants are those that ship for the system that
ran the set (`cost/runtimes.py`); of AMP's trials, whose layers' forwards are published, the host's
constants are fitted to the other one of its two sets. The error bar of a set is that of the other
sets: the 3rd and the 97th percentile of measured / predicted, each set counting alike.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path

import fsdp_runs
import numpy as np
import vtrain_runs
from amp_trials import Predictor, fit_to, judge
from beliefs import FSDP_PRIOR, MEGATRON_PRIOR
from grids import Trial, predict
from numpy.typing import NDArray
from scores import kendall_tau, spearman, summary, write

from meshwright.units import parse_bandwidth

Array = NDArray[np.float64]
CLUSTERS = Path(__file__).parent.parent / "examples" / "clusters"
BAR = (0.03, 0.97)
"""Quantiles of measured / predicted between which the bar lies."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """One set, predicted without it."""

    name: str
    predicted: Array
    measured: Array
    groups: Sequence[object]
    """Runs of one group train one model on one cluster with one batch: their order counts."""
    regret: float | None = None
    """Measured seconds of the layout that is predicted to be best, over the best; the median over
    the groups. None where a group holds no choice of layouts."""
    pieces: Array | None = None
    """Stages times micro-batches of each run."""

    @property
    def ratios(self) -> Array:
        """Measured / predicted."""
        return self.measured / self.predicted


def amp(data: Path) -> list[LeftOut]:
    """AMP's two sets, each with the host and the links that the other one tells."""
    files = [("homogeneous_trials", "t4-16"), ("het_model_trials", "v100-16")]
    sets = [
        Predictor(data / f"{trials}.json", CLUSTERS / f"{cluster}.toml", data / "profiles.json")
        for trials, cluster in files
    ]
    found = []
    for name, own, other in (("AMP T4", sets[0], sets[1]), ("AMP V100", sets[1], sets[0])):
        constants = fit_to([other])
        figures = judge(own, constants)
        predicted = own.seconds(constants, own.ran)
        one = [0] * len(own.ran)
        each = pieces([own.trials[i] for i in own.ran])
        found.append(LeftOut(name, predicted, own.measured[own.ran], one, figures["regret"], each))
    return found


def vtrain(path: Path) -> LeftOut:
    """vTrain's runs, with the constants of Megatron."""
    worlds, plain, measured = vtrain_runs.read(path, parse_bandwidth("800 Gbit/s"))
    trials = vtrain_runs.recomputed_where_needed(worlds, plain)
    predicted = predict(worlds, trials, MEGATRON_PRIOR, np.arange(len(trials)))
    groups = [(t.world, t.batch) for t in trials]
    regret = median_regret(predicted, measured, groups)
    return LeftOut("vTrain", predicted, measured, groups, regret, pieces(trials))


def fsdp(folder: Path) -> LeftOut:
    """The FSDP runs of llm-foundry, with the constants of FSDP."""
    runs, measured = fsdp_runs.read([folder / "h100_80gb.csv", folder / "a100_80gb.csv"])
    predicted = partial(fsdp_runs.predict, runs)(FSDP_PRIOR, np.arange(len(runs)))
    tokens = fsdp_runs.throughput(runs, np.ones(len(runs)))
    groups = [(run.name, *run.cluster.types) for run in runs]
    return LeftOut("FSDP", predicted / tokens, measured / tokens, groups)


def pieces(trials: Sequence[Trial]) -> Array:
    """The pieces of work that each trial's pipeline passes on in a step."""
    return np.array([t.stages * t.batch / (t.data * t.rows) for t in trials])


def median_regret(predicted: Array, measured: Array, groups: Sequence[object]) -> float:
    """What the first choice costs beside the best, the median over the groups."""
    found = []
    for group in dict.fromkeys(groups):
        own = np.array([each == group for each in groups])
        found.append(measured[own][predicted[own].argmin()] / measured[own].min())
    return float(np.median(found))


def bar_of(sets: Sequence[LeftOut]) -> tuple[float, float]:
    """The quantiles of measured / predicted over several sets that count alike."""
    low, high = (np.mean([np.quantile(np.log(s.ratios), q) for s in sets]) for q in BAR)
    return float(np.exp(low)), float(np.exp(high))


def show(sets: Sequence[LeftOut]) -> dict[str, dict[str, float]]:
    """Print the table."""
    print("| set | runs | median error | mean | rank correlation | regret | bar | within the bar |")
    print("|---|---|---|---|---|---|---|---|")
    found = {}
    for own in sets:
        low, high = bar_of([each for each in sets if each is not own] or sets)
        covered = float(np.mean((own.ratios >= low) & (own.ratios <= high)))
        figures = summary(own.predicted, own.measured)
        figures |= {"rank_correlation": rank_correlation(own), "covered": covered}
        regret = "" if own.regret is None else f"{own.regret:.3f}"
        print(
            f"| {own.name} | {len(own.measured)} | {figures['median_relative_error']:.1%} | "
            f"{figures['mean_relative_error']:.1%} | {figures['rank_correlation']:.3f} | {regret} "
            f"| {low:.2f} to {high:.2f} | {covered:.0%} |"
        )
        found[own.name] = figures
    low, high = bar_of(sets)
    print(f"the bar of all sets: {low:.2f} to {high:.2f} of a prediction")
    return found


def rank_correlation(own: LeftOut) -> float:
    """Spearman's within each group of at least five runs, the median over the groups; Kendall's tau
    over all groups if none is as large."""
    found = []
    for group in dict.fromkeys(own.groups):
        inside = np.array([each == group for each in own.groups])
        if inside.sum() >= 5:
            found.append(spearman(own.predicted[inside], own.measured[inside]))
    return (
        float(np.median(found)) if found else kendall_tau(own.predicted, own.measured, own.groups)
    )


GAPS = (0.0, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2)


def show_pairs(sets: Sequence[LeftOut]) -> None:
    """Of pairs of layouts of one group: how often the one that was predicted to be faster was, by
    how much it was predicted to be, and whether it has more pieces of work."""
    print("| set | predicted gain | more pieces: pairs | right | fewer or as many: pairs | right |")
    print("|---|---|---|---|---|---|")
    for own in sets:
        gains, finer, right = compared(own)
        for low, high in pairwise(GAPS):
            cells = []
            for chosen in (finer, ~finer):
                inside = chosen & (gains >= low) & (gains < high)
                share = f"{right[inside].mean():.0%}" if inside.any() else ""
                cells += [str(inside.sum()), share]
            print(f"| {own.name} | {low:.0%} to {high:.0%} | {' | '.join(cells)} |")


def compared(own: LeftOut) -> tuple[Array, NDArray[np.bool_], NDArray[np.bool_]]:
    """Of every pair within a group: the predicted gain of the faster one, whether it has more
    pieces, and whether it was measured to be faster."""
    assert own.pieces is not None
    gains, finer, right = [], [], []
    for group in dict.fromkeys(own.groups):
        inside = [index for index, each in enumerate(own.groups) if each == group]
        for i, j in combinations(inside, 2):
            fast, slow = (i, j) if own.predicted[i] <= own.predicted[j] else (j, i)
            gains.append(own.predicted[slow] / own.predicted[fast] - 1)
            finer.append(own.pieces[fast] > own.pieces[slow])
            right.append(own.measured[fast] <= own.measured[slow])
    return np.array(gains), np.array(finer), np.array(right)


def main() -> int:
    """Print the table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--pairs", action="store_true", help="how often the order of two is right")
    chosen = parser.parse_args()
    sets: list[LeftOut] = []
    if (chosen.data / "amp").is_dir():
        sets += amp(chosen.data / "amp")
    if (chosen.data / "vtrain").is_dir():
        sets.append(vtrain(chosen.data / "vtrain" / "single_node.csv"))
    if (chosen.data / "llmfoundry").is_dir():
        sets.append(fsdp(chosen.data / "llmfoundry"))
    if not sets:
        print(f"skipped: {chosen.data} holds none of amp/, vtrain/ and llmfoundry/")
        return 0
    figures = show(sets)
    if chosen.pairs:
        show_pairs([each for each in sets if each.pieces is not None])
    write(chosen.json, dict(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
