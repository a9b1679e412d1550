"""Measured times, as files that the planner reads: layers on devices, and links."""

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
"""Of layers in a profile: some thousand are usual for many device types."""
TensorWidth = Annotated[int, Field(ge=1, le=2**16)]


@record
class LayerTime:
    """Median time of one kind of layer on one kind of device."""

    device: Name
    """Device type."""
    signature: Name
    """Layer.signature."""
    precision: Precision
    tensor: TensorWidth
    """Tensor width; the time contains no communication."""
    rows: Rows
    """Rows of the micro-batch."""
    forward_seconds: PositiveSeconds
    backward_seconds: PositiveSeconds
    input_seconds: Seconds | None = None
    """Of a backward in two parts, the one that makes the gradients of the layer's inputs, with what
    the forward takes longer to prepare it."""
    weight_seconds: Seconds | None = None
    """And the one that makes those of its weights. Absent: not measured."""
    spread: Ratio = 0.0
    """Interquartile range of the repeats over their median."""


@record
class OptimizerTime:
    """Time of one optimizer step (clipping included) per parameter that a rank holds."""

    device: Name
    optimizer: Name
    seconds_per_parameter: PositiveSeconds
    overhead_seconds: Seconds = 0.0


@record
class LinkTimes:
    """Measured links of a cluster by their level; they replace the figures of the cluster file."""

    inside: Link | None = None
    network: Link | None = None
    site: Link | None = None
    all_reduce_latency: Seconds | None = None
    """Fixed cost of one step of a ring, measured on collectives."""


@record
class Profile:
    """Everything measured for one model on one cluster."""

    format: Format = 1
    model: Name
    """LayerGraph.name."""
    sequence: Tokens
    versions: dict[Name, Line] = field(default_factory=dict)
    """torch, Python and machine, as measured with."""
    source: Line = ""
    """Fingerprint of what was measured, how and where: the same is not measured again."""
    layers: Annotated[tuple[LayerTime, ...], Field(max_length=MOST_TIMES)] = ()
    optimizers: Annotated[tuple[OptimizerTime, ...], Field(max_length=MOST_TIMES)] = ()
    links: LinkTimes | None = None
    step_overhead_seconds: Seconds = 0.0
    """Fixed cost of a step outside all instructions: the next batch, bookkeeping."""
    calibration: Calibration | None = None
    """Constants fitted to measured steps; None: the defaults."""


def versions() -> dict[str, str]:
    """What a measurement on this machine depends on, as `Profile.versions` holds it."""
    return {
        "meshwright": __version__,
        "torch": version("torch"),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {_processor()}",
    }


def _processor() -> str:
    """Name of this machine's processor, as the system gives it."""
    table = Path("/proc/cpuinfo")
    lines = table.read_text().splitlines() if table.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def strange_versions(profile: Profile) -> tuple[str, ...]:
    """Sentences about what a profile was measured with and this machine does not have."""
    here = versions()
    return tuple(
        f"the profile was measured with {name} {found}; this is {here[name]}"
        for name, found in profile.versions.items()
        if name in here and found != here[name]
    )


AGAIN = "measure again with `meshwright profile`"


def load_profile(path: str | Path) -> Profile:
    """A profile from its JSON or TOML file. Raises ProfileError with every mistake found."""
    data = read(Path(path), error=ProfileError)
    profile = parse(data, Profile, source=str(path), error=ProfileError, mend=AGAIN)
    ProfileError.check(_implausible(profile, str(path)))
    return profile


def check_profile(
    profile: Profile, model: LayerGraph, cluster: Cluster, *, source: str = "profile"
) -> None:
    """Raises ProfileError with every measurement that is implausible or from elsewhere."""
    ProfileError.check((*_implausible(profile, source), *_foreign(profile, model, cluster, source)))


def _implausible(profile: Profile, source: str) -> Iterator[Problem]:
    if profile.calibration:
        yield from implausible(profile.calibration, source)


_ENTRY = ("entry", "")
"""Of the layers: each device type has its own of each layer."""


def _foreign(
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
            yield Problem(source, field, entry.signature, wanted, AGAIN, each=_ENTRY)
    measured = {entry.device for entry in profile.layers}
    if measured and not measured & set(cluster.types):
        found, wanted = ", ".join(sorted(measured)), f"one of {', '.join(sorted(cluster.types))}"
        yield Problem(source, "layers[].device", found, wanted, "profile on this cluster")
