"""Modes of what a merge makes: the umask's, whatever modes the base's files have."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import rawmerge
from rawmerge.inputs.file_status import TICK_NS
from tests.builders import layered_merge, shard_name

Paths = tuple[Path, Path]
MASKS = [0o000, 0o022, 0o027, 0o077]
UNCHANGED = shard_name(3, 3)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.fixture
def odd(tmp_path: Path) -> Paths:
    """Return a base whose files and folders have all kinds of modes, and an adapter on two of its three shards."""
    base, adapter = layered_merge(tmp_path)
    (base / "1_Pooling/deep").mkdir(parents=True)
    sides = {"1_Pooling/deep/config.json": 0o400, ".gitattributes": 0o755, "modeling_own.py": 0o777, "LICENSE": 0o600}
    for name in sides:
        (base / name).write_text(name)
    for name, mode in {**sides, "config.json": 0o444, shard_name(1, 3): 0o444, UNCHANGED: 0o604}.items():
        (base / name).chmod(mode)
    (base / "1_Pooling/deep").chmod(0o700)
    return base, adapter


def modes(folder: Path) -> dict[str, int]:
    """Return the mode of a folder and of all that is in it, by path."""
    return {str(at.relative_to(folder.parent)): at.stat().st_mode & 0o7777 for at in [folder, *folder.rglob("*")]}


def assert_modes(output: Path, mask: int, *but: str) -> None:
    """Assert that all in an output has what the system gives new files and folders; `but` names the exceptions."""
    found = modes(output)
    assert {"out", "out/1_Pooling/deep", "out/1_Pooling/deep/config.json", "out/.gitattributes"} <= found.keys()
    fresh = {name: (0o777 if (output.parent / name).is_dir() else 0o666) & ~mask for name in found}
    assert found == {name: found[name] if Path(name).name in but else mode for name, mode in fresh.items()}


WAYS: list[dict[str, Any]] = [
    {},
    {"checksum": True, "verify": True},
    {"dtype": "float32"},
    {"consume_base": True},
    {"without": ["reflink", "direct-io", "preallocation"]},
]


@pytest.mark.parametrize("mask", MASKS, ids=oct)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_all_that_is_made_has_the_umask_s_mode(odd: Paths, tmp_path: Path, mask: int, way: dict[str, Any]) -> None:
    with umask(mask):
        rawmerge.merge_adapter(*odd, tmp_path / "new/out", **way)
    assert_modes(tmp_path / "new/out", mask)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o777 & ~mask


@pytest.mark.parametrize("mask", MASKS, ids=oct)
@pytest.mark.parametrize("consumes", [False, True])
def test_what_is_replaced_leaves_no_mode_behind(odd: Paths, tmp_path: Path, mask: int, consumes: bool) -> None:
    rawmerge.merge_adapter(*odd, tmp_path / "out", dtype="float32")
    for path in (tmp_path / "out").rglob("*"):
        path.chmod(0o750 if path.is_dir() else 0o640)
    (tmp_path / "out").chmod(0o711)
    with umask(mask):
        rawmerge.merge_adapter(*odd, tmp_path / "out", overwrite=True, consume_base=consumes)
    assert_modes(tmp_path / "out", mask)


@pytest.mark.parametrize("mask", MASKS, ids=oct)
def test_a_linked_shard_is_the_base_s_file_mode_and_all(odd: Paths, tmp_path: Path, mask: int) -> None:
    """A link is another name of one file: to change its mode would change the base's."""
    before = modes(odd[0])
    with umask(mask):
        assert rawmerge.merge_adapter(*odd, tmp_path / "out", link=True).linked == 1
    assert modes(odd[0]) == before
    assert_modes(tmp_path / "out", mask, UNCHANGED)
    assert (tmp_path / "out" / UNCHANGED).samefile(odd[0] / UNCHANGED)
    assert (tmp_path / "out" / UNCHANGED).stat().st_mode & 0o7777 == 0o604


def test_a_shard_that_is_taken_over_has_the_mode_of_this_umask(odd: Paths, tmp_path: Path) -> None:
    time.sleep(1.2 * TICK_NS / 1e9)  # inputs this young are not trusted to be as they were
    with umask(0o077):
        rawmerge.merge_adapter(*odd, tmp_path / "out")
    with umask(0o022):
        rawmerge.merge_adapter(*odd, tmp_path / "out", overwrite=True)
    assert_modes(tmp_path / "out", 0o022)


@pytest.mark.parametrize("way", [{}, {"overwrite": True}, {"consume_base": True}], ids=str)
def test_a_folder_that_hands_its_group_down_does_so(odd: Paths, tmp_path: Path, way: dict[str, Any]) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    group = given_to_another_group(shared)
    shared.chmod(0o2775)
    if "overwrite" in way:
        rawmerge.merge_adapter(*odd, shared / "out")
    with umask(0o027):
        (shared / "folder").mkdir()  # what the system makes of it, which differs between systems
        rawmerge.merge_adapter(*odd, shared / "out", **way)
    for at in (shared / "out", *(shared / "out").rglob("*")):
        assert at.stat().st_gid == group
        assert not at.is_dir() or at.stat().st_mode == (shared / "folder").stat().st_mode
        assert at.is_dir() or at.stat().st_mode & 0o7777 == 0o640


def given_to_another_group(folder: Path) -> int:
    """Give a folder to a group that is not this process's own; return it."""
    others = [1] if os.geteuid() == 0 else [group for group in os.getgroups() if group != os.getegid()]
    for group in others:
        with suppress(OSError):  # a container may know one group only
            os.chown(folder, -1, group)
            return group
    pytest.skip("needs a second group")
