"""Publishing an output: never over other work, never half, and truthfully told."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import rawmerge
from rawmerge.consuming.unfinished import unfinished_folder
from rawmerge.errors import MergeError, OutputError
from rawmerge.output import staging_directory
from rawmerge.output.output_directory import OutputPolicy
from rawmerge.output.staging_directory import PUBLISHED_NOTE, StagingDirectory, hidden_beside

Paths = tuple[Path, Path]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("overwrite", [False, True])
def test_work_that_appears_at_the_output_meanwhile_is_not_replaced(
    tiny: Paths, tmp_path: Path, overwrite: bool
) -> None:
    def appear(_: rawmerge.Progress) -> None:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out/precious.txt").write_text("work")

    with pytest.raises(MergeError, match="/out': the output has changed meanwhile and holds other work"):
        rawmerge.merge_adapter(*tiny, tmp_path / "out", overwrite=overwrite, progress=appear)
    assert names(tmp_path / "out") == ["precious.txt"]
    assert names(tmp_path) == ["adapter", "base", "out"]


def test_an_output_that_holds_what_the_base_links_to_is_refused(tiny: Paths, tmp_path: Path) -> None:
    base, adapter = tiny
    links = tmp_path / "links"
    links.mkdir()
    for path in base.iterdir():
        (links / path.name).symlink_to(path)
    with pytest.raises(OutputError, match="one that holds"):
        rawmerge.merge_adapter(links, adapter, base, overwrite=True)
    assert len(names(base)) == 5


def test_a_name_too_long_for_the_file_system_is_refused(tiny: Paths, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"at most 255 bytes|too long"):
        rawmerge.merge_adapter(*tiny, tmp_path / ("a" * 300))
    rawmerge.merge_adapter(*tiny, tmp_path / ("a" * 250))


@pytest.mark.parametrize("below", ["", "x"])
def test_a_loop_of_links_is_refused(tiny: Paths, tmp_path: Path, below: str) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises((OutputError, MergeError)):
        rawmerge.merge_adapter(*tiny, tmp_path / "loop" / below)


@pytest.fixture
def handled_interrupt() -> Iterator[None]:
    """Let SIGINT raise KeyboardInterrupt, which it does not where a shell started pytest in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("handled_interrupt")
def test_a_signal_while_publishing_waits_and_is_told_truthfully(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        signal.raise_signal(signal.SIGINT)  # this thread gets it now; of a kill, any thread may, and later
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    policy = OutputPolicy(False, "record.json", tmp_path / "base", ())
    staging = StagingDirectory(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt) as caught, staging:
        staging.publish(policy)
    assert caught.value.__notes__ == [PUBLISHED_NOTE]
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == []


def test_a_failure_after_publishing_does_not_claim_that_nothing_was(
    tiny: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = staging_directory.sync_directory

    def fail_on_the_parent(folder: Path) -> None:
        if folder == tmp_path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(folder)

    monkeypatch.setattr(staging_directory, "sync_directory", fail_on_the_parent)
    with pytest.raises(MergeError, match=PUBLISHED_NOTE):
        rawmerge.merge_adapter(*tiny, tmp_path / "out")
    assert (tmp_path / "out/rawmerge.json").exists()


def run_cli(arguments: list[object], redirections: str) -> subprocess.CompletedProcess[bytes]:
    command = " ".join([sys.executable, "-m", "rawmerge", *map(str, arguments), redirections])
    return subprocess.run(["bash", "-c", command], capture_output=True, check=False)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("redirections", ["2>&-", ">&-", ">/dev/full", "2>/dev/full", "| true"])
def test_a_closed_or_full_stream_does_not_undo_the_merge(tiny: Paths, tmp_path: Path, redirections: str) -> None:
    done = run_cli(["merge", *tiny, "--output", tmp_path / "out"], redirections)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    assert (tmp_path / "out/rawmerge.json").exists()


def test_staging_directories_are_hidden_and_beside_the_target(tiny: Paths, tmp_path: Path) -> None:
    seen: set[str] = set()
    rawmerge.merge_adapter(*tiny, tmp_path / "out", progress=lambda _: seen.update(names(tmp_path)))
    assert [name for name in seen if re.fullmatch(r"\.rawmerge-out-[0-9a-f]{8}", name)]
    assert names(tmp_path) == ["adapter", "base", "out"]


@pytest.mark.parametrize("name", ["../evil.bin", "/tmp/rawmerge-evil", "a/../../evil", "rawmerge.json", ""])
@pytest.mark.parametrize("part", ["shards", "written_files", "side_files"])
def test_a_plan_that_writes_outside_the_output_is_refused(
    tiny: tuple[Path, Path], tmp_path: Path, part: str, name: str
) -> None:
    document = json.loads(rawmerge.format_plan(rawmerge.plan_merge(*tiny, dtype="float32")))
    document[part][0]["name"] = name
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(rawmerge.RefusedError, match="a file of its own inside the output"):
        rawmerge.run_plan(rawmerge.parse_plan(json.dumps(document)), tmp_path / "deep" / "out")
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/tmp/rawmerge-evil").exists()


def test_a_plan_with_an_update_that_is_not_known_is_refused(tiny: Paths, tmp_path: Path) -> None:
    text = rawmerge.format_plan(rawmerge.plan_merge(*tiny))
    changed, count = re.subn(r'("kind": ?)"lora"', r'\1"nope"', text)
    assert count == 2
    with pytest.raises(rawmerge.RefusedError, match="an update that can be computed, found nope"):
        rawmerge.run_plan(rawmerge.parse_plan(changed), tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()


@pytest.mark.usefixtures("handled_interrupt")
def test_a_signal_after_publishing_is_told_truthfully(
    tiny: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rawmerge.plain_run.remember_output", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt) as caught:
        rawmerge.merge_adapter(*tiny, tmp_path / "out")
    assert caught.value.__notes__ == [PUBLISHED_NOTE]
    assert (tmp_path / "out" / "rawmerge.json").exists()


@pytest.mark.parametrize("consumes", [False, True])
@pytest.mark.parametrize("kind", ["link", "link to nothing", "file", "pipe"])
def test_what_others_put_where_a_merge_works_is_refused_and_left_alone(
    tiny: Paths, tmp_path: Path, consumes: bool, kind: str
) -> None:
    """The place's name can be guessed: a link there must not have a stranger's choice of folder cleared."""
    mine = tmp_path / "mine/output"
    mine.mkdir(parents=True)
    (mine / "work.txt").write_text("work")
    place = unfinished_folder(tmp_path / "out").path if consumes else hidden_beside(tmp_path / "out")
    put_at(place, kind, mine.parent)
    with pytest.raises(OutputError, match=re.escape(f"'{place}': expected no")):
        rawmerge.merge_adapter(*tiny, tmp_path / "out", consume_base=consumes)
    assert names(tmp_path) == sorted(["adapter", "base", "mine", place.name])
    assert names(mine) == ["work.txt"]
    assert len(names(tiny[0])) == 5


def put_at(place: Path, kind: str, target: Path) -> None:
    if kind == "file":
        place.write_text("work")
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to(target if kind == "link" else "nothing")
