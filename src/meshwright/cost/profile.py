"""Defines the files of measured times that the planner reads: layers on devices, and links."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

from pydantic import Field

from meshwright import __version__
from meshwright.cluster.spec import Cluster, Link, Precision
from meshwright.cost.constants import Calibration, implausible
from meshwright.errors import Problem, ProfileError
from meshwright.model.spec import LayerGraph
from meshwright.records import (
    Format,
    Line,
    Name,
    PositiveSeconds,
    Ratio,
    Rows,
    Seconds,
    Tokens,
    parse,
    read,
    record,
)

MOST_TIMES = 50_000
"""The most layer times in a profile; some thousands are usual with many device types."""
TensorWidth = Annotated[int, Field(ge=1, le=2**16)]


@record
class LayerTime:
    """Holds the median times of one kind of layer on one device type."""

    device: Name
    """The device type."""
    signature: Name
    """The Layer.signature that tells this kind of layer."""
    precision: Precision
    tensor: TensorWidth
    """The tensor width; the times exclude communication."""
    rows: Rows
    """The rows of the micro-batch."""
    forward_seconds: PositiveSeconds
    backward_seconds: PositiveSeconds
    input_seconds: Seconds | None = None
    """The seconds of I, the part of the backward that computes input gradients, with the time that
    the forward takes longer to prepare for a split backward. None: not measured."""
    weight_seconds: Seconds | None = None
    """The seconds of W, the part of the backward that computes weight gradients. None: not
    measured."""
    spread: Ratio = 0.0
    """The interquartile range of the repeats over their median."""


@record
class OptimizerTime:
    """Holds the seconds of one optimizer step, clipping included, per parameter that a rank
    holds."""

    device: Name
    optimizer: Name
    seconds_per_parameter: PositiveSeconds
    overhead_seconds: Seconds = 0.0


@record
class LinkTimes:
    """Holds one measured link for each level of the cluster; these replace the figures of the
    cluster file."""

    inside: Link | None = None
    islands: Link | None = None
    network: Link | None = None
    site: Link | None = None
    all_reduce_latency: Seconds | None = None
    """The fixed cost of one step of a ring, measured on collectives."""


@record
class Profile:
    """Holds everything measured for one model on one cluster."""

    format: Format = 1
    model: Name
    """The name of the LayerGraph."""
    sequence: Tokens
    versions: dict[Name, Line] = field(default_factory=dict)
    """The versions of torch, Python and the machine with which it was measured."""
    source: Line = ""
    """A fingerprint of what was measured, how and where; a measurement with an equal one is not
    repeated."""
    layers: Annotated[tuple[LayerTime, ...], Field(max_length=MOST_TIMES)] = ()
    optimizers: Annotated[tuple[OptimizerTime, ...], Field(max_length=MOST_TIMES)] = ()
    links: LinkTimes | None = None
    step_overhead_seconds: Seconds = 0.0
    """The fixed cost of a step outside all instructions: loading the next batch, bookkeeping."""
    calibration: Calibration | None = None
    """Constants fitted to measured steps; None stands for the defaults."""


def versions() -> dict[str, str]:
    """Returns what a measurement on this machine depends on, in the form of `Profile.versions`."""
    return {
        "meshwright": __version__,
        "torch": version("torch"),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {_processor()}",
    }


def _processor() -> str:
    """Returns the name of this machine's processor as the operating system gives it."""
    table = Path("/proc/cpuinfo")
    lines = table.read_text().splitlines() if table.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def version_mismatches(profile: Profile) -> tuple[str, ...]:
    """Returns one sentence for every version with which a profile was measured and that this
    machine does not have."""
    here = versions()
    return tuple(
        f"the profile was measured with {name} {found}; this is {here[name]}"
        for name, found in profile.versions.items()
        if name in here and found != here[name]
    )


MEASURE_AGAIN = "measure again with `meshwright profile`"
"""The mend of a problem that a new measurement solves."""


def load_profile(path: str | Path) -> Profile:
    """Loads a profile from its JSON or TOML file.

    Raises ProfileError with every mistake found.
    """
    data = read(Path(path), error=ProfileError)
    profile = parse(data, Profile, source=str(path), error=ProfileError, mend=MEASURE_AGAIN)
    ProfileError.check(_implausible_times(profile, str(path)))
    return profile


def check_profile(
    profile: Profile, model: LayerGraph, cluster: Cluster, *, source: str = "profile"
) -> None:
    """Raises ProfileError with every measurement that is implausible or of another model or
    cluster."""
    ProfileError.check(
        (*_implausible_times(profile, source), *_mismatches(profile, model, cluster, source))
    )


def _implausible_times(profile: Profile, source: str) -> Iterator[Problem]:
    if profile.calibration:
        yield from implausible(profile.calibration, source)


_ENTRY = ("entry", "")
"""The grouping of problems with layer times: each device type repeats those of every layer."""


def _mismatches(
    profile: Profile, model: LayerGraph, cluster: Cluster, source: str
) -> Iterator[Problem]:
    if profile.model != model.name:
        yield Problem(
            source, "model", profile.model, model.name, "profile the model that is planned"
        )
    if profile.sequence != model.sequence:
        wanted = str(model.sequence)
        yield Problem(source, "sequence", str(profile.sequence), wanted, "profile at this length")
    signatures = {layer.signature for layer in model.layers}
    for i, entry in enumerate(profile.layers):
        if entry.precision != model.precision:
            found, wanted = str(entry.precision), str(model.precision)
            mend = "profile in this precision"
            yield Problem(source, f"layers[{i}].precision", found, wanted, mend, each=_ENTRY)
        if entry.signature not in signatures:
            wanted = f"the signature of a layer of {model.name}"
            field = f"layers[{i}].signature"
            yield Problem(source, field, entry.signature, wanted, MEASURE_AGAIN, each=_ENTRY)
    measured = {entry.device for entry in profile.layers}
    if measured and not measured & set(cluster.types):
        found, wanted = ", ".join(sorted(measured)), f"one of {', '.join(sorted(cluster.types))}"
        yield Problem(source, "layers[].device", found, wanted, "profile on this cluster")
