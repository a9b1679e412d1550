"""The folder that says which processes are ended: that of no other user will do."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from meshwright.errors import LaunchError
from meshwright.runtime_folder import runtime_folder


def test_it_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        found = runtime_folder([tmp_path / "a" / "mine"])
    finally:
        os.umask(before)
    assert stat.S_IMODE(found.stat().st_mode) == 0o700
    assert runtime_folder([found]) == found


def foreign(place: Path) -> None:
    place.mkdir(mode=0o700)
    os.chown(place, 12345, 12345)


def open_to_all(place: Path) -> None:
    place.mkdir()
    place.chmod(0o777)


def link(place: Path) -> None:
    (place.parent / "elsewhere").mkdir(mode=0o700)
    place.symlink_to(place.parent / "elsewhere")


def file(place: Path) -> None:
    place.write_text("")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (foreign, "belongs to user 12345"),
        (open_to_all, "is open to others (mode 777)"),
        (link, "is no folder"),
        (file, "cannot be made"),
    ],
)
def test_what_others_have_made_is_passed_by(tmp_path: Path, make, words: str) -> None:  # type: ignore[no-untyped-def]
    if make is foreign and os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    place = tmp_path / "first"
    make(place)
    second = tmp_path / "second"
    assert runtime_folder([place, second]) == second
    with pytest.raises(LaunchError) as caught:
        runtime_folder([place])
    assert str(place) in str(caught.value)
    assert words in str(caught.value)
    assert "XDG_RUNTIME_DIR" in str(caught.value)


def test_by_default_the_place_that_the_system_gives_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", os.geteuid)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    expected = Path("/run/meshwright") if os.geteuid() == 0 else tmp_path / "meshwright"
    assert runtime_folder() == expected
