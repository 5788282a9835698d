"""A merge that is cut off: the same command goes on from the finished shards, another one starts over and says so."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import rawmerge
from rawmerge.cli import cli
from rawmerge.engine.shard_writer import OutputFile
from rawmerge.errors import InputChangedError, MergeError, OutputError, VerificationError
from rawmerge.output import finished_shards, shard_journal
from rawmerge.output.staging_directory import JOURNAL_NAME, hidden_beside
from rawmerge.run import check_run
from tests.builders import folder_bytes, layered_merge, lora_pair, shard_name, write_adapter

Paths = tuple[Path, Path]
NAMES = [shard_name(number, 3) for number in (1, 2, 3)]
LONG_AGO = 1_600_000_000
Edit = Callable[[Path], object]


@pytest.fixture
def layered(tmp_path: Path) -> Paths:
    """Return a base of three shards, and an adapter that changes all of them, both written long ago."""
    paths = layered_merge(tmp_path, changed=(0, 1, 2))
    return aged(paths)


def aged(paths: Paths) -> Paths:
    # what was written just now could be written again without another time
    for path in (file for folder in paths for file in folder.iterdir()):
        os.utime(path, (LONG_AGO, LONG_AGO))
    wait_a_tick(paths[0])
    return paths


def wait_a_tick(folder: Path) -> None:
    import time

    assert folder.exists()
    time.sleep(0.06)


@pytest.fixture
def golden(layered: Paths, tmp_path: Path) -> dict[str, bytes]:
    """Return the bytes of an uninterrupted merge."""
    rawmerge.merge_adapter(*layered, tmp_path / "golden")
    found = folder_bytes(tmp_path / "golden")
    shutil.rmtree(tmp_path / "golden")
    return found


def hidden(tmp_path: Path) -> Path:
    return hidden_beside(tmp_path / "out")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def cut_off(
    paths: Paths, output: Path, finished: int, error: BaseException | None = None, **options: Any
) -> BaseException:
    """Merge until so many shards are finished, and an error comes while the next one is made durable."""
    raised = error or OSError(errno.EIO, os.strerror(errno.EIO))
    left, finish = finished, OutputFile.finish

    def finish_some(file: OutputFile, **named: Any) -> None:
        nonlocal left
        if file.path.suffix == ".safetensors":
            if not left:
                raise raised
            left -= 1
        finish(file, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OutputFile, "finish", finish_some)
        with pytest.raises((MergeError, type(raised))) as caught:
            rawmerge.merge_adapter(*paths, output, threads=1, **options)
    return caught.value


def inodes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.iterdir()}


def test_what_is_kept_is_removed_by_the_command_that_is_told(layered: Paths, tmp_path: Path) -> None:
    output = tmp_path / "it's $HOME; 2"
    told = str(cut_off(layered, output, 1))
    command = told.partition("`rawmerge clean ")[2].partition("` removes it")[0]
    echoed = subprocess.run(["sh", "-c", f"printf %s {command}"], capture_output=True, text=True, check=True)
    assert echoed.stdout == str(output)
    assert len(rawmerge.clean_output(echoed.stdout)) == 1


@pytest.mark.parametrize("finished", [1, 2])
def test_the_same_command_goes_on_from_the_finished_shards(
    layered: Paths, tmp_path: Path, golden: dict[str, bytes], finished: int
) -> None:
    error = cut_off(layered, tmp_path / "out", finished)
    count = "1 shard is" if finished == 1 else "2 shards are"
    assert f"{count} finished and kept in '{hidden(tmp_path)}'" in str(error)
    assert not (tmp_path / "out").exists()
    staged = hidden(tmp_path) / "output"
    assert names(staged) == NAMES[:finished]
    before = inodes(staged)
    plan = rawmerge.plan_merge(*layered)
    assert check_run(plan, tmp_path / "out") == [f"{finished} of 3 shards were finished by a merge that was cut off"]
    told: list[rawmerge.Progress] = []
    summary = rawmerge.merge_adapter(*layered, tmp_path / "out", progress=told.append)
    assert summary.resumed == finished
    assert f"{finished} of 3 shards were finished by a merge that was cut off" in summary.notes
    assert folder_bytes(tmp_path / "out") == golden
    assert inodes(tmp_path / "out").items() >= before.items()
    assert told[-1].done_bytes == told[-1].total_bytes
    assert summary.written_bytes < summary.byte_count
    assert names(tmp_path) == ["adapter", "base", "out"]


def test_what_is_finished_counts_as_changed_or_unchanged_as_it_was(tmp_path: Path) -> None:
    base, _ = layered_merge(tmp_path)
    none = {name: tensor * 0 for name, tensor in lora_pair("model.layers.1.q_proj", 12, 8).items()}
    paths = aged((base, write_adapter(tmp_path / "adapter", lora_pair("model.layers.0.q_proj", 12, 8) | none)))
    cut_off(paths, tmp_path / "out", 2)
    assert rawmerge.merge_adapter(*paths, tmp_path / "out").unchanged == ("model.layers.1.q_proj.weight",)


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), MemoryError(), SystemExit(1), OSError(errno.ENOSPC, "full")])
def test_what_comes_from_outside_keeps_finished_shards(
    layered: Paths, tmp_path: Path, golden: dict[str, bytes], raised: BaseException
) -> None:
    cut_off(layered, tmp_path / "out", 1, raised)
    assert names(hidden(tmp_path)) == [JOURNAL_NAME, "output"]
    assert rawmerge.merge_adapter(*layered, tmp_path / "out").resumed == 1
    assert folder_bytes(tmp_path / "out") == golden


@pytest.mark.parametrize(
    ("raised", "finished", "options"),
    [
        (ValueError("a caller's own"), 1, {}),
        (InputChangedError("changed"), 1, {}),
        (OSError(errno.EIO, "no shard is finished"), 0, {}),
        (KeyboardInterrupt(), 1, {"resume": False}),
    ],
)
def test_what_would_fail_again_or_is_of_no_use_leaves_nothing(
    layered: Paths, tmp_path: Path, raised: BaseException, finished: int, options: dict[str, Any]
) -> None:
    cut_off(layered, tmp_path / "out", finished, raised, **options)
    assert names(tmp_path) == ["adapter", "base"]


def pairs_of_seeds(*seeds: int) -> dict[str, torch.Tensor]:
    pairs: dict[str, torch.Tensor] = {}
    for layer, seed in enumerate(seeds):
        pairs |= lora_pair(f"model.layers.{layer}.q_proj", 12, 8, seed=seed)
    return pairs


def other_adapter(folder: Path) -> None:
    write_adapter(folder / "adapter", pairs_of_seeds(7, 8, 9))


def touched_base(folder: Path) -> None:
    for path in (folder / "base").glob("*.safetensors"):
        raw = path.read_bytes()
        path.write_bytes(raw)


def damaged(folder: Path) -> None:
    path = hidden(folder) / "output" / NAMES[0]
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def cut_short(folder: Path) -> None:
    os.truncate(hidden(folder) / "output" / NAMES[0], 100)


def linked(folder: Path) -> None:
    path = hidden(folder) / "output" / NAMES[0]
    path.unlink()
    path.symlink_to(folder / "base" / NAMES[0])


def twice_named(folder: Path) -> None:
    os.link(hidden(folder) / "output" / NAMES[0], folder / "other-name")


def no_journal(folder: Path) -> None:
    (hidden(folder) / JOURNAL_NAME).unlink()


def pipe_for_a_journal(folder: Path) -> None:
    (hidden(folder) / JOURNAL_NAME).unlink()
    os.mkfifo(hidden(folder) / JOURNAL_NAME)


def journal_of_another_kind(folder: Path) -> None:
    (hidden(folder) / JOURNAL_NAME).write_text('{"format": "x"}\n')


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (other_adapter, "inputs, or what was finished, have changed since"),
        (touched_base, "inputs, or what was finished, have changed since"),
        (damaged, "inputs, or what was finished, have changed since"),
        (cut_short, "inputs, or what was finished, have changed since"),
        (linked, "inputs, or what was finished, have changed since"),
        (twice_named, "inputs, or what was finished, have changed since"),
        (no_journal, "it says nothing of its shards"),
        (pipe_for_a_journal, "it says nothing of its shards"),
        (journal_of_another_kind, "it says nothing of its shards"),
    ],
)
def test_changed_inputs_or_shards_start_over_and_say_so(
    layered: Paths, tmp_path: Path, edit: Edit, reason: str
) -> None:
    cut_off(layered, tmp_path / "out", 1)
    edit(tmp_path)
    inputs = folder_bytes(layered[0])
    summary = rawmerge.merge_adapter(*layered, tmp_path / "out")
    assert f"'{hidden(tmp_path)}', which a merge that was cut off had left, was cleared: {reason}" in summary.notes
    assert summary.resumed == 0
    rawmerge.merge_adapter(*layered, tmp_path / "golden")
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "golden")
    assert folder_bytes(layered[0]) == inputs
    assert not hidden(tmp_path).exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": "float32"}, "--dtype was 'as stored', now 'float32'"),
        ({"compute_dtype": "float64"}, "--compute-dtype was 'float32', now 'float64'"),
        ({"without": ["direct-io"]}, "--without was 'nothing', now 'direct-io'"),
        ({"resume": False}, "as --no-resume (resume=False) asks"),
    ],
)
def test_other_options_start_over_and_say_so(
    layered: Paths, tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    cut_off(layered, tmp_path / "out", 1)
    summary = rawmerge.merge_adapter(*layered, tmp_path / "out", **options)
    assert any(note.endswith(f"was cleared: {reason}") for note in summary.notes), summary.notes
    assert summary.resumed == 0
    rawmerge.merge_adapter(*layered, tmp_path / "golden", **options)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "golden")


def test_where_part_of_an_adapter_is_another_only_its_shards_are_made_anew(layered: Paths, tmp_path: Path) -> None:
    cut_off(layered, tmp_path / "out", 2)
    write_adapter(layered[1], pairs_of_seeds(0, 9, 2))
    wait_a_tick(tmp_path)
    summary = rawmerge.merge_adapter(*layered, tmp_path / "out")
    assert summary.resumed == 1
    assert any("the others are made anew" in note for note in summary.notes)
    assert rawmerge.verify_merge(tmp_path / "out", *layered).is_equal


@pytest.mark.parametrize("boot", ["another", ""])
@pytest.mark.parametrize("edit", [None, damaged, cut_short])
def test_after_a_restart_every_byte_is_compared(
    layered: Paths,
    tmp_path: Path,
    golden: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    boot: str,
    edit: Edit | None,
) -> None:
    cut_off(layered, tmp_path / "out", 2)
    before = inodes(hidden(tmp_path) / "output")
    for path in layered[0].iterdir():  # as on a copy of the disk
        os.utime(path, (LONG_AGO + 5, LONG_AGO + 5))
    if edit:
        edit(tmp_path)
    monkeypatch.setattr(finished_shards, "boot_id", lambda: boot)
    monkeypatch.setattr(shard_journal, "boot_id", lambda: boot)
    summary = rawmerge.merge_adapter(*layered, tmp_path / "out")
    assert summary.resumed == (1 if edit else 2)
    assert folder_bytes(tmp_path / "out") == golden
    assert inodes(tmp_path / "out")[NAMES[1]] == before[NAMES[1]]


def test_a_shard_whose_input_was_written_just_before_is_made_again(layered: Paths, tmp_path: Path) -> None:
    os.utime(layered[0] / NAMES[0])
    cut_off(layered, tmp_path / "out", 2)
    assert rawmerge.merge_adapter(*layered, tmp_path / "out").resumed == 1


def test_an_output_that_is_replaced_stands_meanwhile(layered: Paths, tmp_path: Path, golden: dict[str, bytes]) -> None:
    rawmerge.merge_adapter(*layered, tmp_path / "out", dtype="float32")
    before = folder_bytes(tmp_path / "out")
    cut_off(layered, tmp_path / "out", 1, overwrite=True)
    assert folder_bytes(tmp_path / "out") == before
    assert rawmerge.merge_adapter(*layered, tmp_path / "out", overwrite=True).resumed == 1
    assert folder_bytes(tmp_path / "out") == golden
    assert names(tmp_path) == ["adapter", "base", "out"]


@pytest.mark.parametrize("boot", ["the same", "another"])
def test_what_is_cut_off_before_it_goes_on_keeps_what_was_there(
    layered: Paths, tmp_path: Path, golden: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, boot: str
) -> None:
    cut_off(layered, tmp_path / "out", 2)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if boot == "another":
            patch.setattr(finished_shards, "boot_id", lambda: boot)
            patch.setattr("rawmerge.output.finished_shards.Engine.run", stop)
        else:
            patch.setattr("rawmerge.plain_run.check_inputs", stop)
        with pytest.raises(KeyboardInterrupt):
            rawmerge.merge_adapter(*layered, tmp_path / "out")
    assert names(hidden(tmp_path) / "output") == NAMES[:2]
    assert rawmerge.merge_adapter(*layered, tmp_path / "out").resumed == 2
    assert folder_bytes(tmp_path / "out") == golden


def test_paths_that_are_not_utf_8_go_on_too(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"r\xff")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system wants UTF-8")
    paths = aged(layered_merge(folder, changed=(0, 1, 2)))
    cut_off(paths, folder / "out", 2)
    assert rawmerge.merge_adapter(*paths, folder / "out").resumed == 2
    assert rawmerge.verify_merge(folder / "out", *paths).is_equal


def test_notes_have_room_where_the_disk_is_full(
    layered: Paths, tmp_path: Path, golden: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    write, hits = os.write, 0

    def full(descriptor: int, raw: bytes) -> int:
        nonlocal hits
        if (hidden(tmp_path) / "reserve").exists() and b'"finished"' in raw:
            hits += 1
            return write(descriptor, raw[: len(raw) // 2])
        return write(descriptor, raw)

    monkeypatch.setattr(os, "write", full)
    cut_off(layered, tmp_path / "out", 2)
    monkeypatch.undo()
    assert hits == 1
    assert names(hidden(tmp_path)) == [JOURNAL_NAME, "output"]
    assert rawmerge.merge_adapter(*layered, tmp_path / "out").resumed == 2
    assert folder_bytes(tmp_path / "out") == golden


def test_a_note_that_has_no_room_is_not_counted(
    layered: Paths, tmp_path: Path, golden: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, raw: write(file, raw[:20]) if b'"identity"' in raw else 0)
    cut_off(layered, tmp_path / "out", 2)
    monkeypatch.undo()
    assert names(tmp_path) == ["adapter", "base"]
    rawmerge.merge_adapter(*layered, tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == golden


def test_half_a_line_of_a_journal_is_left_out(layered: Paths, tmp_path: Path, golden: dict[str, bytes]) -> None:
    cut_off(layered, tmp_path / "out", 2)
    journal = hidden(tmp_path) / JOURNAL_NAME
    first, one, two = journal.read_text().splitlines()
    journal.write_text("\n".join([first, one[:40], two, ""]))
    assert rawmerge.merge_adapter(*layered, tmp_path / "out").resumed == 1
    assert folder_bytes(tmp_path / "out") == golden


def test_checksums_and_verification_take_finished_shards_in(layered: Paths, tmp_path: Path) -> None:
    cut_off(layered, tmp_path / "out", 1)
    summary = rawmerge.merge_adapter(*layered, tmp_path / "out", checksum=True, verify=True)
    assert (summary.resumed, summary.verified) == (1, True)
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=tmp_path / "out", capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(b"OK") == len(names(tmp_path / "out")) - 1


def test_verification_finds_a_finished_shard_that_the_status_does_not(layered: Paths, tmp_path: Path) -> None:
    cut_off(layered, tmp_path / "out", 1)
    path, journal = hidden(tmp_path) / "output" / NAMES[0], hidden(tmp_path) / JOURNAL_NAME
    damaged(tmp_path)
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    found = path.stat()
    lines[1]["status"] = [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
    journal.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    with pytest.raises(VerificationError, match=r"layers\.0"):
        rawmerge.merge_adapter(*layered, tmp_path / "out", verify=True)
    assert names(tmp_path) == ["adapter", "base"]


def test_the_command_tells_and_goes_on(layered: Paths, tmp_path: Path, golden: dict[str, bytes]) -> None:
    cut_off(layered, tmp_path / "out", 2)
    command = ["merge", *map(str, layered), "-o", str(tmp_path / "out")]
    dry = CliRunner().invoke(cli, [*command, "--dry-run"])
    assert (dry.exit_code, hidden(tmp_path).exists()) == (0, True)
    assert "note: 2 of 3 shards were finished by a merge that was cut off" in dry.stderr
    done = CliRunner().invoke(cli, [*command, "--json"])
    assert json.loads(done.stdout)["resumed"] == 2
    assert folder_bytes(tmp_path / "out") == golden


def test_the_command_starts_anew_where_it_is_told_to(layered: Paths, tmp_path: Path) -> None:
    cut_off(layered, tmp_path / "out", 2)
    command = ["merge", *map(str, layered), "-o", str(tmp_path / "out"), "--no-resume"]
    assert "is cleared" in CliRunner().invoke(cli, [*command, "--dry-run"]).stderr
    done = CliRunner().invoke(cli, command)
    assert "as --no-resume" in done.stderr
    assert rawmerge.verify_merge(tmp_path / "out", *layered).is_equal


def test_a_merge_that_consumes_its_base_clears_what_another_left(
    layered: Paths, tmp_path: Path, golden: dict[str, bytes]
) -> None:
    cut_off(layered, tmp_path / "out", 2)
    summary = rawmerge.merge_adapter(*layered, tmp_path / "out", consume_base=True)
    assert any("without --consume-base" in note for note in summary.notes)
    assert folder_bytes(tmp_path / "out") == golden
    assert names(tmp_path) == ["adapter", "base", "out"]


def test_a_merge_that_consumes_its_base_cannot_start_anew(layered: Paths, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="--no-resume"):
        rawmerge.merge_adapter(*layered, tmp_path / "out", consume_base=True, resume=False)
    assert names(tmp_path) == ["adapter", "base"]


INTERRUPTED = """
import os, signal, sys
from rawmerge.engine.shard_writer import OutputFile
from rawmerge.errors import InputChangedError, MergeError, OutputError, VerificationError
finish, left = OutputFile.finish, [sys.argv.pop(1)]
def finish_one(file, **named):
    finish(file, **named)
    if file.path.suffix == ".safetensors" and left:
        os.kill(os.getpid(), getattr(signal, left.pop()))
OutputFile.finish = finish_one
from rawmerge.__main__ import main
main()
"""


@pytest.mark.parametrize(
    ("name", "code"), [pytest.param("SIGTERM", 143, marks=pytest.mark.slow), ("SIGINT", 130), ("SIGKILL", -9)]
)
def test_a_signal_ends_the_command_and_the_next_goes_on(tmp_path: Path, name: str, code: int) -> None:
    paths = aged(layered_merge(tmp_path, layers=40, changed=range(40)))
    rawmerge.merge_adapter(*paths, tmp_path / "golden")
    command = ["merge", *map(str, paths), "-o", str(tmp_path / "out"), "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, name, *command], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == code, done.stderr
    if name != "SIGKILL":
        assert "finished and kept in" in done.stderr
        assert f"`rawmerge clean {tmp_path / 'out'}` removes it" in done.stderr
    again = subprocess.run(
        [sys.executable, "-m", "rawmerge", *command, "--json"], capture_output=True, text=True, timeout=60, check=False
    )
    assert again.returncode == 0, again.stderr
    assert 1 <= json.loads(again.stdout)["resumed"] <= 40, again.stderr
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "golden")
