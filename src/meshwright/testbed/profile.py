"""Measures the layers and links of a testbed, and keeps the result for as long as nothing
changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from meshwright import files
from meshwright.cluster.files import dump_cluster
from meshwright.cluster.spec import Cluster, devices_of
from meshwright.cost.pairs import LinkReport, fitted_cluster, load_links
from meshwright.cost.profile import Profile, load_profile, versions
from meshwright.errors import ProfileError
from meshwright.records import dumps, fingerprint, record
from meshwright.report.terminal import words
from meshwright.runtime import profile as measuring
from meshwright.runtime.profile import SETTINGS, ProfileSettings, reference_pace
from meshwright.testbed.launch import BedLauncher
from meshwright.testbed.spec import Bed

PROFILE, CLUSTER, LINKS, SOURCE = "profile.json", "cluster.toml", "links.json", "source.json"
"""Files in the folder of a profile: the times, the cluster as measured, the links point by point,
and the fingerprint of what was measured."""
AS_ASKED = "cluster-as-asked.toml"
"""File in the same folder: the cluster as the testbed describes it."""


@record
class Source:
    """Everything that the measurements depend on."""

    bed: Bed
    settings: ProfileSettings
    versions: dict[str, str]
    pace: float | None
    """Speed of emulated devices, from `reference_pace`."""


@record
class Profiled:
    """A measured testbed."""

    profile: Profile
    cluster: Cluster
    """The cluster, with its links as measured."""
    links: LinkReport
    profile_file: Path
    cluster_file: Path
    cached: bool
    """True if an earlier measurement was used, since nothing has changed."""


def profile_on(
    launcher: BedLauncher,
    settings: ProfileSettings,
    folder: Path,
    *,
    again: bool = False,
    console: Console | None = None,
) -> Profiled:
    """Measures a testbed that is up into `folder`, unless that holds the same measurements already.

    The shares of emulated devices are the testbed's; virtual devices have no layers to measure.
    Raises LaunchError, ProfileError.
    """
    bed = launcher.up.bed
    files.make_folder(folder)
    settings = _settings(bed, settings, folder)
    mark = fingerprint(
        Source(
            bed=replace(bed, source=""),
            settings=settings,
            versions=versions(),
            pace=reference_pace(settings),
        )
    )
    known = folder / SOURCE
    if not again and files.is_file(known) and _mark(known) == mark:
        return _read(folder, bed, cached=True)
    files.remove(known)
    files.write_text(folder / AS_ASKED, dump_cluster(bed.cluster))
    work = folder / "ranks"
    files.make_folder(work)
    files.write_text(work / SETTINGS, dumps(settings))
    devices = tuple(device.name for device in devices_of(bed.cluster))
    if console:
        console.print(words(f"measuring {len(devices)} devices and their links"))
    launcher.ranks.run(devices, work, module=measuring.__name__)
    found = _read(folder, bed, cached=False)
    files.write_text(folder / CLUSTER, dump_cluster(found.cluster))
    files.write_text(known, mark)
    return found


def _mark(path: Path) -> str:
    """Reads the fingerprint of what a folder's measurements depend on."""
    return files.read_text(path, error=ProfileError)


def _settings(bed: Bed, settings: ProfileSettings, folder: Path) -> ProfileSettings:
    virtual = bed.mode == "virtual"
    where = folder.resolve()
    return replace(
        settings,
        rows=() if virtual else settings.rows,
        cluster=str(where / AS_ASKED),
        output=str(where / PROFILE),
        pairs=str(where / LINKS),
        shares=bed.shares if bed.mode == "dilation" else {},
    )


def _read(folder: Path, bed: Bed, *, cached: bool) -> Profiled:
    links = load_links(folder / LINKS, bed.cluster)
    return Profiled(
        profile=load_profile(folder / PROFILE),
        cluster=fitted_cluster(bed.cluster, links),
        links=links,
        profile_file=folder / PROFILE,
        cluster_file=folder / CLUSTER,
        cached=cached,
    )
