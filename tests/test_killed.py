"""What a merge that is killed outright leaves, and two merges to one output."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import rawmerge
from rawmerge.errors import OutputError
from rawmerge.output import staging_directory
from rawmerge.output.exchange import exchange
from rawmerge.output.staging_directory import hidden_beside
from tests.builders import folder_bytes, layered_merge
from tests.kill_rounds import run_rounds

Paths = tuple[Path, Path]

#: Merges, and is killed before its file operation of the number that the last argument says.
DIES = """
import os, signal, sys, threading
import rawmerge
left, lock = int(sys.argv[4]), threading.Lock()
def counted(name):
    call = getattr(os, name)
    def run(*arguments, **named):
        global left
        with lock:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **named)
    setattr(os, name, run)
for name in ("pwrite", "fsync", "rename", "mkdir", "rmdir", "unlink", "posix_fallocate", "open"):
    counted(name)
os.fsync = lambda _: None
rawmerge.merge_adapter(*sys.argv[1:4], overwrite=True, threads=1)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def dying(paths: Paths, output: Path, number: int) -> int:
    command = [sys.executable, "-c", DIES, *map(str, paths), str(output), str(number)]
    return subprocess.run(command, capture_output=True, check=False, timeout=60).returncode


@pytest.mark.slow
@pytest.mark.parametrize("stands", [False, True])
def test_a_merge_that_is_killed_anywhere_leaves_the_output_absent_or_whole(
    tiny: Paths, tmp_path: Path, stands: bool
) -> None:
    output = tmp_path / "out"
    rawmerge.merge_adapter(*tiny, tmp_path / "golden")
    golden = folder_bytes(tmp_path / "golden")
    rawmerge.merge_adapter(*tiny, tmp_path / "before", dtype="float32")
    before = folder_bytes(tmp_path / "before")
    inputs = [folder_bytes(path) for path in tiny]
    killed = 0
    for number in (*range(1, 60, 9), 1000):
        if stands:
            rawmerge.merge_adapter(*tiny, output, dtype="float32", overwrite=True)
        killed += dying(tiny, output, number) == -signal.SIGKILL
        found = folder_bytes(output) if output.exists() else None
        assert found in ([before, golden] if stands else [None, golden]), number
        assert [folder_bytes(path) for path in tiny] == inputs
        rawmerge.merge_adapter(*tiny, output, overwrite=True)
        assert folder_bytes(output) == golden
        assert names(tmp_path) == ["adapter", "base", "before", "golden", "out"]
        if not stands:
            for path in output.iterdir():
                path.unlink()
            output.rmdir()
    assert killed >= 4


@pytest.mark.parametrize("mode", ["plain", "overwrite"])
@pytest.mark.parametrize(("step", "kills"), [(19, 1), pytest.param(1, 200, marks=pytest.mark.slow)])
def test_killed_before_any_file_operation_the_next_run_ends_with_the_same_bytes(
    tmp_path: Path, mode: str, step: int, kills: int
) -> None:
    layered_merge(tmp_path, changed=(0, 1, 2))
    found = run_rounds(tmp_path, mode, step, kills)
    assert found["killed"] > 50 / step
    assert found["resumed"] > 12 / step


def test_what_a_killed_merge_left_is_told_and_cleared(tiny: Paths, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert dying(tiny, output, 12) == -signal.SIGKILL
    left, inputs = hidden_beside(output), folder_bytes(tiny[0])
    assert left.exists()
    (left / "link").symlink_to(tiny[0])
    (left / "folder").mkdir()
    (left / "folder/file").write_text("x")
    summary = rawmerge.merge_adapter(*tiny, output)
    assert (
        f"{str(left)!r}, which a merge that was cut off had left, was cleared: it had finished no shard"
        in summary.notes
    )
    assert names(tmp_path) == ["adapter", "base", "out"]
    assert folder_bytes(tiny[0]) == inputs


def test_a_second_merge_to_one_output_is_refused_and_the_first_goes_on(tiny: Paths, tmp_path: Path) -> None:
    begun, refused = threading.Event(), threading.Event()

    def wait(_: rawmerge.Progress) -> None:
        begun.set()
        assert refused.wait(60)

    first = threading.Thread(target=lambda: rawmerge.merge_adapter(*tiny, tmp_path / "out", progress=wait))
    first.start()
    assert begun.wait(60)
    try:
        command = [sys.executable, "-m", "rawmerge", "merge", *map(str, tiny), "-o", "out", "--json"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False, timeout=60)
        with pytest.raises(OutputError, match="another process is making"):
            rawmerge.merge_adapter(*tiny, tmp_path / "base/../out", overwrite=True)
    finally:
        refused.set()
        first.join()
    assert done.returncode == 3, done.stderr
    assert "another process is making" in json.loads(done.stdout)["message"]
    assert names(tmp_path) == ["adapter", "base", "out"]
    assert rawmerge.verify_merge(tmp_path / "out", *tiny).is_equal


def test_merges_to_outputs_side_by_side_do_not_meet(tiny: Paths, tmp_path: Path) -> None:
    outputs = [tmp_path / name for name in ("a", "b", "a" * 60, "a" * 60 + "b", "ü" * 100)]
    assert len({hidden_beside(output) for output in outputs}) == len(outputs)
    threads = [threading.Thread(target=rawmerge.merge_adapter, args=(*tiny, output)) for output in outputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(rawmerge.verify_merge(output, *tiny).is_equal for output in outputs)


def test_merges_that_follow_each_other_closely_do_not_disturb_each_other(tiny: Paths, tmp_path: Path) -> None:
    output = tmp_path / "out"
    rawmerge.merge_adapter(*tiny, output)
    ended: list[rawmerge.MergeSummary | rawmerge.RawmergeError] = []

    def merge_again() -> None:
        for _ in range(12):
            try:
                ended.append(rawmerge.merge_adapter(*tiny, output, overwrite=True, reuse=False, threads=1))
            except rawmerge.RawmergeError as error:
                ended.append(error)

    threads = [threading.Thread(target=merge_again) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [item for item in ended if isinstance(item, rawmerge.RawmergeError)]
    assert all("another process is making" in str(error) for error in refused), list(map(str, refused))
    assert len(refused) < len(ended) == 36
    told = [note for item in ended if isinstance(item, rawmerge.MergeSummary) for note in item.notes]
    assert not any("killed" in note for note in told)
    assert names(tmp_path) == ["adapter", "base", "out"]
    assert rawmerge.verify_merge(output, *tiny).is_equal


def test_where_names_cannot_be_exchanged_an_output_that_was_put_aside_comes_back(
    tiny: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging_directory, "exchange", lambda *_: False)
    output = tmp_path / "out"
    rawmerge.merge_adapter(*tiny, output, dtype="float32")
    before = folder_bytes(output)
    rawmerge.merge_adapter(*tiny, output, overwrite=True)
    golden = folder_bytes(output)
    assert golden != before
    aside = hidden_beside(output) / "output-old"
    aside.parent.mkdir()
    output.rename(aside)  # as if killed between the two renames
    with pytest.raises(OutputError, match="it has its name again"):
        rawmerge.merge_adapter(*tiny, output)
    assert folder_bytes(output) == golden
    assert names(tmp_path) == ["adapter", "base", "out"]
    aside.parent.mkdir()
    output.rename(aside)  # as if killed after the second
    rawmerge.merge_adapter(*tiny, tmp_path / "other")
    (tmp_path / "other").rename(output)
    rawmerge.merge_adapter(*tiny, output, overwrite=True)
    assert names(tmp_path) == ["adapter", "base", "out"]


def test_an_exchange_is_at_once_or_not_at_all(tmp_path: Path) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("Linux only")
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert exchange(tmp_path / "a", tmp_path / "b")
    assert (names(tmp_path / "a"), names(tmp_path / "b")) == (["b"], ["a"])
    assert not exchange(tmp_path / "a", tmp_path / "nothing")
    assert names(tmp_path) == ["a", "b"]


def test_an_output_that_cannot_have_its_name_back_is_not_removed(
    tiny: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    rawmerge.merge_adapter(*tiny, output, dtype="float32")
    before, rename = folder_bytes(output), os.rename

    def fails_to_come(source: Path, target: Path) -> None:
        if Path(target) == output:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, target)

    monkeypatch.setattr(staging_directory, "exchange", lambda *_: False)
    monkeypatch.setattr(os, "rename", fails_to_come)
    for _ in range(2):  # nor by the next merge
        with pytest.raises(rawmerge.RawmergeError, match=os.strerror(errno.EIO)):
            rawmerge.merge_adapter(*tiny, output, overwrite=True)
        assert folder_bytes(hidden_beside(output) / "output-old") == before
    monkeypatch.undo()
    with pytest.raises(OutputError, match="it has its name again"):
        rawmerge.merge_adapter(*tiny, output, overwrite=True)
    assert folder_bytes(output) == before
    assert names(tmp_path) == ["adapter", "base", "out"]
