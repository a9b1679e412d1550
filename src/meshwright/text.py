"""Checks and prints text that we did not write.

A name from a file can reach a terminal, a shell, a page or another program. Letters of all
languages are allowed in it; control characters, invisible characters and characters that change the
direction of reading are not.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from difflib import get_close_matches

NAME_LETTERS = 200
"""Longest name of a model, a layer, a cluster, a node or a device type, in characters."""
LINE_LETTERS = 65_536
"""Longest sentence, path or description, in characters."""
SHOWN_LETTERS = 8_000
"""Longest text that a message shows, in characters; of the rest only the number is shown."""
SHOWN_OF_A_NAME = 500
_COMPARED_LETTERS = 100
"""Longest word for which similar words are searched, in characters: the time grows with the
square."""
_COMPARED_WORDS = 20_000

_REFUSED = {
    "Cc": "a control character",
    "Cf": "an invisible character",
    "Cs": "half of a character",
    "Zl": "a line separator",
    "Zp": "a paragraph separator",
}
_JOINERS = "\u200c\u200d"
"""Invisible characters that Persian, Indian scripts and emoji need."""
_PLAIN = re.compile(r"[\x20-\x7e]*")
_FILE_NAME = re.compile(r"[^A-Za-z0-9._-]+")


def _is_refused(letter: str, allowed: str) -> bool:
    return unicodedata.category(letter) in _REFUSED and letter not in _JOINERS + allowed


def forbidden_character(text: str, *, lines: bool = False) -> str:
    """Describes the first character that a text must not contain; empty if there is none.

    If `lines`, the text may contain line breaks and tabs.
    """
    if _PLAIN.fullmatch(text):
        return ""
    allowed = "\n\t" if lines else ""
    for letter in text:
        if _is_refused(letter, allowed):
            return f"{_REFUSED[unicodedata.category(letter)]}, U+{ord(letter):04X}"
    return ""


def printable(text: str, *, lines: bool = False) -> str:
    """Escapes the characters that `forbidden_character` refuses: an escape character becomes
    `\\x1b`."""
    if not forbidden_character(text, lines=lines):
        return text
    allowed = "\n\t" if lines else ""
    return "".join(_escaped(c) if _is_refused(c, allowed) else c for c in text)


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")


def shown(text: str, most: int = SHOWN_LETTERS, *, lines: bool = True) -> str:
    """Makes a text fit for a message: printable, and shortened to `most` characters."""
    if len(text) > most:
        text = f"{text[:most]} ... ({len(text) - most:,} more letters)"
    return printable(text, lines=lines)


def quoted(text: str) -> str:
    """Quotes a text in double quotes, as TOML and YAML both read it.

    Raises ValueError for half a surrogate pair, which neither can contain.
    """
    if any(unicodedata.category(letter) == "Cs" for letter in text):
        raise ValueError(f"text without halves of characters, not {text!r}")
    short = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r", "\b": "\\b"}
    letters = (short.get(c) or (c if c.isprintable() or c in _JOINERS else _code(c)) for c in text)
    return f'"{"".join(letters)}"'


def _code(letter: str) -> str:
    number = ord(letter)
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


_NUMBER = re.compile(r"([0-9]{1,18})")
_LAST_NUMBER = re.compile(r"(.*?)(0|[1-9][0-9]{0,17})")
Run = tuple[str, str]
"""First and last of consecutive names."""


def name_ranges(names: Iterable[str], *, to: str = " to ") -> str:
    """Shortens a list of names: consecutive names become a range, `n-0:0 to n-0:7, x:3`. The same
    devices of consecutive nodes become one range, `n-0:0 to n-7:7`."""
    runs: list[Run] = []
    for name in sorted(dict.fromkeys(names), key=_natural):
        _append(runs, (name, name), joins=bool(runs) and _next(runs[-1][1], name))
    nodes: list[Run] = []
    for run in runs:
        _append(nodes, run, joins=bool(nodes) and _same_on_next_node(nodes[-1], run))
    return ", ".join(first if first == last else f"{first}{to}{last}" for first, last in nodes)


def _append(runs: list[Run], run: Run, *, joins: bool) -> None:
    if joins:
        run = (runs.pop()[0], run[1])
    runs.append(run)


def _same_on_next_node(before: Run, run: Run) -> bool:
    ends = [end.rpartition(":") for end in (*before, *run)]
    (_, _, first), (node, _, last), (next_node, _, next_first), (same_node, _, next_last) = ends
    same = (first, last, next_node) == (next_first, next_last, same_node)
    return same and _next(node, next_node)


def _natural(name: str) -> list[tuple[int, str]]:
    """Returns a sorting key by which a:10 comes after a:9."""
    parts = _NUMBER.split(name)
    return [(int(part), "") if odd % 2 else (0, part) for odd, part in enumerate(parts)]


def _next(name: str, after: str) -> bool:
    """True if the second name follows the first, as `n-10` follows `n-9`."""
    one, two = _LAST_NUMBER.fullmatch(name), _LAST_NUMBER.fullmatch(after)
    return bool(one and two and one[1] == two[1] and int(two[2]) == int(one[2]) + 1)


def file_name(name: str) -> str:
    """Makes a safe file name from any text: ASCII letters, digits, dot, dash and underscore, not
    beginning with a dot or dash."""
    return _FILE_NAME.sub("-", name).lstrip(".-")[:100] or "unnamed"


def nearest(word: str, known: Iterable[str], *, count: int = 1, cutoff: float = 0.6) -> list[str]:
    """Returns the known words most similar to an unknown word."""
    words = list(known)
    if len(word) > _COMPARED_LETTERS or len(words) > _COMPARED_WORDS:
        return []
    return get_close_matches(word, words, count, cutoff)


def did_you_mean(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Returns `Did you mean 'gpt2'?`, or nothing if no known word is similar."""
    near = nearest(word, known, cutoff=cutoff)
    return f"Did you mean {near[0]!r}?" if near else ""
