"""Groups nodes into device classes of interchangeable ones, and describes pipelines as templates on
device classes.

A device class is all nodes of one kind at one site, a stage run is a number of equal stages on such
nodes, and a template is a chain of stage runs. Its replicas are copies of one narrow pipeline, so
the cost of estimating it depends on the number of kinds and stages, not of devices. Letters: S
stages, L layers, M micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, groupby

from meshwright.cluster.spec import Link
from meshwright.search.costs import Costs, TensorGroup
from meshwright.search.layer_partition import Stages
from meshwright.search.space import by_island, divisors, usable_devices

FEW_CLASSES = 4
"""Device classes up to which every way to group them is tried."""

MOST_CLASSES = 6
"""Device classes that are told apart; with more kinds of nodes than these, those that differ in
their links alone count as one."""

MOST_UNUSED = 0.25
"""Share of a node's devices that tensor groups, or blocks of them, may leave unused."""


@dataclass(frozen=True, slots=True)
class DeviceClass:
    """Describes interchangeable nodes, each with equally many devices of a type."""

    kind: str
    site: str
    nodes: tuple[tuple[str, ...], ...]
    """Names of the devices of this type, by node; those of an island are neighbours."""
    inside: Link
    network: Link
    island: int
    """Devices in each island of a node; 1 if there are none, or some are larger."""
    joined: Link
    """Link between devices of an island; `inside` if there are none."""

    @property
    def each(self) -> int:
        """Returns the number of such devices in each node."""
        return len(self.nodes[0])

    def link_among(self, devices: int) -> Link:
        """Returns the link that a block of so many neighbouring devices shares."""
        return self.joined if self.island % devices == 0 else self.inside


@dataclass(frozen=True, slots=True)
class RatedClass:
    """Names a device class by its number, and its speed."""

    number: int
    site: str
    speed: float


Grouping = tuple[tuple[RatedClass, ...], ...]
"""Blocks of device classes: the device classes of a block work in one pipeline."""


@dataclass(frozen=True, slots=True)
class StageRun:
    """Describes equal stages on one device class. On each of its nodes stand `block` replicas of
    one stage beside each other, then as many of the next stage, until the node is full."""

    device_class: int
    """Index of the device class in `device_classes`."""
    tensor: int
    """Devices of a replica."""
    depth: int
    """Number of stages."""
    width: int
    """Replicas of each stage."""
    block: int


@dataclass(frozen=True, slots=True)
class PipelineTemplate:
    """Describes a pipeline of which everything is decided but its cuts and the number of its
    micro-batches."""

    runs: tuple[StageRun, ...]
    rows: int
    """Rows of a micro-batch, over all replicas."""

    @property
    def depth(self) -> int:
        """Returns the number of stages."""
        return sum(run.depth for run in self.runs)

    @property
    def devices(self) -> int:
        """Returns the number of devices in use."""
        return sum(run.tensor * run.depth * run.width for run in self.runs)

    @property
    def stages(self) -> tuple[tuple[StageRun, int], ...]:
        """Returns the run that each stage is of, and the rows of each of its replicas."""
        return tuple((run, self.rows // run.width) for run in self.runs for _ in range(run.depth))


def device_classes(costs: Costs) -> tuple[DeviceClass, ...]:
    """Returns the usable devices of the cluster, by type, site and kind of node."""
    exact = _device_classes(costs, links=True)
    return exact if len(exact) <= MOST_CLASSES else _device_classes(costs, links=False)


def _device_classes(costs: Costs, *, links: bool) -> tuple[DeviceClass, ...]:
    nodes = {node.name: node for node in costs.cluster.nodes}
    own: dict[tuple[str, str], list[str]] = {}
    for device in usable_devices(costs):
        own.setdefault((device.node, device.type), []).append(device.name)
    found: dict[object, list[tuple[str, tuple[str, ...]]]] = {}
    for (name, kind), names in own.items():
        node = nodes[name]
        key = (kind, node.site, len(names))
        exact = (*key, node.inside, node.islands, node.network, len(node.devices))
        ordered = by_island([costs.devices[each] for each in names])
        own_names = tuple(device.name for device in ordered)
        found.setdefault(exact if links else key, []).append((name, own_names))
    every = []
    for members in found.values():
        name, first = members[0]
        device = costs.devices[first[0]]
        slowest = [nodes[each] for each, _ in members]
        inside = min((n.inside for n in slowest), key=lambda link: link.bandwidth)
        sizes = {
            len([*own])
            for _, names in members
            for _, own in groupby(names, key=lambda each: costs.devices[each].island or each)
        }
        island = sizes.pop() if len(sizes) == 1 else 1
        joined = [n.islands.link for n in slowest if n.islands and island > 1] or [inside]
        every.append(
            DeviceClass(
                kind=device.type,
                site=device.site,
                nodes=tuple(names for _, names in members),
                inside=inside,
                network=min((n.network for n in slowest), key=lambda link: link.bandwidth),
                island=island,
                joined=min(joined, key=lambda link: link.bandwidth),
            )
        )
    return tuple(every)


def groupings(chosen: Sequence[RatedClass]) -> Iterator[Grouping]:
    """Yields sets of blocks of device classes; the device classes in no block are left out.

    Up to FEW_CLASSES classes, these are the partitions of every set of them. Of more, only all in
    one block, a block for each site, the blocks of single sites, and the fastest device classes
    together, apart and alone."""
    if len(chosen) <= FEW_CLASSES:
        for number in range(1, len(chosen) + 1):
            for some in combinations(chosen, number):
                yield from _partitions(some)
        return
    sites = dict.fromkeys(device_class.site for device_class in chosen)
    by_site = tuple(tuple(f for f in chosen if f.site == site) for site in sites)
    found: list[Grouping] = [(tuple(chosen),), by_site, *((block,) for block in by_site)]
    for number in range(1, len(chosen) + 1):
        found.append(tuple((device_class,) for device_class in chosen[:number]))
        found.append((tuple(chosen[:number]),))
    found += [((device_class,),) for device_class in chosen]
    yield from dict.fromkeys(found)


def _partitions(chosen: tuple[RatedClass, ...]) -> Iterator[Grouping]:
    if not chosen:
        yield ()
        return
    first, rest = chosen[0], chosen[1:]
    for size in range(len(rest) + 1):
        for others in combinations(range(len(rest)), size):
            block = (first, *(rest[i] for i in others))
            left = tuple(device_class for i, device_class in enumerate(rest) if i not in others)
            for blocks in _partitions(left):
                yield (block, *blocks)


def fills(parts: int, whole: int) -> bool:
    """True if parts of a size leave little of a node unused."""
    return whole % parts <= MOST_UNUSED * whole


def blocks_for(groups: int, width: int) -> tuple[int, ...]:
    """Returns the numbers of replicas of one stage that may stand beside each other on a node with
    `groups` tensor groups."""
    return tuple(block for block in divisors(width) if fills(block, groups))


def nodes_for(groups: int, depth: int, width: int, block: int) -> int:
    """Returns the number of nodes that a run of stages occupies."""
    return -(-depth // (groups // block)) * (width // block)


def written(
    every: Sequence[DeviceClass], template: PipelineTemplate, taken: dict[int, int]
) -> Stages:
    """Returns the tensor groups of every stage. `taken` counts the nodes of each device class in
    use, and grows. Runs that are equal but for their depth share nodes."""
    waiting: dict[StageRun, list[tuple[TensorGroup, ...]]] = {}
    found: list[tuple[TensorGroup, ...]] = []
    for run in template.runs:
        like = replace(run, depth=0)
        if like not in waiting:
            alike = (each for each in template.runs if replace(each, depth=0) == like)
            whole = replace(run, depth=sum(each.depth for each in alike))
            device_class, groups = (
                every[run.device_class],
                every[run.device_class].each // run.tensor,
            )
            first = taken.get(run.device_class, 0)
            needed = nodes_for(groups, whole.depth, run.width, run.block)
            taken[run.device_class] = first + needed
            waiting[like] = _stages(device_class.nodes[first : first + needed], whole, groups)
        found += waiting[like][: run.depth]
        del waiting[like][: run.depth]
    return tuple(found)


def _stages(
    nodes: Sequence[tuple[str, ...]], run: StageRun, groups: int
) -> list[tuple[TensorGroup, ...]]:
    per_node, wide = groups // run.block, run.width // run.block
    stages = []
    for s in range(run.depth):
        group, place = divmod(s, per_node)
        stages.append(
            tuple(
                names[(place * run.block + q) * run.tensor :][: run.tensor]
                for names in nodes[group * wide : (group + 1) * wide]
                for q in range(run.block)
            )
        )
    return stages
