"""JSON and TOML are read strictly: what could be taken for two things, or for none, has its place
told."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.errors import PlanError
from meshwright.formats import MISTAKES_TOLD, parse_text, read_table
from meshwright.text import (
    NAME_LETTERS,
    did_you_mean,
    file_name,
    forbidden_character,
    printable,
    quoted,
    shown,
)


def read(text: str, *, toml: bool = False, **rest: bool):
    return parse_text(text, toml=toml, source="f", error=PlanError, **rest)


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**80), 2**80)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cc", "Cf", "Cs", "Zl", "Zp"]), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from("abcdef"), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(PLAIN)
def test_ordinary_json_is_what_it_was(data) -> None:
    assert read(json.dumps(data)) == data
    assert read(json.dumps(data, ensure_ascii=False, indent=1)) == data


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ('{"a": {"b": [{"c": 1, "d": 2, "c": 3}]}}', "a.b[0].c", "stands twice"),
        ('{"a": 1, "a": 1}', "a", "stands twice"),
        ('{"a": [0.5, NaN]}', "a[1]", "nan; wanted a finite number"),
        ('{"a": -Infinity}', "a", "-inf; wanted a finite number"),
        ('{"a": 1e400}', "a", "inf; wanted a finite number"),
        ('{"a": "x\\u001b[2J"}', "a", "a control character, U+001B"),
        ('{"a": "\\u202egnp"}', "a", "an invisible character, U+202E"),
        ('{"a": "\\ud800"}', "a", "half of a character, U+D800"),
        ('{"a": "\\u2028"}', "a", "a line separator, U+2028"),
        ('{"a\\u0000": 1}', "a\\x00", "a key with a control character"),
        ('{"a": ' + "9" * 6000 + "}", "", "a number of 6,000 digits in line 1"),
        ("[" * 100_000, "", "nested too deep"),
        ("[" * 100 + "]" * 100, "[0][0][0]", "nested too deep"),
        ("[" + "[]," * 4_000_001 + "[]]", "", "some 8,000,004 entries"),
        ('{"a": }', "", "well-formed JSON"),
        ("", "", "well-formed JSON"),
    ],
)
def test_json_that_is_refused(text, place, words) -> None:
    with pytest.raises(PlanError) as caught:
        read(text)
    assert caught.value.problems[0].field == place
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("a = 1\na = 2", "", "well-formed TOML"),
        ("[a]\nb = nan", "a.b", "nan; wanted a finite number"),
        ("[[a]]\nb = [1e999]", "a[0].b[0]", "inf; wanted a finite number"),
        ("a = 1979-05-27", "a", "a date or time; wanted text in quotes"),
        ("\n\na = " + "9" * 6000, "", "6,000 digits in line 3"),
        ("a = " + "[" * 100_000, "", "nested too deep"),
        ("a." * 500 + "b = 1", "", "nested too deep, in line 1"),
        ("[x]\ny = { " + "'a' . " * 100_000 + "b = 1 }", "", "nested too deep, in line 2"),
        ("a = 1\n" * 3 + "x" * 4_000_000, "", "well-formed TOML"),
        ('a = "\\u001b"', "a", "a control character"),
        ('"a\\nb" = 1', "a\\nb", "a key with a control character"),
    ],
)
def test_toml_that_is_refused(text, place, words) -> None:
    with pytest.raises(PlanError) as caught:
        read(text, toml=True)
    assert caught.value.problems[0].field == place
    assert words in str(caught.value)


def test_all_mistakes_are_told_but_no_endless_list_of_them() -> None:
    with pytest.raises(PlanError) as caught:
        read('{"a": NaN, "b": [Infinity], "c": "\\u0007"}')
    assert [problem.field for problem in caught.value.problems] == ["a", "b[0]", "c"]
    with pytest.raises(PlanError) as caught:
        read("[" + "NaN," * 500_000 + "0]")
    assert len(caught.value.problems) == MISTAKES_TOLD


def test_long_words_and_lines_of_dots_are_no_depth() -> None:
    text = f"# {'.' * 4000}\na = '{'x' * 10_000}'\nb = '{'. ' * 4000}'\nc.d.e = 1"
    assert read(text, toml=True)["c"] == {"d": {"e": 1}}


def test_a_run_may_have_written_infinities() -> None:
    assert read('{"a": Infinity}', finite=False) == {"a": float("inf")}


def test_marks_and_line_ends_of_other_systems_are_no_mistake(tmp_path: Path) -> None:
    for name, text in (("t.toml", "a = 1\r\n[b]\r\nc = 2\r\n"), ("t.json", '{"a": 1,\r\n"b": 2}')):
        path = tmp_path / name
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert read_table(path, error=PlanError)["a"] == 1


HOSTILE = st.text(max_size=30) | st.sampled_from(
    ["\x1b]0;title\x07", "a\rb", "\u202e", "\x85", "'; touch x; '", '"""', "../../x", "-rf", "\\"]
)


@given(HOSTILE)
def test_what_is_shown_steers_no_terminal_and_stays_readable(text) -> None:
    assert forbidden_character(printable(text)) == ""
    assert forbidden_character(shown(text), lines=True) == ""
    assert printable(text) == text or forbidden_character(text)


def test_letters_of_people_are_no_flaw() -> None:
    for text in ("Zürich", "東京", "می\u200cخواهم", "👩\u200d🔬", "a b", "100 % [x]"):
        assert forbidden_character(text) == ""
    assert forbidden_character("two\nlines", lines=True) == ""


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_a_quoted_text_is_read_back_by_toml(text) -> None:
    line = quoted(text)
    assert forbidden_character(line) == ""
    assert tomllib.loads(f"a = {line}\nb = 1") == {"a": text, "b": 1}


@given(HOSTILE)
def test_a_name_of_a_file_stays_in_its_folder(text) -> None:
    name = file_name(text)
    assert name == Path(name).name
    assert name not in ("", ".", "..")
    assert name[0] not in ".-"
    assert len(name) <= NAME_LETTERS
    assert name.isascii()
    assert name.isprintable()
    assert not set(name) & set(" /\\\"'$`;&|<>*?()[]{}!#~")


def test_endless_words_are_not_compared() -> None:
    assert did_you_mean("gpt2xl", ["gpt2-xl"]) == "Did you mean 'gpt2-xl'?"
    assert did_you_mean("x" * 5_000_000, ["x" * 100]) == ""


def test_an_endless_message_is_cut() -> None:
    told = shown("x" * 100_000)
    assert len(told) < 9_000
    assert told.endswith("(92,000 more letters)")
