"""Words of a plan in the languages of other tools, so that a name stays a name in each of them."""

from __future__ import annotations

import shlex

from meshwright.text import flaw, printable


def docstring(text: str) -> str:
    """A Python docstring of one line; as a plain literal where quotes would end it."""
    plain = '"""' not in text and "\\" not in text and not text.endswith('"') and not flaw(text)
    return f'"""{text}"""' if plain else repr(text)


def comment(text: str) -> str:
    """A comment of one line, for Python, YAML and shells."""
    return f"# {printable(text)}"


def shell_default(name: str) -> str:
    """A word to stand in `"${NAME:-word}"`, where quotes would be letters."""
    word = shlex.quote(name)
    return name if word == name else f"$(printf %s {word})"
