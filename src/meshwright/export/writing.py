"""Writes text of a plan into other languages, safely: a name can never become code."""

from __future__ import annotations

import shlex

from meshwright.text import forbidden_character, printable


def python_docstring(text: str) -> str:
    """Returns a Python docstring of one line, or a plain literal if quotes would end a
    docstring."""
    plain = (
        '"""' not in text
        and "\\" not in text
        and not text.endswith('"')
        and not forbidden_character(text)
    )
    return f'"""{text}"""' if plain else repr(text)


def line_comment(text: str) -> str:
    """Returns a comment of one line, for Python, YAML and shells."""
    return f"# {printable(text)}"


def shell_default(name: str) -> str:
    """Quotes a word for use in `"${NAME:-word}"`, where plain quotes would become part of the
    word."""
    word = shlex.quote(name)
    return name if word == name else f"$(printf %s {word})"
