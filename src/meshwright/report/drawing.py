"""A plan drawn on its cluster: nodes as boxes, devices coloured by stage, links with bandwidth."""

from __future__ import annotations

from dataclasses import replace

from meshwright.cluster.spec import Cluster, Node, Site
from meshwright.cost.memory import total_bytes
from meshwright.model.spec import LayerGraph
from meshwright.plan.ranks import Seat, StageSeats, stage_seats
from meshwright.plan.spec import Plan
from meshwright.records import record
from meshwright.report.palette import ink_on, stage_colours
from meshwright.report.template import render
from meshwright.units import format_bandwidth, format_bytes

WIDTH = 960.0
_GAP, _PAD, _HEADER, _DROP = 6.0, 12.0, 26.0, 34.0


@record
class Size:
    """How large a device is drawn, and how much is written into it."""

    width: float
    height: float
    columns: int
    letters: int
    """Letters that fit into its width; 0: the number of its stage, nothing else."""


_LARGE = Size(width=128, height=66, columns=2, letters=20)
_MIDDLE = Size(width=100, height=66, columns=4, letters=14)
_SMALL = Size(width=34, height=24, columns=8, letters=0)


@record
class Cell:
    """A device, in place."""

    x: float
    y: float
    fill: str
    """Empty: the plan does not use it."""
    ink: str
    lines: tuple[str, ...]
    hint: str
    memory: float = 0.0
    """Share of its memory that is full at its worst moment."""


@record
class Box:
    """A node, in place."""

    x: float
    y: float
    width: float
    height: float
    name: str
    inside: str
    network: str
    cells: tuple[Cell, ...]


@record
class Panel:
    """A site, in place: its nodes in rows, each row on a line that is the network."""

    y: float
    height: float
    title: str
    boxes: tuple[Box, ...]
    spines: tuple[float, ...]


def plan_svg(plan: Plan, cluster: Cluster, model: LayerGraph, *, standalone: bool = False) -> str:
    """The drawing as SVG: for a page that has the style, or `standalone` as a file of its own."""
    stages = stage_seats(plan)
    cells = _Cells(plan, cluster, model, stages)
    panels: list[Panel] = []
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
    """Names of a run of layers: `embedding … blocks.3`, `blocks.4–7`."""
    first, last = model.layers[layers[0]].name, model.layers[layers[1] - 1].name
    if first == last:
        return first
    family, _, start = first.rpartition(".")
    other, _, end = last.rpartition(".")
    if family and family == other:
        return f"{family}.{start}–{end}"
    return f"{first} … {last}"


class _Cells:
    """Everything that is said about a device, by its name."""

    def __init__(
        self, plan: Plan, cluster: Cluster, model: LayerGraph, stages: tuple[StageSeats, ...]
    ) -> None:
        self.model = model
        self.colours = stage_colours(len(stages))
        self.stages = stages
        self.seats: dict[str, Seat] = {
            seat.device: seat for stage in stages for replica in stage.seats for seat in replica
        }
        prediction = plan.prediction
        self.memory = {each.device: each for each in prediction.memory} if prediction else {}
        largest = max(len(node.devices) for node in cluster.nodes)
        count = sum(len(node.devices) for node in cluster.nodes)
        self.size = _SMALL if count > 128 else _MIDDLE if largest > 4 or count > 32 else _LARGE

    def cell(self, node: Node, index: int, x: float, y: float) -> Cell:
        """One device at a place."""
        name, kind = f"{node.name}:{index}", node.devices[index]
        seat = self.seats.get(name)
        if seat is None:
            free = (self._fit(f"{index}  {kind}"), "not used") if self.size.letters else ("",)
            hint = f"{name}, {kind}: not used"
            return Cell(x=x, y=y, fill="", ink="", lines=free, hint=hint)
        layers = layers_text(self.model, self.stages[seat.stage].layers)
        colour = self.colours[seat.stage]
        lines = (
            self._fit(f"{index}  {kind}"),
            self._fit(f"stage {seat.stage}{self._share(seat)}"),
            self._fit(layers),
        )
        hint = f"{name}, {kind}: rank {seat.rank}, stage {seat.stage}, {layers}{self._share(seat)}"
        cell = Cell(x=x, y=y, fill=colour, ink=ink_on(colour), lines=lines, hint=hint)
        if not self.size.letters:
            cell = replace(cell, lines=(str(seat.stage),))
        return self._with_memory(cell, name)

    def _share(self, seat: Seat) -> str:
        """What of its stage a device does, where it does not do all of it."""
        stage = self.stages[seat.stage]
        text = f" rows {seat.rows[0]}:{seat.rows[1]}" if len(stage.seats) > 1 else ""
        tensor = len(stage.seats[0])
        return text + (f" tp {seat.tensor_index + 1}/{tensor}" if tensor > 1 else "")

    def _with_memory(self, cell: Cell, device: str) -> Cell:
        memory = self.memory.get(device)
        if memory is None:
            return cell
        total = total_bytes(memory)
        hint = f"{cell.hint}; {format_bytes(total)} of {format_bytes(memory.capacity)}"
        return replace(cell, hint=hint, memory=min(1.0, total / memory.capacity))

    def _fit(self, text: str) -> str:
        room = self.size.letters
        return text if len(text) <= room else text[: room - 1] + "…"


def _panel(site: Site, nodes: tuple[Node, ...], cells: _Cells, y: float, *, named: bool) -> Panel:
    """Nodes in rows as wide as the page, each row above its network line."""
    margin = 14.0
    wide = max(_box_width(node, cells.size) for node in nodes)
    per_row = max(1, int((WIDTH - 2 * margin + 18) // (wide + 18)))
    below = y + (34 if named else margin)
    boxes: list[Box] = []
    spines: list[float] = []
    for start in range(0, len(nodes), per_row):
        row = nodes[start : start + per_row]
        tall = max(_box_height(node, cells.size) for node in row)
        x = margin
        for node in row:
            boxes.append(_box(node, cells, x, below, tall))
            x += _box_width(node, cells.size) + 18
        spines.append(below + tall + _DROP)
        below += tall + _DROP + 18
    title = f"site {site.name}" if named else ""
    if named and site.uplink:
        title += f" — uplink {format_bandwidth(site.uplink.bandwidth)}"
    return Panel(y=y, height=below - y, title=title, boxes=tuple(boxes), spines=tuple(spines))


def _columns(node: Node, size: Size) -> int:
    return min(len(node.devices), size.columns)


def _box_width(node: Node, size: Size) -> float:
    columns = _columns(node, size)
    return max(2 * _PAD + columns * size.width + (columns - 1) * _GAP, 150.0)


def _box_height(node: Node, size: Size) -> float:
    rows = -(-len(node.devices) // _columns(node, size))
    return _HEADER + rows * size.height + (rows - 1) * _GAP + _PAD


def _box(node: Node, cells: _Cells, x: float, y: float, height: float) -> Box:
    size, columns = cells.size, _columns(node, cells.size)
    return Box(
        x=x,
        y=y,
        width=_box_width(node, size),
        height=height,
        name=node.name,
        inside=format_bandwidth(node.inside.bandwidth) + (" bus" if node.inside.shared else ""),
        network=format_bandwidth(node.network.bandwidth),
        cells=tuple(
            cells.cell(
                node,
                index,
                x + _PAD + (index % columns) * (size.width + _GAP),
                y + _HEADER + (index // columns) * (size.height + _GAP),
            )
            for index in range(len(node.devices))
        ),
    )
