"""Measures the layers and links of a testbed, and keeps the result for as long as nothing
changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from meshwright import files
from meshwright.cluster.files import dump_cluster
from meshwright.cluster.spec import Cluster, devices_of
from meshwright.cost.links import LinkReport, fitted_cluster, load_links
from meshwright.cost.profile import Profile, load_profile, versions
from meshwright.errors import ProfileError
from meshwright.profiling import measure_profile as measuring
from meshwright.profiling.measure_profile import SETTINGS, ProfileSettings, reference_core_seconds
from meshwright.records import dumps, fingerprint, record
from meshwright.report.terminal import plain_text
from meshwright.testbed.launcher import TestbedLauncher
from meshwright.testbed.spec import Testbed

PROFILE, CLUSTER, LINKS, SOURCE = "profile.json", "cluster.toml", "links.json", "source.json"
"""Files in the folder of a profile: the times, the cluster as measured, the links point by point,
and the fingerprint of what was measured."""
AS_ASKED = "cluster-as-asked.toml"
"""File in the same folder: the cluster as the testbed describes it."""


@record
class MeasurementInputs:
    """Holds everything that the measurements depend on."""

    bed: Testbed
    settings: ProfileSettings
    versions: dict[str, str]
    pace: float | None
    """Speed of emulated devices, from `reference_core_seconds`."""


@record
class ProfiledTestbed:
    """Holds what was measured on a testbed."""

    profile: Profile
    cluster: Cluster
    """The cluster, with its links as measured."""
    links: LinkReport
    profile_file: Path
    cluster_file: Path
    cached: bool
    """True if an earlier measurement was used, since nothing has changed."""


def profile_on(
    launcher: TestbedLauncher,
    settings: ProfileSettings,
    folder: Path,
    *,
    again: bool = False,
    console: Console | None = None,
) -> ProfiledTestbed:
    """Measures a testbed that is up into `folder`, unless that holds the same measurements already.

    The shares of emulated devices are the testbed's; virtual devices have no layers to measure.
    Raises LaunchError, ProfileError.
    """
    testbed = launcher.testbed.testbed
    files.make_folder(folder)
    settings = _settings(testbed, settings, folder)
    mark = fingerprint(
        MeasurementInputs(
            bed=replace(testbed, source=""),
            settings=settings,
            versions=versions(),
            pace=reference_core_seconds(settings),
        )
    )
    known = folder / SOURCE
    if not again and files.is_file(known) and _mark(known) == mark:
        return _read(folder, testbed, cached=True)
    files.remove(known)
    files.write_text(folder / AS_ASKED, dump_cluster(testbed.cluster))
    work = folder / "ranks"
    files.make_folder(work)
    files.write_text(work / SETTINGS, dumps(settings))
    devices = tuple(device.name for device in devices_of(testbed.cluster))
    if console:
        console.print(plain_text(f"measuring {len(devices)} devices and their links"))
    launcher.launcher.run(devices, work, module=measuring.__name__)
    found = _read(folder, testbed, cached=False)
    files.write_text(folder / CLUSTER, dump_cluster(found.cluster))
    files.write_text(known, mark)
    return found


def _mark(path: Path) -> str:
    """Reads the fingerprint of what a folder's measurements depend on."""
    return files.read_text(path, error=ProfileError)


def _settings(testbed: Testbed, settings: ProfileSettings, folder: Path) -> ProfileSettings:
    virtual = testbed.mode == "virtual"
    where = folder.resolve()
    return replace(
        settings,
        rows=() if virtual else settings.rows,
        cluster=str(where / AS_ASKED),
        output=str(where / PROFILE),
        pairs=str(where / LINKS),
        shares=testbed.shares if testbed.mode == "dilation" else {},
    )


def _read(folder: Path, testbed: Testbed, *, cached: bool) -> ProfiledTestbed:
    links = load_links(folder / LINKS, testbed.cluster)
    return ProfiledTestbed(
        profile=load_profile(folder / PROFILE),
        cluster=fitted_cluster(testbed.cluster, links),
        links=links,
        profile_file=folder / PROFILE,
        cluster_file=folder / CLUSTER,
        cached=cached,
    )
