"""Refuses jobs that contradict their model, and clusters with links that carry nothing or without a
device for the job."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf

from meshwright.cluster.spec import Cluster, devices_of
from meshwright.errors import ClusterError, PlanError, Problem
from meshwright.model.spec import LayerGraph
from meshwright.plan.spec import Job

MOST_LAYERS = 1_000
MOST_ROWS = 1 << 17
"""Layers of a model and rows of a batch that are planned for: tables of cuts grow with the square
of the former, simulated steps with the latter."""


def check_inputs(model: LayerGraph, cluster: Cluster, job: Job) -> None:
    """Raises an error for what no search could deal with. Files are checked for more when they are
    read."""
    ClusterError.check(_link_problems(cluster))
    PlanError.check(_job_problems(model, job))
    ClusterError.check(_device_problems(cluster, job))


def _job_problems(model: LayerGraph, job: Job) -> Iterator[Problem]:
    if not 1 <= job.global_batch <= MOST_ROWS:
        wanted = f"1 to {MOST_ROWS:,}"
        yield Problem("job", "global_batch", f"{job.global_batch:,}", wanted)
    if not 1 <= len(model.layers) <= MOST_LAYERS:
        found, wanted = f"{len(model.layers):,}", f"1 to {MOST_LAYERS:,}"
        mend = "describe runs of small layers as one layer each" if model.layers else ""
        yield Problem(f"model {model.name}", "layers", found, wanted, mend)
    for name, found, wanted in (
        ("sequence", str(job.sequence), str(model.sequence)),
        ("precision", job.precision, model.precision),
    ):
        if found != wanted:
            reason = f"{wanted}, for which model {model.name} was described"
            yield Problem("job", name, found, reason, "describe the model again for this job")


def _link_problems(cluster: Cluster) -> Iterator[Problem]:
    links = [
        (f"node {node.name}", name, link)
        for node in cluster.nodes
        for name, link in (("inside", node.inside), ("network", node.network))
    ]
    links += [(f"node {n.name}", "islands", n.islands.link) for n in cluster.nodes if n.islands]
    links += [(f"site {site.name}", "uplink", site.uplink) for site in cluster.sites if site.uplink]
    links += [(f"nodes {' and '.join(each.between)}", "link", each.link) for each in cluster.direct]
    for where, name, link in links:
        if not 0 < link.bandwidth < inf or not 0 <= link.latency < inf:
            found = f"{link.bandwidth:g} bytes/s after {link.latency:g} s"
            wanted = "a bandwidth above zero: every node must be able to reach the others"
            mend = "leave out nodes that cannot be reached"
            yield Problem(where, name, found, wanted, mend, each=("link", where))


def _device_problems(cluster: Cluster, job: Job) -> Iterator[Problem]:
    used = {device.type for device in devices_of(cluster)}
    offers = {precision for kind in used for precision in cluster.types[kind].peak}
    if job.precision not in offers:
        yield Problem(
            f"cluster {cluster.name}",
            "devices",
            f"none that offers {job.precision}",
            f"at least one device with a peak in {job.precision}",
            f"its devices offer {', '.join(sorted(offers))}",
        )
