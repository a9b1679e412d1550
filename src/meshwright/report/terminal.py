"""Words of strangers on a terminal."""

from __future__ import annotations

from rich.text import Text

from meshwright.text import printable


def words(text: str, style: str = "") -> Text:
    """A text to be printed as it stands: nothing in it is taken for markup, a link or an emoji, and
    nothing in it steers the terminal."""
    return Text(printable(text, lines=True), style=style)
