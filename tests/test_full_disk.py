"""Disks that are full, over quota or broken: exit code 4, the file named, nothing published, and the next run works."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import rawmerge
from rawmerge.cli import cli
from rawmerge.engine.shard_writer import OutputFile
from tests.builders import folder_bytes
from tests.failing_call import FailingCall
from tests.small_disk import PAGE

Paths = tuple[Path, Path]
ERRORS = ("ENOSPC", "EDQUOT", "EIO", "EFBIG")
UNSHARED = ("unshare", "--map-root-user", "--mount")
#: Pages that what a merge notes for the one that goes on takes at most: of a consuming one that is a plan.
NOTES = 8
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc/self/fd")


def merge(paths: Paths, output: Path, *options: object) -> Result:
    command = ("merge", *paths, "-o", output, "--without", "kernel", *options)
    return CliRunner().invoke(cli, [str(word) for word in command])


def is_told(failing: FailingCall, text: str) -> bool:
    """Whether the file is named, and where it was written to, the byte."""
    assert failing.path
    where = r" \(writing at byte \d+\)" if failing.name == "pwrite" else ""
    return re.search(f"{re.escape(str(failing.path))}.*{os.strerror(failing.error)}{where}", text) is not None


def fail_each(
    paths: Paths, place: Path, name: str, options: Sequence[object], golden: dict[str, bytes]
) -> list[tuple[FailingCall, str]]:
    """Let each call of a name fail in turn; return those that did and what was said, once all else was as it should."""
    failed: list[tuple[FailingCall, str]] = []
    while True:
        number = len(failed) + 1
        failing = FailingCall(name, getattr(errno, ERRORS[number % 4]), number, place)
        place.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            failing.patch(patch)
            result = merge(paths, place / "out", *options)
            if failing.path is None:
                assert result.exit_code == 0, result.stderr
                shutil.rmtree(place)
                return failed
            failed.append((failing, result.stderr))
            is_published = "the output was published before" in result.stderr
            assert result.exit_code == 4, result.stderr
            assert is_published or "nothing was published" in result.stderr
            assert (place / "out").exists() == is_published
            assert is_published or merge(paths, place / "out", *options).exit_code == 0
        assert folder_bytes(place / "out") == golden
        assert [path.name for path in place.iterdir()] == ["out"]
        assert not [path for path in failing.synced_again if path.suffix]
        failing.close()
        shutil.rmtree(place)


@pytest.fixture
def golden(tiny: Paths, tmp_path: Path) -> dict[str, bytes]:
    """Return the bytes of a merge that is left alone."""
    rawmerge.merge_adapter(*tiny, tmp_path / "golden")
    return folder_bytes(tmp_path / "golden")


@linux
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("name", "options", "least"),
    [
        ("pwrite", (), 4),
        ("posix_fallocate", (), 4),
        ("ftruncate", ("--without", "preallocation"), 2),
        ("mkdir", (), 2),
        ("rename", (), 1),
        ("copy_file_range", (), 0),
    ],
)
def test_a_call_that_fails_is_told_and_the_next_run_works(
    tiny: Paths,
    tmp_path: Path,
    golden: dict[str, bytes],
    name: str,
    options: Sequence[object],
    least: int,
    threads: int,
) -> None:
    failed = fail_each(tiny, tmp_path / "place", name, ("--threads", threads, *options), golden)
    assert len(failed) >= least
    for failing, text in failed:
        assert is_told(failing, text), text


@linux
@pytest.mark.parametrize("threads", [1, 2])
def test_a_sync_that_fails_ends_the_merge_and_is_never_called_again(
    tiny: Paths, tmp_path: Path, golden: dict[str, bytes], threads: int
) -> None:
    """The system tells of lost pages once: a second sync of the same file would find nothing wrong."""
    failed = fail_each(tiny, tmp_path / "place", "fsync", ("--threads", threads), golden)
    shards = [(failing, text) for failing, text in failed if failing.path and failing.path.suffix == ".safetensors"]
    assert len(failed) > 6
    assert shards
    for failing, text in shards:
        assert is_told(failing, text), text


@linux
def test_a_folder_that_cannot_be_synced_is_not_trusted_again(
    tiny: Paths, tmp_path: Path, golden: dict[str, bytes]
) -> None:
    failed = fail_each(tiny, tmp_path / "place", "fsync", ("--threads", 1), golden)
    assert not [failing.synced_again for failing, _ in failed if failing.synced_again]


@linux
def test_a_small_file_or_folder_that_cannot_be_synced_is_named(
    tiny: Paths, tmp_path: Path, golden: dict[str, bytes]
) -> None:
    for failing, text in fail_each(tiny, tmp_path / "place", "fsync", ("--threads", 1), golden):
        assert is_told(failing, text), text


def test_a_shard_of_which_a_part_is_lost_is_not_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread learns of it while it waits for the disk, another one would call the shard durable."""
    finished: list[bool] = []

    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with OutputFile(tmp_path / "shard", 8, finished=lambda: finished.append(True)) as file:
        file.write_at(0, memoryview(b"12345678"))
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync" if hasattr(os, "fdatasync") else "fsync", fail)
            with pytest.raises(OSError, match=r"syncing.*shard"):
                file.flush()
        for call in (file.finish, file.flush):
            with pytest.raises(OSError, match=r"not all that was written has reached the disk.*shard"):
                call()
    assert not finished


# --- disks of several sizes ---


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what merges to small disks gave, all of them made by one program."""
    program = [sys.executable, "-m", "tests.small_disk", str(tmp_path_factory.mktemp("small"))]
    try:
        trial = "mount -t tmpfs -o size=1M tmpfs /mnt"
        subprocess.run([*UNSHARED, "sh", "-c", trial], check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    done = subprocess.run(
        [*UNSHARED, *program], capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent
    )
    assert done.returncode == 0, done.stderr
    made: dict[str, Any] = json.loads(done.stdout)
    return made


def assert_clean(one: dict[str, Any]) -> None:
    """The merge worked, or said what was wrong and published nothing; and the next one works."""
    if one["code"] == 0:
        assert one["output"] == "golden"
        return
    assert one["output"] == "absent", one
    assert one["again"]["code"] == 0, one
    assert one["again"]["output"] == "golden"


def is_of_a_file(one: dict[str, Any], error: int) -> bool:
    """Whether a failure names a file on the disk."""
    return re.search(f"disk/.*{os.strerror(error)}", one["told"]) is not None


def test_a_limit_of_the_size_of_files_is_told(rounds: dict[str, Any]) -> None:
    assert len(rounds["file size"]) == 12
    for one in rounds["file size"]:
        assert one["code"] == 4, one
        assert is_of_a_file(one, errno.EFBIG), one
        assert_clean(one)


def test_a_merge_that_is_begun_has_room(rounds: dict[str, Any]) -> None:
    """From the smallest disk to one with room to spare: it is refused before it writes, or it works."""
    for name in ("checked", "checked, consuming"):
        codes = [one["code"] for one in rounds[name]]
        assert codes == sorted(codes, reverse=True)
        assert set(codes) == {3, 0}
    for one in rounds["checked"]:
        assert_clean(one)


def test_a_disk_that_is_full_too_early_is_told(rounds: dict[str, Any]) -> None:
    for one in (*rounds["unchecked"], *rounds["smallest"], *rounds["smallest, consuming"]):
        assert one["code"] in (0, 4), one
        assert one["code"] == 0 or is_of_a_file(one, errno.ENOSPC), one
        assert_clean(one)
    assert sum(one["code"] == 4 for one in rounds["unchecked"]) > 3


@pytest.mark.parametrize(("name", "pages"), [("smallest", "pages"), ("smallest, consuming", "consuming pages")])
def test_the_smallest_disk_has_room_for_the_output_and_little_else(
    rounds: dict[str, Any], name: str, pages: str
) -> None:
    """Consuming, for the base and the largest shard: then it gives way."""
    fits = [one["size"] // PAGE for one in rounds[name] if one["code"] == 0]
    assert rounds[pages] <= min(fits) <= rounds[pages] + NOTES + 1
    assert max(one["size"] // PAGE for one in rounds[name] if one["code"]) < min(fits)


def test_a_disk_that_another_program_fills_meanwhile(rounds: dict[str, Any]) -> None:
    failed = [one for one in rounds["filler"] if one["code"]]
    assert len(failed) > 6
    for one in failed:
        assert one["code"] == 4
        assert is_of_a_file(one, errno.ENOSPC), one
        assert not one["exists"]
    assert any(re.search(r"model-0000\d.*\(writing at byte \d+\)", one["told"]) for one in failed)
    assert all(one["again"]["output"] == "golden" for one in rounds["filler"])
