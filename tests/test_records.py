"""Records and their way to and from files."""

import dataclasses
import json

import pytest

from meshwright.errors import MeshwrightError
from meshwright.records import (
    Bytes,
    BytesPerSecond,
    Seconds,
    dumps,
    fingerprint,
    load,
    parse,
    plain,
    record,
)


@record
class Part:
    name: str
    size: Bytes = 0


@record
class Whole:
    title: str
    rate: BytesPerSecond
    parts: tuple[Part, ...] = ()
    spare: Part | None = None
    named: dict[str, Part] = dataclasses.field(default_factory=dict)
    wait: Seconds | None = None


def mistakes(data: object) -> dict[str, str]:
    with pytest.raises(MeshwrightError) as caught:
        parse(data, Whole, source="w.json", error=MeshwrightError, mend="Mend it.")
    return {problem.field: str(problem) for problem in caught.value.problems}


GOOD = {
    "title": "t",
    "rate": "8 Gbit/s",
    "parts": [{"name": "a", "size": "1 KiB"}, {"name": "b"}],
    "spare": {"name": "c"},
    "named": {"x": {"name": "d", "size": 5}},
}


def test_quantities_are_read_from_text_and_from_numbers():
    whole = parse(GOOD, Whole, source="w", error=MeshwrightError)
    assert whole.rate == 1e9
    assert whole.parts == (Part(name="a", size=1024), Part(name="b"))
    assert whole.named["x"].size == 5


def test_records_are_frozen_keyword_only_and_slotted():
    part = Part(name="a")
    with pytest.raises(dataclasses.FrozenInstanceError):
        part.name = "b"
    with pytest.raises(TypeError):
        Part("a")
    assert not hasattr(part, "__dict__")


def test_every_mistake_is_reported_with_its_path():
    found = mistakes(
        {
            "rate": "8 Gbit",
            "parts": [{"name": 3}, {"nam": "x"}],
            "spare": {"name": "c", "sizes": 1},
            "named": {"x": {"name": "d", "sise": 1}},
            "titel": "t",
        }
    )
    assert set(found) == {
        "title",
        "rate",
        "parts[0].name",
        "parts[1].name",
        "parts[1].nam",
        "spare.sizes",
        "named.x.sise",
        "titel",
    }
    assert "found nothing" in found["title"]
    assert "no such unit" in found["rate"]
    assert "Value error" not in found["rate"]
    assert "Did you mean 'name'?" in found["parts[1].nam"]
    assert "Did you mean 'size'?" in found["spare.sizes"]
    assert "one of: name, size" in found["named.x.sise"]
    assert "Mend it." in found["parts[0].name"]


@pytest.mark.parametrize("data", [[], "text", None, 5])
def test_what_is_no_table_is_refused(data):
    assert "" in mistakes(data)


def test_types_are_not_bent():
    assert set(mistakes({"title": 5, "rate": True})) == {"title", "rate"}
    assert set(mistakes({"title": "t", "rate": 1, "parts": [{"name": "a", "size": 1.5}]})) == {
        "parts[0].size"
    }


def test_text_and_back_is_the_same_record():
    whole = parse(GOOD, Whole, source="w", error=MeshwrightError)
    again = parse(json.loads(dumps(whole)), Whole, source="w", error=MeshwrightError)
    assert again == whole
    assert dumps(again) == dumps(whole)
    assert "wait" not in plain(whole)


def test_the_fingerprint_tells_content_apart_and_nothing_else():
    one = parse(GOOD, Whole, source="w", error=MeshwrightError)
    same = parse({**GOOD, "rate": "1 GB/s"}, Whole, source="elsewhere", error=MeshwrightError)
    assert fingerprint(one) == fingerprint(same)
    assert fingerprint(one) != fingerprint(dataclasses.replace(one, title="u"))
    assert len(fingerprint(one)) == 12


def test_files_are_read_by_their_kind(tmp_path):
    (tmp_path / "p.toml").write_text('name = "ä"\nsize = "2 KiB"', encoding="utf-8")
    (tmp_path / "p.json").write_text('{"name": "ä", "size": 2048}', encoding="utf-8")
    both = [load(tmp_path / f"p.{kind}", Part, error=MeshwrightError) for kind in ("toml", "json")]
    assert both[0] == both[1] == Part(name="ä", size=2048)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.json", "{", "well-formed JSON"),
        ("p.toml", "name =", "well-formed TOML"),
        ("p.json", "[1]", "table of named fields"),
        ("p.json", "[" * 100_000, "nested too deep"),
    ],
)
def test_malformed_files_are_named(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(MeshwrightError, match=message) as caught:
        load(path, Part, error=MeshwrightError)
    assert caught.value.problems[0].source == str(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(MeshwrightError, match="no such file"):
        load(tmp_path / "none.toml", Part, error=MeshwrightError)
    with pytest.raises(MeshwrightError, match="found a folder; wanted a regular file"):
        load(tmp_path, Part, error=MeshwrightError)
