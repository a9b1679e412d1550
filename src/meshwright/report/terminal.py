"""Prints text that we did not write safely in a terminal."""

from __future__ import annotations

from rich.text import Text

from meshwright.text import printable


def plain_text(text: str, style: str = "") -> Text:
    """Returns a text that is printed as it is: nothing in it is read as markup, a link, an emoji or
    a control sequence."""
    return Text(printable(text, lines=True), style=style)
