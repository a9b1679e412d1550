"""Draws a plan on its cluster as SVG: nodes as boxes, devices coloured by stage, links with
bandwidth."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from meshwright.cluster.spec import Cluster, Node, Site
from meshwright.cost.memory import total_bytes
from meshwright.model.spec import LayerGraph
from meshwright.plan.ranks import (
    RankPlacement,
    StagePlacement,
    stage_placements,
)
from meshwright.plan.spec import Plan
from meshwright.records import record
from meshwright.report.palette import ink_on, stage_colours
from meshwright.report.template import render
from meshwright.units import format_bandwidth, format_bytes

WIDTH = 960.0
_MARGIN, _ASIDE, _GAP, _PAD, _HEADER, _DROP = 14.0, 18.0, 6.0, 12.0, 26.0, 34.0


@record
class Size:
    """Gives the size of a device in the drawing, in pixels, and how much text it holds."""

    width: float
    height: float
    columns: int
    letters: int
    """Number of letters that fit into its width; 0: only the number of its stage is written."""


_LARGE = Size(width=128, height=66, columns=2, letters=20)
_MIDDLE = Size(width=100, height=66, columns=4, letters=14)
_SMALL = Size(width=28, height=24, columns=8, letters=0)


@record
class DeviceCell:
    """Holds how a device is drawn: its place, in pixels, its colours and its text."""

    x: float
    y: float
    fill: str
    """Colour of its stage; empty if the plan does not use it."""
    ink: str
    lines: tuple[str, ...]
    hint: str
    share: str = ""
    """The share of its stage that it computes; empty if that is all of it."""
    memory: float = 0.0
    """Share of its memory that is full at the peak."""


@record
class NodeBox:
    """Holds how a node is drawn: its place, in pixels, its text, and the cells of its devices."""

    x: float
    y: float
    width: float
    height: float
    name: str
    note: str
    """Bandwidth between its devices; for a node that is not used, its device types."""
    network: str
    cells: tuple[DeviceCell, ...]


@record
class SitePanel:
    """Holds where a site is drawn: rows of nodes, each row above a line that stands for the
    network."""

    y: float
    height: float
    title: str
    boxes: tuple[NodeBox, ...]
    spines: tuple[float, ...]


def plan_svg(plan: Plan, cluster: Cluster, model: LayerGraph, *, standalone: bool = False) -> str:
    """Returns the drawing as SVG: for a page that has the style sheet, or `standalone` as a file of
    its own."""
    stages = stage_placements(plan)
    cells = _Cells(plan, cluster, model, stages)
    panels: list[SitePanel] = []
    y = 0.0
    for site in cluster.sites:
        nodes = tuple(node for node in cluster.nodes if node.site == site.name)
        if nodes:
            panels.append(_panel(site, nodes, cells, y, named=len(cluster.sites) > 1))
            y += panels[-1].height + 14
    direct = tuple(
        f"{' – '.join(each.between)}: {format_bandwidth(each.link.bandwidth)}"
        for each in cluster.direct
    )
    return render(
        "plan.svg",
        panels=panels,
        direct=direct,
        size=cells.size,
        width=WIDTH,
        height=y + 18 * len(direct),
        standalone=standalone,
        label=f"{plan.name} on {cluster.name}",
    )


def layers_text(model: LayerGraph, layers: tuple[int, int]) -> str:
    """Formats the names of consecutive layers: `embedding … blocks.3`, `blocks.4–7`."""
    first, last = model.layers[layers[0]].name, model.layers[layers[1] - 1].name
    if first == last:
        return first
    family, _, start = first.rpartition(".")
    other, _, end = last.rpartition(".")
    if family and family == other:
        return f"{family}.{start}–{end}"
    return f"{first} … {last}"


class _Cells:
    """Builds the cell of each device from the plan."""

    def __init__(
        self, plan: Plan, cluster: Cluster, model: LayerGraph, stages: tuple[StagePlacement, ...]
    ) -> None:
        self.model = model
        self.colours = stage_colours(len(stages))
        self.stages = stages
        self.placements: dict[str, list[RankPlacement]] = {}
        for placement in (placement for stage in stages for placement in stage.mesh.members):
            self.placements.setdefault(placement.device, []).append(placement)
        prediction = plan.prediction
        self.memory = {each.device: each for each in prediction.memory} if prediction else {}
        largest = max(len(node.devices) for node in cluster.nodes)
        count = sum(len(node.devices) for node in cluster.nodes)
        self.size = _SMALL if count > 128 else _MIDDLE if largest > 4 or count > 32 else _LARGE

    def cell(self, node: Node, index: int, x: float, y: float) -> DeviceCell:
        """Returns the cell of one device at a place."""
        name, kind = f"{node.name}:{index}", node.devices[index]
        placements = self.placements.get(name, [])
        if not placements:
            free = (self._fit(f"{index}  {kind}"), "not used") if self.size.letters else ("",)
            hint = f"{name}, {kind}: not used"
            return DeviceCell(x=x, y=y, fill="", ink="", lines=free, hint=hint)
        placement = placements[0]
        layers = ", ".join(layers_text(self.model, self.stages[s.stage].layers) for s in placements)
        numbers = ", ".join(str(s.stage) for s in placements)
        held = f"stage{'s' * (len(placements) > 1)} {numbers}"
        colour = self.colours[placement.stage]
        lines = (self._fit(f"{index}  {kind}"), self._fit(held), self._fit(layers))
        share = self._share(placement)
        hint = f"{name}, {kind}: rank {placement.rank}, {held} {share}, {layers}"
        cell = DeviceCell(x=x, y=y, fill=colour, ink=ink_on(colour), lines=lines, hint=hint)
        if not self.size.letters:
            cell = replace(cell, lines=(str(placement.stage),))
        elif self.size is _LARGE:
            cell = replace(cell, share=share)
        return self._with_memory(cell, name)

    def _share(self, placement: RankPlacement) -> str:
        """Formats the rows of a micro-batch and the index among the tensor ranks: `rows 0:2`, `tp
        1/2`, or both."""
        first, last = placement.rows
        rows = f"{first}:{last}" if placement.width("data") > 1 else ""
        width = placement.width("tensor")
        tensor = f"tp {placement.index('tensor') + 1}/{width}" if width > 1 else ""
        return f"{rows} {tensor}" if rows and tensor else tensor or (rows and f"rows {rows}")

    def used(self, node: Node) -> bool:
        """True if the plan uses any device of a node."""
        return any(f"{node.name}:{index}" in self.placements for index in range(len(node.devices)))

    def _with_memory(self, cell: DeviceCell, device: str) -> DeviceCell:
        memory = self.memory.get(device)
        if memory is None:
            return cell
        total = total_bytes(memory)
        hint = f"{cell.hint}; {format_bytes(total)} of {format_bytes(memory.capacity)}"
        return replace(cell, hint=hint, memory=min(1.0, total / memory.capacity))

    def _fit(self, text: str) -> str:
        room = self.size.letters
        return text if len(text) <= room else text[: room - 1] + "…"


def _panel(
    site: Site, nodes: tuple[Node, ...], cells: _Cells, y: float, *, named: bool
) -> SitePanel:
    """Places the nodes in rows as wide as the page, each row above its network line; idle nodes
    come last."""
    below = y + (34 if named else _MARGIN)
    boxes: list[NodeBox] = []
    spines: list[float] = []
    for used in (True, False):
        chosen = [node for node in nodes if cells.used(node) is used]
        made = [_box(node, cells) if used else _idle_box(node) for node in chosen]
        wide = max((box.width for box in made), default=WIDTH)
        per_row = max(1, int((WIDTH - 2 * _MARGIN + _ASIDE) // (wide + _ASIDE)))
        for start in range(0, len(made), per_row):
            row = made[start : start + per_row]
            tall = max(box.height for box in row)
            boxes += _placed(row, below, tall)
            spines.append(below + tall + _DROP)
            below += tall + _DROP + 18
    title = f"site {site.name}" if named else ""
    if named and site.uplink:
        title += f" — uplink {format_bandwidth(site.uplink.bandwidth)}"
    return SitePanel(y=y, height=below - y, title=title, boxes=tuple(boxes), spines=tuple(spines))


def _placed(row: list[NodeBox], y: float, height: float) -> list[NodeBox]:
    """Places boxes side by side, all with the given height."""
    placed: list[NodeBox] = []
    x = _MARGIN
    for box in row:
        cells = tuple(replace(cell, x=cell.x + x, y=cell.y + y) for cell in box.cells)
        placed.append(replace(box, x=x, y=y, height=height, cells=cells))
        x += box.width + _ASIDE
    return placed


def _idle_box(node: Node) -> NodeBox:
    """Returns the box of a node that the plan does not use: one line."""
    kinds = Counter(node.devices)
    note = ", ".join(f"{count} × {kind}" for kind, count in kinds.items()) + ", not used"
    return NodeBox(
        x=0,
        y=0,
        width=7.5 * len(node.name) + 6.5 * len(note) + 2 * _PAD + 10,
        height=_HEADER,
        name=node.name,
        note=note,
        network=format_bandwidth(node.network.bandwidth),
        cells=(),
    )


def _box(node: Node, cells: _Cells) -> NodeBox:
    """Returns the box of a node that the plan uses, with its devices, at the origin."""
    size = cells.size
    columns = min(len(node.devices), size.columns)
    rows = -(-len(node.devices) // columns)
    return NodeBox(
        x=0,
        y=0,
        width=max(2 * _PAD + columns * (size.width + _GAP) - _GAP, 150.0),
        height=_HEADER + rows * (size.height + _GAP) - _GAP + _PAD,
        name=node.name,
        note=_inside_note(node),
        network=format_bandwidth(node.network.bandwidth),
        cells=tuple(
            cells.cell(
                node,
                index,
                _PAD + (index % columns) * (size.width + _GAP),
                _HEADER + (index // columns) * (size.height + _GAP),
            )
            for index in range(len(node.devices))
        ),
    )


def _inside_note(node: Node) -> str:
    """Formats the bandwidth inside a node, and inside its islands."""
    note = format_bandwidth(node.inside.bandwidth) + (" bus" if node.inside.shared else "")
    if node.islands is None:
        return note
    sizes = "/".join(dict.fromkeys(str(len(group)) for group in node.islands.groups))
    return f"{note}, {format_bandwidth(node.islands.link.bandwidth)} in islands of {sizes}"
