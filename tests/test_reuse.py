"""Shards of an earlier output are taken over where the same inputs would make them again, and never else."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

import rawmerge
from rawmerge import shard_run
from rawmerge.cli import cli
from rawmerge.errors import NothingChangedError
from rawmerge.inputs.file_status import TICK_NS
from rawmerge.output import shard_identity
from rawmerge.output.earlier_output import read_made_shards
from rawmerge.output.shard_identity import ShardIdentities
from rawmerge.run_options import RunOptions
from tests.builders import (
    PREFIX,
    folder_bytes,
    layered_merge,
    lora_pair,
    random_tensor,
    read_all,
    shard_name,
    write_adapter,
    write_base,
)

FIRST, SECOND, LAST = (shard_name(number, 3) for number in (1, 2, 3))
Paths = tuple[Path, Path]


def age() -> None:
    """Wait until a write to what was just written would show in its times."""
    time.sleep(1.2 * TICK_NS / 1e9)


@pytest.fixture
def layered(tmp_path: Path) -> Paths:
    """Return a base of three shards, of which an adapter changes the first two."""
    paths = layered_merge(tmp_path)
    age()
    return paths


def merge_again(paths: Paths, output: Path, **options: Any) -> rawmerge.MergeSummary:
    """Merge over `output`; the bytes must be those of a merge elsewhere, which can reuse nothing."""
    summary = rawmerge.merge_adapter(*paths, output, overwrite=True, **options)
    fresh = output.with_name("fresh")
    rawmerge.merge_adapter(*paths, fresh, **options)
    assert folder_bytes(output) == folder_bytes(fresh)
    shutil.rmtree(fresh)
    return summary


def inodes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.glob("*.safetensors")}


def test_a_second_run_takes_all_shards_over(layered: Paths, tmp_path: Path) -> None:
    first = rawmerge.merge_adapter(*layered, tmp_path / "out")
    before = inodes(tmp_path / "out")
    for _ in range(2):  # what was taken over can be taken over again
        seen: list[rawmerge.Progress] = []
        summary = merge_again(layered, tmp_path / "out", progress=seen.append)
        assert (first.reused, summary.reused) == (0, 3)
        assert inodes(tmp_path / "out") == before
        small = first.byte_count - sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
        assert (first.written_bytes, summary.written_bytes) == (first.byte_count, small)
        assert (first.predicted_peak_bytes is None, summary.predicted_peak_bytes) == (False, None)
        same: dict[str, Any] = {"seconds": 0, "reused": 0, "written_bytes": 0, "predicted_peak_bytes": 0}
        assert replace(summary, **same) == replace(first, **same)
        assert seen[2].done_bytes == seen[2].total_bytes
    assert {path.stat().st_nlink for path in (tmp_path / "out").iterdir()} == {1}


def test_nothing_is_computed_when_all_is_taken_over(
    layered: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rawmerge.merge_adapter(*layered, tmp_path / "out")
    monkeypatch.setattr(shard_run, "Engine", None)
    assert rawmerge.merge_adapter(*layered, tmp_path / "out", overwrite=True).reused == 3


def test_the_command_line_tells_and_can_do_without(layered: Paths, tmp_path: Path) -> None:
    command = ["merge", *map(str, layered), "-o", str(tmp_path / "out"), "--overwrite"]
    assert CliRunner().invoke(cli, command).exit_code == 0
    dry = CliRunner().invoke(cli, [*command, "--dry-run"])
    assert dry.stderr.count("is taken from the output that is replaced") == 3
    assert ", 3 shards reused;" in CliRunner().invoke(cli, command).stderr
    assert "reused" not in CliRunner().invoke(cli, [*command, "--no-reuse"]).stderr


def test_an_output_made_without_reuse_can_be_taken_over_later(layered: Paths, tmp_path: Path) -> None:
    rawmerge.merge_adapter(*layered, tmp_path / "out", reuse=False)
    assert rawmerge.merge_adapter(*layered, tmp_path / "out", overwrite=True, reuse=False).reused == 0
    assert merge_again(layered, tmp_path / "out").reused == 3


def test_only_the_shards_of_a_changed_adapter_tensor_are_made_anew(layered: Paths, tmp_path: Path) -> None:
    base, adapter = layered
    rawmerge.merge_adapter(base, adapter, tmp_path / "out")
    before = inodes(tmp_path / "out")
    factors = read_all(adapter)
    factors[f"{PREFIX}model.layers.1.q_proj.lora_B.weight"][0, 0] += 1
    write_adapter(adapter, factors)
    assert merge_again(layered, tmp_path / "out").reused == 2
    changed = {name for name, inode in inodes(tmp_path / "out").items() if before[name] != inode}
    assert changed == {SECOND}


def edit_in_place(path: Path) -> None:
    """Change the last byte, and put the times back that a program can put back."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replaced_by_a_copy(path: Path) -> None:
    shutil.copy2(path, path.with_suffix(".copy"))
    path.with_suffix(".copy").replace(path)


def named_twice(path: Path) -> None:
    path.with_suffix(".twin").hardlink_to(path)


def made_a_link(path: Path) -> None:
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved").name)


def mode_changed(path: Path) -> None:
    path.chmod(0o600)


@pytest.mark.parametrize(
    "touch", [edit_in_place, replaced_by_a_copy, named_twice, made_a_link, mode_changed, Path.unlink]
)
def test_a_shard_of_the_output_that_was_touched_is_made_anew(
    layered: Paths, tmp_path: Path, touch: Callable[[Path], None]
) -> None:
    rawmerge.merge_adapter(*layered, tmp_path / "out")
    touch(tmp_path / "out" / SECOND)
    assert merge_again(layered, tmp_path / "out").reused == 2
    assert merge_again(layered, tmp_path / "out").reused == 3


def test_a_base_shard_that_was_touched_is_read_again(layered: Paths, tmp_path: Path) -> None:
    rawmerge.merge_adapter(*layered, tmp_path / "out")
    edit_in_place(layered[0] / LAST)
    age()
    assert merge_again(layered, tmp_path / "out").reused == 2
    assert merge_again(layered, tmp_path / "out").reused == 3


def test_a_base_written_this_very_moment_is_not_relied_on(tmp_path: Path) -> None:
    """A second write within a tick of the first leaves times and size as they were."""
    paths = layered_merge(tmp_path)
    for path in (*paths[0].iterdir(), *paths[1].iterdir()):
        os.utime(path)
    identities = ShardIdentities(rawmerge.plan_merge(*paths), RunOptions())
    assert identities.changed_files() == {file.path for file in identities._plan.base_files} | {
        str(paths[1] / "adapter_model.safetensors")
    }


def test_inputs_that_change_during_the_merge_are_not_remembered(layered: Paths, tmp_path: Path) -> None:
    def edit(at: rawmerge.Progress) -> None:
        if at.done_bytes == at.total_bytes:
            edit_in_place(layered[0] / LAST)

    rawmerge.merge_adapter(*layered, tmp_path / "out", progress=edit)
    age()
    assert merge_again(layered, tmp_path / "out").reused == 2


@pytest.mark.parametrize(
    "options",
    [{"compute_dtype": "float64"}, {"dtype": "float32"}, {"without": ["kernel"]}, {"reuse": False}, {"force": True}],
)
def test_other_options_make_all_shards_anew(layered: Paths, tmp_path: Path, options: dict[str, Any]) -> None:
    rawmerge.merge_adapter(*layered, tmp_path / "out")
    assert merge_again(layered, tmp_path / "out", **options).reused == 0


@pytest.mark.parametrize("options", [{"threads": 1}, {"without": ["reflink"], "threads": 3}])
def test_the_number_of_threads_does_not_count(layered: Paths, tmp_path: Path, options: dict[str, Any]) -> None:
    rawmerge.merge_adapter(*layered, tmp_path / "out", **{**options, "threads": 2})
    assert merge_again(layered, tmp_path / "out", **options).reused == 3


def test_another_version_of_torch_or_of_the_code_makes_all_anew(
    layered: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rawmerge.merge_adapter(*layered, tmp_path / "out")
    for name, other in (("installed_version", lambda _: "0"), ("_code_digest", lambda: "0"), ("__version__", "0")):
        with monkeypatch.context() as patch:
            patch.setattr(shard_identity, name, other)
            assert merge_again(layered, tmp_path / "out").reused == 0
        assert merge_again(layered, tmp_path / "out").reused == 0
        assert merge_again(layered, tmp_path / "out").reused == 3
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    assert merge_again(layered, tmp_path / "out").reused == 0


def test_an_output_of_another_base_or_place_is_not_taken(layered: Paths, tmp_path: Path) -> None:
    rawmerge.merge_adapter(*layered, tmp_path / "out")
    shutil.copytree(layered[0], tmp_path / "base-2")
    age()
    assert merge_again((tmp_path / "base-2", layered[1]), tmp_path / "out").reused == 0
    shutil.copytree(tmp_path / "out", tmp_path / "out-2")
    assert merge_again(layered, tmp_path / "out-2").reused == 0


def test_an_output_is_known_by_any_of_its_paths(
    layered: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rawmerge.merge_adapter(*layered, tmp_path / "out")
    monkeypatch.chdir(tmp_path / "base")
    assert rawmerge.merge_adapter(*layered, "../out", overwrite=True).reused == 3


def test_a_memory_that_is_damaged_or_cannot_be_kept_is_no_error(
    layered: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rawmerge.merge_adapter(*layered, tmp_path / "out")
    (memory,) = (tmp_path / "cache/rawmerge/outputs").iterdir()
    text = memory.read_text()
    for damaged in ("", "{}", "[]", text[:-40], text.replace('"status": [', '"status": ["x", '), text * 2, "\xff"):
        memory.write_text(damaged, encoding="latin-1")
        assert read_made_shards(tmp_path / "out") == {}
        assert merge_again(layered, tmp_path / "out").reused == 0
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("a file in the way")
    assert merge_again(layered, tmp_path / "out").reused == 0


def test_without_a_home_nothing_is_remembered(layered: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where there is none
    monkeypatch.chdir(tmp_path)
    rawmerge.merge_adapter(*layered, tmp_path / "out")
    assert merge_again(layered, tmp_path / "out").reused == 0
    assert not list(tmp_path.rglob("outputs"))


def test_a_file_system_without_links_makes_all_anew(
    layered: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(1, "no links here")

    rawmerge.merge_adapter(*layered, tmp_path / "out")
    monkeypatch.setattr(os, "link", refuse)
    assert merge_again(layered, tmp_path / "out").reused == 0


def test_links_to_the_base_are_not_taken_for_shards_of_the_output(layered: Paths, tmp_path: Path) -> None:
    rawmerge.merge_adapter(*layered, tmp_path / "out", link=True)
    age()
    summary = merge_again(layered, tmp_path / "out")
    assert (summary.linked, summary.reused) == (0, 2)
    assert not (tmp_path / "out" / LAST).samefile(layered[0] / LAST)
    summary = rawmerge.merge_adapter(*layered, tmp_path / "out", overwrite=True, link=True)
    assert (summary.linked, summary.reused) == (1, 2)


def test_unchanged_tensors_of_shards_taken_over_are_told_again(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", [{"q.weight": random_tensor((6, 5))}, {"k.weight": random_tensor((6, 4))}])
    none = {name: tensor * 0 for name, tensor in lora_pair("k", 6, 4).items()}
    paths = base, write_adapter(tmp_path / "adapter", lora_pair("q", 6, 5) | none)
    age()
    first = rawmerge.merge_adapter(*paths, tmp_path / "out")
    again = merge_again(paths, tmp_path / "out")
    assert (again.reused, again.unchanged, first.unchanged) == (2, ("k.weight",), ("k.weight",))


def test_a_merge_that_changes_nothing_is_still_an_error_and_the_output_stays(layered: Paths, tmp_path: Path) -> None:
    base, adapter = layered
    rawmerge.merge_adapter(base, adapter, tmp_path / "out")
    before = folder_bytes(tmp_path / "out")
    write_adapter(adapter, {name: tensor * 0 for name, tensor in read_all(adapter).items()})
    with pytest.raises(NothingChangedError):
        rawmerge.merge_adapter(base, adapter, tmp_path / "out", overwrite=True)
    assert folder_bytes(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"]


def test_a_replaced_tensor_of_the_adapter_counts_by_its_values(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", [{"q.weight": random_tensor((6, 5))}, {"norm.weight": random_tensor((5,))}])

    def trained(value: float) -> Path:
        tensors = lora_pair("q", 6, 5) | {f"{PREFIX}norm.weight": torch.full((5,), value)}
        return write_adapter(tmp_path / "adapter", tensors, modules_to_save=["norm"])

    paths = base, trained(1.5)
    age()
    rawmerge.merge_adapter(*paths, tmp_path / "out")
    trained(2.5)
    age()
    assert merge_again(paths, tmp_path / "out").reused == 1
    assert merge_again(paths, tmp_path / "out").reused == 2


def test_shards_taken_over_need_no_space(layered: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = layered
    save_file({"model.layers.2.big": torch.zeros(2**20)}, base / LAST)
    (base / "model.safetensors.index.json").unlink()
    age()
    rawmerge.merge_adapter(base, adapter, tmp_path / "out")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**21))
    assert rawmerge.merge_adapter(base, adapter, tmp_path / "out", overwrite=True).reused == 3


def test_a_cancelled_merge_leaves_the_earlier_output_as_it_was(layered: Paths, tmp_path: Path) -> None:
    def stop(_: rawmerge.Progress) -> None:
        raise KeyboardInterrupt

    rawmerge.merge_adapter(*layered, tmp_path / "out")
    before = folder_bytes(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        rawmerge.merge_adapter(*layered, tmp_path / "out", overwrite=True, progress=stop)
    assert folder_bytes(tmp_path / "out") == before
