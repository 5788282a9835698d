"""A consuming merge that is cut off: the same command goes on, and everything else is refused."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import rawmerge
from rawmerge.cli import cli
from rawmerge.consuming import resumption
from rawmerge.errors import MergeError, NonFiniteTensorError, OutputError, RefusedError
from tests.builders import (
    folder_bytes,
    layered_merge,
    lora_pair,
    random_tensor,
    read_all,
    shard_name,
    write_adapter,
    write_base,
)
from tests.kill_rounds import run_rounds

NAMES = [shard_name(number, 3) for number in (1, 2, 3)]
Paths = tuple[Path, Path]


class Stop(Exception):  # noqa: N818  # a caller's own signal
    """A caller's way to cancel."""


@pytest.fixture
def layered(tmp_path: Path) -> Paths:
    """Return a base of three shards, of which an adapter changes the first two."""
    return layered_merge(tmp_path)


@pytest.fixture
def golden(layered: Paths, tmp_path: Path) -> dict[str, bytes]:
    """Return the bytes of an uninterrupted merge."""
    rawmerge.merge_adapter(*layered, tmp_path / "golden")
    return folder_bytes(tmp_path / "golden")


def working(tmp_path: Path) -> Path:
    return tmp_path / "out.rawmerge-unfinished"


def left(base: Path) -> list[str]:
    return sorted(path.name for path in base.glob("*.safetensors"))


def cut_off(paths: Paths, output: Path, at: str = NAMES[1], **options: Any) -> BaseException:
    """Stop a merge while it makes a shard; return what was raised."""

    def stop(progress: rawmerge.Progress) -> None:
        if progress.shard_name == at:
            raise Stop

    with pytest.raises(Stop) as caught:
        rawmerge.merge_adapter(*paths, output, consume_base=True, progress=stop, **options)
    return caught.value


@pytest.mark.parametrize(("step", "kills"), [(9, 1), pytest.param(1, 200, marks=pytest.mark.slow)])
def test_killed_before_any_file_operation_the_next_run_ends_with_the_same_bytes(
    tmp_path: Path, step: int, kills: int
) -> None:
    layered_merge(tmp_path)
    found = run_rounds(tmp_path, "consume", step, kills)
    assert found["rounds"] > 40 / step
    assert found["resumed"] > 15 / step


def test_an_error_after_a_deletion_keeps_what_is_nowhere_else_and_says_so(
    layered: Paths, tmp_path: Path, golden: dict[str, bytes]
) -> None:
    error = cut_off(layered, tmp_path / "out")
    assert error.__notes__ == [
        f"1 shard is deleted from the base, and merged in '{working(tmp_path)}': run the same command again to go on"
    ]
    assert left(layered[0]) == NAMES[1:]
    staged = working(tmp_path) / "output" / NAMES[0]
    assert staged.read_bytes() == golden[NAMES[0]]
    assert not (tmp_path / "out").exists()

    seen: list[rawmerge.Progress] = []
    summary = rawmerge.merge_adapter(*layered, tmp_path / "out", consume_base=True, progress=seen.append)
    assert folder_bytes(tmp_path / "out") == golden
    assert (summary.consumed, summary.counts["updated"]) == (3, 2)
    assert seen[0].shard_name == NAMES[0]
    assert (left(layered[0]), working(tmp_path).exists()) == ([], False)


def test_a_saved_plan_goes_on_too(layered: Paths, tmp_path: Path, golden: dict[str, bytes]) -> None:
    plan = rawmerge.plan_merge(*layered)
    cut_off(layered, tmp_path / "out", at=NAMES[2])
    assert left(layered[0]) == NAMES[2:]
    rawmerge.run_plan(rawmerge.parse_plan(rawmerge.format_plan(plan)), tmp_path / "out", consume_base=True)
    assert folder_bytes(tmp_path / "out") == golden


def test_unchanged_tensors_of_finished_shards_are_told(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", [{f"{name}.weight": random_tensor((6, 5))} for name in "qkv"])
    none = {name: tensor * 0 for name, tensor in lora_pair("k", 6, 5).items()}
    paths = base, write_adapter(tmp_path / "adapter", lora_pair("q", 6, 5) | none | lora_pair("v", 6, 5))
    cut_off(paths, tmp_path / "out", at=NAMES[2])
    assert rawmerge.merge_adapter(*paths, tmp_path / "out", consume_base=True).unchanged == ("k.weight",)


def test_the_earlier_output_stands_until_the_new_one_takes_its_place(
    layered: Paths, tmp_path: Path, golden: dict[str, bytes]
) -> None:
    shutil.copytree(layered[0], tmp_path / "out")
    before = folder_bytes(tmp_path / "out")
    cut_off(layered, tmp_path / "out", overwrite=True)
    assert folder_bytes(tmp_path / "out") == before
    with pytest.raises(OutputError, match="nothing there yet"):
        rawmerge.merge_adapter(*layered, tmp_path / "out", consume_base=True)
    rawmerge.merge_adapter(*layered, tmp_path / "out", consume_base=True, overwrite=True)
    assert folder_bytes(tmp_path / "out") == golden


def test_a_merge_cut_off_after_publishing_only_cleans_up(
    layered: Paths, tmp_path: Path, golden: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_: object) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr("rawmerge.consuming.unfinished.UnfinishedFolder.remove", stop)
        with pytest.raises(Stop):
            rawmerge.merge_adapter(*layered, tmp_path / "out", consume_base=True)
    assert folder_bytes(tmp_path / "out") == golden
    assert working(tmp_path).exists()
    summary = rawmerge.merge_adapter(*layered, tmp_path / "out", consume_base=True)
    assert (summary.consumed, working(tmp_path).exists()) == (3, False)
    assert folder_bytes(tmp_path / "out") == golden


# --- what may not go on ---


def other_options(paths: Paths, output: Path) -> None:
    rawmerge.merge_adapter(*paths, output, consume_base=True, dtype="float32")


def other_adapter(paths: Paths, output: Path) -> None:
    shutil.copytree(paths[1], paths[1].with_name("adapter-2"))
    rawmerge.merge_adapter(paths[0], paths[1].with_name("adapter-2"), output, consume_base=True)


def other_base(paths: Paths, output: Path) -> None:
    rawmerge.merge_adapter(layered_merge(paths[0].parent / "other")[0], paths[1], output, consume_base=True)


def not_consuming(paths: Paths, output: Path) -> None:
    rawmerge.merge_adapter(*paths, output)


def not_consuming_another(paths: Paths, output: Path) -> None:
    rawmerge.run_plan(rawmerge.plan_merge(*layered_merge(paths[0].parent / "other")), output)


def test_each_option_and_input_that_differs_is_named_with_before_and_now(layered: Paths, tmp_path: Path) -> None:
    base, adapter = layered
    cut_off(layered, tmp_path / "out", dtype="float16")
    options = {"compute_dtype": "float64", "force": True}
    with pytest.raises(OutputError) as caught:
        rawmerge.merge_adapter(base, adapter, tmp_path / "out", consume_base=True, **options)  # type: ignore[arg-type]
    _, *named = caught.value.problems
    assert {(at.subject, at.expected.partition(",")[0], at.found) for at in named} == {
        ("--compute-dtype", "'float32'", "'float64'"),
        ("--dtype", "'float16'", "none"),
        ("--force", "not given", "given"),
    }
    shutil.copytree(adapter, tmp_path / "adapter-2")
    other = layered_merge(tmp_path / "other")[0]
    with pytest.raises(OutputError) as caught:
        rawmerge.merge_adapter(other, tmp_path / "adapter-2", tmp_path / "out", consume_base=True, dtype="float16")
    assert [(at.subject, at.found) for at in caught.value.problems[1:]] == [
        ("BASE", f"'{other}'"),
        ("ADAPTER", f"'{tmp_path / 'adapter-2'}'"),
    ]
    with pytest.raises(OutputError) as caught:
        rawmerge.merge_adapter(base, adapter, tmp_path / "out", dtype="float16")
    assert [(at.subject, at.found) for at in caught.value.problems[1:]] == [("--consume-base", "not given")]


def test_a_saved_plan_that_differs_is_told_by_its_parts(layered: Paths, tmp_path: Path) -> None:
    plan = rawmerge.plan_merge(*layered)
    cut_off(layered, tmp_path / "out")
    for other, names in (
        (replace(plan, options=replace(plan.options, tokenizer="adapter"), notes=("x",)), ["--tokenizer"]),
        (replace(plan, notes=("x",)), ["notes"]),
    ):
        with pytest.raises(OutputError) as caught:
            rawmerge.run_plan(other, tmp_path / "out", consume_base=True)
        assert [at.subject for at in caught.value.problems[1:]] == names


@pytest.mark.parametrize(
    "command",
    [other_options, other_adapter, other_base, not_consuming, not_consuming_another],
    ids=lambda it: it.__name__,
)
def test_another_merge_to_the_same_output_is_refused(
    layered: Paths, tmp_path: Path, golden: dict[str, bytes], command: Callable[[Paths, Path], None]
) -> None:
    cut_off(layered, tmp_path / "out")
    before = folder_bytes(working(tmp_path)), folder_bytes(layered[0])
    with pytest.raises(OutputError, match=r"no unfinished merge to this output.*\n.*the only copy of 1 shard deleted"):
        command(layered, tmp_path / "out")
    assert (folder_bytes(working(tmp_path)), folder_bytes(layered[0])) == before
    rawmerge.merge_adapter(*layered, tmp_path / "out", consume_base=True)
    assert folder_bytes(tmp_path / "out") == golden


def change_adapter(paths: Paths, _: Path, __: pytest.MonkeyPatch) -> None:
    write_adapter(paths[1], {name: tensor + 1 for name, tensor in read_all(paths[1]).items()})


def lose_base_shard(paths: Paths, _: Path, __: pytest.MonkeyPatch) -> None:
    (paths[0] / NAMES[2]).unlink()


def change_base_shard(paths: Paths, _: Path, __: pytest.MonkeyPatch) -> None:
    os.utime(paths[0] / NAMES[1], ns=(1, 1))


def cut_finished_shard(_: Paths, tmp_path: Path, __: pytest.MonkeyPatch) -> None:
    os.truncate(working(tmp_path) / "output" / NAMES[0], 100)


def lose_finished_shard(_: Paths, tmp_path: Path, __: pytest.MonkeyPatch) -> None:
    (working(tmp_path) / "output" / NAMES[0]).unlink()


def change_torch(_: Paths, __: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resumption, "installed_version", lambda _: "1.0")


SPOILS: list[tuple[Callable[[Paths, Path, pytest.MonkeyPatch], None], str]] = [
    (change_adapter, r"adapter_model.*expected the adapter that the merge began with"),
    (lose_base_shard, rf"{NAMES[2]}.*expected the base shard that the merge began with"),
    (change_base_shard, rf"{NAMES[1]}.*expected the base shard that the merge began with"),
    (cut_finished_shard, rf"{NAMES[0]}.*expected the shard as it was written"),
    (lose_finished_shard, rf"{NAMES[0]}.*expected the shard as it was written"),
    (change_torch, r"'torch': expected .*, as when the merge began, found 1\.0"),
]


@pytest.mark.parametrize(("spoil", "message"), SPOILS, ids=lambda it: getattr(it, "__name__", ""))
def test_inputs_that_changed_meanwhile_are_refused_and_nothing_is_touched(
    layered: Paths,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Paths, Path, pytest.MonkeyPatch], None],
    message: str,
) -> None:
    cut_off(layered, tmp_path / "out")
    spoil(layered, tmp_path, monkeypatch)
    before = folder_bytes(tmp_path)
    with pytest.raises(OutputError, match=message):
        rawmerge.merge_adapter(*layered, tmp_path / "out", consume_base=True)
    assert folder_bytes(tmp_path) == before


def test_all_that_changed_is_told_at_once(layered: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_off(layered, tmp_path / "out")
    for spoil in (change_adapter, lose_base_shard, cut_finished_shard, change_torch):
        spoil(layered, tmp_path, monkeypatch)
    with pytest.raises(OutputError) as caught:
        rawmerge.merge_adapter(*layered, tmp_path / "out", consume_base=True)
    assert len(caught.value.problems) == 4


def killed(paths: Paths, tmp_path: Path, at: str) -> None:
    """End a merge like SIGKILL while it makes a shard."""
    script = (
        "import os, sys, rawmerge\n"
        "base, adapter, output, at = sys.argv[1:]\n"
        "def stop(progress):\n"
        "    if progress.shard_name == at: os._exit(9)\n"
        "rawmerge.merge_adapter(base, adapter, output, consume_base=True, progress=stop)\n"
    )
    command = [sys.executable, "-c", script, *map(str, paths), str(tmp_path / "out"), at]
    assert subprocess.run(command, check=False).returncode == 9


def test_while_the_base_is_whole_changed_inputs_start_over(
    layered: Paths, tmp_path: Path, golden: dict[str, bytes]
) -> None:
    killed(layered, tmp_path, NAMES[0])
    assert left(layered[0]) == NAMES
    with pytest.raises(OutputError, match="the base is still whole"):
        rawmerge.merge_adapter(*layered, tmp_path / "out")
    change_adapter(layered, tmp_path, pytest.MonkeyPatch())
    rawmerge.merge_adapter(*layered, tmp_path / "golden", overwrite=True)
    rawmerge.merge_adapter(*layered, tmp_path / "out", consume_base=True)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "golden") != golden


def test_base_shards_that_were_fetched_again_are_left_alone(
    layered: Paths, tmp_path: Path, golden: dict[str, bytes]
) -> None:
    shutil.copytree(layered[0], tmp_path / "copy")
    cut_off(layered, tmp_path / "out")
    shutil.copy(tmp_path / "copy" / NAMES[0], layered[0] / NAMES[0])
    summary = rawmerge.merge_adapter(*layered, tmp_path / "out", consume_base=True)
    assert folder_bytes(tmp_path / "out") == golden
    assert left(layered[0]) == NAMES[:1]
    assert summary.consumed == 3


# --- the journal ---


def test_a_last_line_that_was_not_written_whole_does_not_count(
    layered: Paths, tmp_path: Path, golden: dict[str, bytes]
) -> None:
    cut_off(layered, tmp_path / "out", at=NAMES[2])
    journal = working(tmp_path) / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    finished = next(at for at, line in enumerate(lines) if b'"finished": "model-00002' in line)
    journal.write_bytes(b"".join(lines[:finished]) + lines[finished][:20])
    shutil.copy(layered[0] / NAMES[2], layered[0] / NAMES[1])  # it is gone by now, and refused: the line came first
    with pytest.raises(OutputError, match=NAMES[1]):
        rawmerge.merge_adapter(*layered, tmp_path / "out", consume_base=True)
    journal.write_bytes(b"".join(lines) + b'{"finished": "model-000')
    rawmerge.merge_adapter(*layered, tmp_path / "out", consume_base=True)
    assert folder_bytes(tmp_path / "out") == golden


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw.replace(b"rawmerge-journal-2", b"rawmerge-journal-9"),
        lambda raw: raw.replace(b'"plan": {', b'"plan": {"x": 1, ', 1),
        lambda raw: raw.replace(b'{"prepared"', b'{"praepared"'),
        lambda raw: b"[]\n" + raw,
        lambda raw: b"\n" + raw,
        lambda raw: b"\xff" + raw,
    ],
)
def test_a_damaged_journal_is_refused_and_kept(
    layered: Paths, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    cut_off(layered, tmp_path / "out")
    journal = working(tmp_path) / "journal.jsonl"
    journal.write_bytes(damage(journal.read_bytes()))
    before = folder_bytes(tmp_path)
    for consumes in (True, False):
        with pytest.raises(OutputError, match=r"journal\.jsonl.*the journal of an unfinished merge"):
            rawmerge.merge_adapter(*layered, tmp_path / "out", consume_base=consumes)
    assert folder_bytes(tmp_path) == before


def test_a_folder_of_that_name_with_other_work_is_refused(layered: Paths, tmp_path: Path) -> None:
    working(tmp_path).mkdir()
    (working(tmp_path) / "photos.txt").write_text("mine")
    with pytest.raises(OutputError, match="found other files"):
        rawmerge.merge_adapter(*layered, tmp_path / "out", consume_base=True)
    assert (working(tmp_path) / "photos.txt").read_text() == "mine"
    rawmerge.merge_adapter(*layered, tmp_path / "out")


def test_two_merges_to_one_output_are_kept_apart(layered: Paths, tmp_path: Path) -> None:
    working(tmp_path).mkdir()
    descriptor = os.open(working(tmp_path), os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(OutputError, match="another process is making"):
            rawmerge.merge_adapter(*layered, tmp_path / "out", consume_base=True)
    finally:
        os.close(descriptor)
    assert rawmerge.merge_adapter(*layered, tmp_path / "out", consume_base=True).consumed == 3


# --- errors that no plan can tell ---


def test_a_full_disk_later_keeps_everything_and_the_same_command_goes_on(
    layered: Paths, tmp_path: Path, golden: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    allocate = os.posix_fallocate

    def full(descriptor: int, offset: int, count: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink().name == NAMES[1]:
            raise OSError(28, os.strerror(28))
        allocate(descriptor, offset, count)

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(MergeError, match=r"device .allocating 416 bytes.; 1 shard is deleted from"):
            rawmerge.merge_adapter(*layered, tmp_path / "out", consume_base=True)
    rawmerge.merge_adapter(*layered, tmp_path / "out", consume_base=True)
    assert folder_bytes(tmp_path / "out") == golden


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_a_result_that_is_not_finite_says_what_is_gone(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", [{f"{name}.weight": random_tensor((6, 5), torch.float16)} for name in "qk"])
    huge = {name: tensor * 1000 for name, tensor in lora_pair("k", 6, 5).items()}
    adapter = write_adapter(tmp_path / "adapter", lora_pair("q", 6, 5) | huge)
    command = ("merge", base, adapter, "-o", tmp_path / "out", "--consume-base")
    for _ in range(2):
        result = invoke(*command)
        assert result.exit_code == 4
        assert "'k.weight': expected finite values" in result.stderr
        assert "1 shard is deleted from the base, and merged in" in result.stderr
        assert "the same command would fail again at the same tensor" in result.stderr
        assert "fetch the base again, remove that folder, and merge anew" in result.stderr
        assert "run the same command again" not in result.stderr
    document = json.loads(invoke(*command, "--json").stdout)
    assert document["problems"][0]["subject"] == "k.weight"
    assert "fetch the base again" in document["notes"][0]
    with pytest.raises(NonFiniteTensorError):
        rawmerge.merge_adapter(base, adapter, tmp_path / "out", consume_base=True)


def test_the_way_out_after_a_result_that_is_not_finite_is_one(tmp_path: Path) -> None:
    """What the notes advise works: nothing else does, and says so."""
    weights = [{f"{name}.weight": random_tensor((6, 5), torch.float16)} for name in "qk"]
    base = write_base(tmp_path / "base", weights)
    huge = {name: tensor * 1000 for name, tensor in lora_pair("k", 6, 5).items()}
    adapter = write_adapter(tmp_path / "adapter", lora_pair("q", 6, 5) | huge)
    with pytest.raises(NonFiniteTensorError):
        rawmerge.merge_adapter(base, adapter, tmp_path / "out", consume_base=True)
    refused = invoke("merge", base, adapter, "-o", tmp_path / "out", "--consume-base", "--dtype", "float32")
    assert refused.exit_code == 3
    assert "it cannot be finished, for 'k.weight' would fail again; fetch the base again" in refused.stderr
    assert "run its command again" not in refused.stderr
    write_base(base, weights)
    shutil.rmtree(working(tmp_path))
    assert rawmerge.merge_adapter(base, adapter, tmp_path / "out", dtype="float32").counts["updated"] == 2


def test_a_lack_of_memory_does_not_hide_what_is_gone(
    layered: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, golden: dict[str, bytes]
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("rawmerge.output.staging_directory.StagingDirectory.publish", fail)
        with pytest.raises(MergeError, match=r"3 shards are deleted from the base, and merged in .*: run the same"):
            rawmerge.merge_adapter(*layered, tmp_path / "out", consume_base=True)
    summary = rawmerge.merge_adapter(*layered, tmp_path / "out", consume_base=True)
    assert folder_bytes(tmp_path / "out") == golden
    assert summary.written_bytes < summary.byte_count
    assert summary.predicted_peak_bytes is None


def test_the_command_line_goes_on_and_a_dry_run_says_from_where(
    layered: Paths, tmp_path: Path, golden: dict[str, bytes]
) -> None:
    cut_off(layered, tmp_path / "out")
    command = ("merge", layered[0], layered[1] / "adapter_config.json", "-o", tmp_path / "out", "--consume-base")
    before = folder_bytes(tmp_path)
    dry = invoke(*command, "--dry-run")
    assert f"note: it goes on from '{working(tmp_path)}': 1 shard is finished" in dry.stderr
    assert f"{NAMES[0]} is deleted" not in dry.stderr
    assert f"{NAMES[1]} is deleted once {NAMES[1]} is written" in dry.stderr
    assert folder_bytes(tmp_path) == before
    assert invoke(*command).exit_code == 0
    assert folder_bytes(tmp_path / "out") == golden


def test_a_base_of_one_file_goes_on_when_it_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_base(tmp_path / "base", [{"q.weight": random_tensor((6, 5))}]) / "model.safetensors"
    adapter = write_adapter(tmp_path / "adapter", lora_pair("q", 6, 5))
    rawmerge.merge_adapter(base, adapter, tmp_path / "golden")

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("rawmerge.output.staging_directory.StagingDirectory.publish", fail)
        with pytest.raises(MergeError, match="1 shard is deleted"):
            rawmerge.merge_adapter(base, adapter, tmp_path / "out", consume_base=True)
    assert not base.exists()
    with pytest.raises(RefusedError):
        rawmerge.plan_merge(base, adapter)
    rawmerge.merge_adapter(base, adapter, tmp_path / "out", consume_base=True)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "golden")
