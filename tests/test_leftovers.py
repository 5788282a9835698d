"""`rawmerge clean`: what merges that were cut off have left goes away, and nothing else does."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

import rawmerge
from rawmerge.cli import cli
from rawmerge.errors import OutputError
from rawmerge.output.folder_lock import locked_folder
from rawmerge.output.staging_directory import hidden_beside
from tests.builders import folder_bytes, layered_merge
from tests.test_cut_off import cut_off as cut_off_consuming
from tests.test_resume import aged, cut_off

Paths = tuple[Path, Path]


@pytest.fixture
def layered(tmp_path: Path) -> Paths:
    return aged(layered_merge(tmp_path, changed=(0, 1, 2)))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_a_plain_merge_left_is_removed_and_told(layered: Paths, tmp_path: Path) -> None:
    rawmerge.merge_adapter(*layered, tmp_path / "out", dtype="float32")
    before = folder_bytes(tmp_path / "out")
    cut_off(layered, tmp_path / "out", 2, OSError(errno.ENOSPC, "full"), overwrite=True)
    left = hidden_beside(tmp_path / "out")
    size = sum(path.stat().st_size for path in left.rglob("*") if path.is_file())
    done = CliRunner().invoke(cli, ["clean", str(tmp_path / "out"), "--json"])
    assert json.loads(done.stdout) == {"removed": [{"path": str(left), "byte_count": size}]}
    assert names(tmp_path) == ["adapter", "base", "out"]
    assert folder_bytes(tmp_path / "out") == before
    again = CliRunner().invoke(cli, ["clean", str(tmp_path / "out")])
    assert (again.exit_code, again.stdout) == (0, "nothing was left\n")
    assert names(tmp_path) == ["adapter", "base", "out"]


def test_what_another_process_works_in_stays(layered: Paths, tmp_path: Path) -> None:
    cut_off(layered, tmp_path / "out", 1)
    before = folder_bytes(hidden_beside(tmp_path / "out"))
    with locked_folder(hidden_beside(tmp_path / "out")):
        done = CliRunner().invoke(cli, ["clean", str(tmp_path / "out")])
    assert (done.exit_code, "another process" in done.stderr) == (3, True)
    assert folder_bytes(hidden_beside(tmp_path / "out")) == before


def test_an_output_that_was_put_aside_gets_its_name_back(layered: Paths, tmp_path: Path) -> None:
    rawmerge.merge_adapter(*layered, tmp_path / "out")
    golden = folder_bytes(tmp_path / "out")
    aside = hidden_beside(tmp_path / "out") / "output-old"
    aside.parent.mkdir()
    (tmp_path / "out").rename(aside)
    with pytest.raises(OutputError, match="it has its name again"):
        rawmerge.clean_output(tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == golden
    assert names(tmp_path) == ["adapter", "base", "out"]


def test_the_only_copy_of_a_bases_shards_stays(layered: Paths, tmp_path: Path) -> None:
    whole = folder_bytes(layered[0])
    cut_off_consuming(layered, tmp_path / "out")
    working = tmp_path / "out.rawmerge-unfinished"
    before = folder_bytes(working)
    assert len(folder_bytes(layered[0])) < len(whole)
    with pytest.raises(OutputError, match="the only copy"):
        rawmerge.clean_output(tmp_path / "out")
    assert folder_bytes(working) == before


def test_what_a_consuming_merge_left_before_it_deleted_anything_goes(layered: Paths, tmp_path: Path) -> None:
    cut_off_consuming(layered, tmp_path / "other")
    working = tmp_path / "other.rawmerge-unfinished"
    left = tmp_path / "out.rawmerge-unfinished"
    shutil.copytree(working, left)
    journal = left / "journal.jsonl"
    lines = [line for line in journal.read_text().splitlines() if "deleted" not in json.loads(line)]
    journal.write_text("".join(f"{line}\n" for line in lines))
    assert [item.path for item in rawmerge.clean_output(tmp_path / "out")] == [str(left)]
    assert not left.exists()
    assert working.exists()


def test_what_was_being_removed_goes_and_what_looks_like_it_stays(tmp_path: Path) -> None:
    for name in (".rawmerge-123-0a1b2c3d-old", ".rawmerge-123-0a1b2c3d-older", "rawmerge-1-0a1b2c3d-old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "journal.jsonl").write_text("x")
    (tmp_path / ".rawmerge-124-0a1b2c3d-old").symlink_to(tmp_path / "rawmerge-1-0a1b2c3d-old")
    (removed,) = rawmerge.clean_output(tmp_path / "out")
    assert removed.byte_count == 1
    assert names(tmp_path) == [
        ".rawmerge-123-0a1b2c3d-older",
        ".rawmerge-124-0a1b2c3d-old",
        "rawmerge-1-0a1b2c3d-old",
    ]
    assert (tmp_path / "rawmerge-1-0a1b2c3d-old/journal.jsonl").exists()


def test_files_of_others_stay(tmp_path: Path) -> None:
    (tmp_path / "out.rawmerge-unfinished").mkdir()
    (tmp_path / "out.rawmerge-unfinished/mine").write_text("x")
    with pytest.raises(OutputError, match="others too"):
        rawmerge.clean_output(tmp_path / "out")
    assert (tmp_path / "out.rawmerge-unfinished/mine").read_text() == "x"
    assert names(tmp_path) == ["out.rawmerge-unfinished"]
