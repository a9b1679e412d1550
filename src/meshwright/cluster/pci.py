"""Lists the graphics cards and accelerators on the PCI bus, from /sys and lspci; this works without
a driver."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from meshwright.cluster.host import Host, ToolOutput
from meshwright.records import record
from meshwright.text import printable

Maker = Literal["NVIDIA", "AMD", "Intel", "other"]
_MAKERS: dict[str, Maker] = {"10de": "NVIDIA", "1002": "AMD", "8086": "Intel"}
_MAKER_NAMES: tuple[tuple[str, Maker], ...] = (
    ("NVIDIA", "NVIDIA"),
    ("Advanced Micro Devices", "AMD"),
    ("Intel", "Intel"),
)
_DISPLAY, _ACCELERATOR = "03", "12"
_CLASSES = {
    "VGA compatible controller": "0300",
    "3D controller": "0302",
    "Display controller": "0380",
    "Processing accelerators": "1200",
}
_FOLDER = "/sys/bus/pci/devices"
_LSPCI = re.compile(
    r"((?:[0-9a-f]{4,}:)?[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]) ([^:\[]+?)(?: \[([0-9a-f]{4})\])?: "
    r"(.+?)(?: \[([0-9a-f]{4}):([0-9a-f]{4})\])?(?: \(rev \w+\))?(?: \(prog-if .*\))?\s*"
)


@record
class PciCard:
    """Describes a graphics card or an accelerator on the PCI bus."""

    address: str
    """PCI address, like `0000:3b:00.0`."""
    maker: Maker
    code: str = ""
    """PCI class: four hexadecimal digits."""
    device: str = ""
    """PCI device number: four hexadecimal digits."""
    name: str = ""
    """Name that lspci prints; empty if it is not known."""

    def __str__(self) -> str:
        what = self.name or f"{self.maker} {self.device}".strip()
        return f"{what} at {self.address}"

    @property
    def is_integrated(self) -> bool:
        """True if this is the graphics unit of a processor: Intel's sit on the first PCI bus, and
        the device numbers of AMD's separate cards begin with 6 or 7."""
        if self.code[:2] == _ACCELERATOR:
            return self.maker == "Intel"  # the neural processing units of laptops
        if self.maker == "Intel":
            return self.address.startswith("0000:00:")
        return self.maker == "AMD" and self.device[:1] not in ("6", "7", "")


def cards_on(host: Host) -> tuple[PciCard, ...]:
    """Returns the cards that /sys lists, sorted by address."""
    cards = {}
    for address in host.names(_FOLDER):
        kind, vendor, device = (
            host.read(f"{_FOLDER}/{address}/{name}").strip().removeprefix("0x")
            for name in ("class", "vendor", "device")
        )
        card = _card(address, kind[:4], vendor, device, "")
        if card:
            cards[card.address] = card
    return tuple(cards.values())


def with_names(host: Host, cards: Sequence[PciCard]) -> tuple[PciCard, ...]:
    """Returns the cards with the names that lspci prints, and the cards that only lspci shows."""
    named = {card.address: card for card in cards}
    named.update((card.address, card) for card in read_lspci(host.run(("lspci", "-D", "-nn"))))
    return tuple(named[address] for address in sorted(named))


def read_lspci(answer: ToolOutput) -> tuple[PciCard, ...]:
    """Returns the cards in the output of `lspci`, run with or without `-D` and `-nn`."""
    cards = []
    for line in answer.text.splitlines():
        match = _LSPCI.fullmatch(line)
        if match:
            address, words, code, name, vendor, device = match.groups()
            full = address if address.count(":") == 2 else f"0000:{address}"
            kind = code or _CLASSES.get(words, "")
            cards.append(_card(full, kind, vendor or "", device or "", printable(name)[:100]))
    return tuple(card for card in cards if card)


def _card(address: str, kind: str, vendor: str, device: str, name: str) -> PciCard | None:
    if kind[:2] not in (_DISPLAY, _ACCELERATOR):
        return None
    by_name = [maker for begin, maker in _MAKER_NAMES if name.startswith(begin)]
    maker: Maker = _MAKERS.get(vendor) or (by_name[0] if by_name else "other")
    if maker == "other" and kind[:2] == _DISPLAY:
        return None  # the video chip of a server's console
    return PciCard(address=printable(address), maker=maker, code=kind, device=device, name=name)
