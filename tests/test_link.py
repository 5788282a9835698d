"""Shards that a merge leaves as they are: recognised from the plan, copied whole, or linked."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

import rawmerge
from rawmerge.cli import cli
from rawmerge.errors import OutputError
from rawmerge.inputs.hub_cache import is_in_hub_cache
from rawmerge.output.untouched_shards import untouched_shards
from tests.builders import (
    PREFIX,
    folder_bytes,
    layered_merge,
    lora_pair,
    random_tensor,
    shard_name,
    write_adapter,
    write_base,
)

LAST = shard_name(3, 3)


@pytest.fixture
def layered(tmp_path: Path) -> tuple[Path, Path]:
    """Return a base of three shards, of which an adapter changes the first two."""
    return layered_merge(tmp_path)


def test_a_shard_without_a_changed_tensor_is_untouched(layered: tuple[Path, Path]) -> None:
    plan = rawmerge.plan_merge(*layered)
    assert untouched_shards(plan) == {LAST: str(layered[0] / LAST)}


def test_what_differs_in_a_byte_is_not_untouched(layered: tuple[Path, Path]) -> None:
    plan = rawmerge.plan_merge(*layered)
    shard, files = plan.shards[2], plan.base_files
    first, second = shard.steps
    other_file = replace(second, source=replace(second.source, path=files[0].path))
    for changed in (
        replace(shard, header_text=shard.header_text.replace('"pt"', '"tp"')),
        replace(shard, header_text=shard.header_text + " "),
        replace(shard, steps=(replace(first, source=second.source), second)),
        replace(shard, steps=(first, other_file)),
        replace(shard, steps=(first,)),
        replace(shard, steps=()),
    ):
        assert untouched_shards(replace(plan, shards=(*plan.shards[:2], changed))) == {}
    longer = replace(files[2], byte_count=files[2].byte_count + 1)
    assert untouched_shards(replace(plan, base_files=(*files[:2], longer))) == {}


def test_a_cast_leaves_no_shard_untouched(layered: tuple[Path, Path]) -> None:
    assert untouched_shards(rawmerge.plan_merge(*layered, dtype="float32")) == {}


def test_linked_shards_are_the_base_s_files_and_all_bytes_are_those_of_a_copy(
    layered: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = layered
    copied = rawmerge.merge_adapter(base, adapter, tmp_path / "copied")
    linked = rawmerge.merge_adapter(base, adapter, tmp_path / "linked", link=True)
    assert (copied.linked, linked.linked) == (0, 1)
    assert folder_bytes(tmp_path / "linked") == folder_bytes(tmp_path / "copied")
    for path in base.glob("*.safetensors"):
        assert path.samefile(tmp_path / "linked" / path.name) == (path.name == LAST)
        assert not path.samefile(tmp_path / "copied" / path.name)
    shutil.rmtree(tmp_path / "linked")
    assert (base / LAST).stat().st_nlink == 1
    assert (base / LAST).read_bytes() == (tmp_path / "copied" / LAST).read_bytes()


def test_a_link_of_the_user_s_is_followed_to_the_file(layered: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = layered
    (tmp_path / "store").mkdir()
    (base / LAST).rename(tmp_path / "store/blob")
    (base / LAST).symlink_to(tmp_path / "store/blob")
    rawmerge.merge_adapter(base, adapter, tmp_path / "out", link=True)
    assert not (tmp_path / "out" / LAST).is_symlink()
    assert (tmp_path / "out" / LAST).samefile(tmp_path / "store/blob")


def cached_base(base: Path, root: Path) -> Path:
    """Lay a base out as the hub's cache does; return the snapshot's folder."""
    snapshot, blobs = root / "models--org--name/snapshots/abc", root / "models--org--name/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(base.iterdir())):
        shutil.copy(path, blobs / f"{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def test_the_hub_s_cache_is_never_linked_into(layered: tuple[Path, Path], tmp_path: Path) -> None:
    snapshot = cached_base(layered[0], tmp_path / "hub")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(OutputError, match=rf"{LAST}.*found one in the hub's cache"):
        rawmerge.merge_adapter(snapshot, layered[1], tmp_path / "out", link=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    summary = rawmerge.merge_adapter(snapshot, layered[1], tmp_path / "out")
    assert summary.linked == 0


def test_a_cache_is_seen_through_links_of_files_and_folders(layered: tuple[Path, Path], tmp_path: Path) -> None:
    snapshot = cached_base(layered[0], tmp_path / "hub")
    (tmp_path / "folder").symlink_to(snapshot)
    (tmp_path / "file").symlink_to(snapshot / LAST)
    (tmp_path / "second").symlink_to("file")
    # newer caches keep blobs in a store that several share: the last link leads out of the cache again
    blob = tmp_path / "hub/models--org--name/blobs/0"
    blob.rename(tmp_path / "shared")
    blob.symlink_to(tmp_path / "shared")
    through = next(path for path in snapshot.iterdir() if path.samefile(tmp_path / "shared"))
    for path in (snapshot / LAST, tmp_path / "folder" / LAST, tmp_path / "file", tmp_path / "second", through):
        assert is_in_hub_cache(path)
    assert not is_in_hub_cache(layered[0] / LAST)
    assert not is_in_hub_cache(tmp_path / "shared")


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="needs a second file system")
def test_another_file_system_is_refused_before_writing(layered: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = layered
    if Path("/dev/shm").stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system")
    output = Path("/dev/shm") / f"rawmerge-{os.getpid()}"
    with pytest.raises(OutputError, match="another file system than the output"):
        rawmerge.merge_adapter(base, adapter, output, link=True)
    assert not output.exists()


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP])
def test_what_cannot_be_linked_is_copied_and_told(
    layered: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    rawmerge.merge_adapter(*layered, tmp_path / "copied")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    summary = rawmerge.merge_adapter(*layered, tmp_path / "out", link=True)
    assert summary.linked == 0
    assert summary.notes == (f"'{layered[0] / LAST}' was copied, not linked: {os.strerror(code)}",)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "copied")


def test_all_problems_are_told_at_once(layered: tuple[Path, Path], tmp_path: Path) -> None:
    snapshot = cached_base(layered[0], tmp_path / "hub")
    (tmp_path / "out").mkdir()
    arguments = ["merge", str(snapshot), str(layered[1]), "-o", str(tmp_path / "out"), "--link", "--json"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 3
    found = [problem["found"] for problem in json.loads(result.stdout)["problems"]]
    assert found == ["a directory", "one in the hub's cache, which the output must not share"]


def test_a_merge_that_touches_every_shard_links_none_and_says_so(tmp_path: Path) -> None:
    base, adapter = layered_merge(tmp_path, layers=2)
    summary = rawmerge.merge_adapter(base, adapter, tmp_path / "out", link=True)
    assert summary.linked == 0
    assert summary.notes == ("nothing was linked: the merge leaves no shard of the base as it is",)


def test_progress_and_counts_hold_linked_shards(layered: tuple[Path, Path], tmp_path: Path) -> None:
    seen: list[rawmerge.Progress] = []
    summary = rawmerge.merge_adapter(*layered, tmp_path / "out", link=True, progress=seen.append)
    done = [at.done_bytes for at in seen]
    assert done == sorted(done)
    assert (seen[0].shard_name, done[-1]) == (LAST, seen[-1].total_bytes)
    assert summary.counts["kept"] == 4
    assert summary.byte_count == rawmerge.plan_merge(*layered).byte_count


def test_linked_shards_need_no_space(
    layered: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = layered
    save_file({"model.layers.2.big": torch.zeros(2**20)}, base / LAST)
    (base / "model.safetensors.index.json").unlink()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**21))
    with pytest.raises(OutputError, match="too little"):
        rawmerge.merge_adapter(base, adapter, tmp_path / "out")
    assert rawmerge.merge_adapter(base, adapter, tmp_path / "out", link=True).linked == 1


def test_a_single_file_and_a_base_with_an_added_tensor(tmp_path: Path) -> None:
    """The last shard takes what the base lacks, so it is not the base's any more."""
    base = write_base(tmp_path / "base", [{"q.weight": random_tensor((6, 5))}, {"n.weight": random_tensor((5,))}])
    head = {f"{PREFIX}score.weight": random_tensor((3, 5), torch.float32)}
    adapter = write_adapter(tmp_path / "adapter", lora_pair("q", 6, 5) | head, modules_to_save=["score"])
    assert untouched_shards(rawmerge.plan_merge(base, adapter)) == {}


def test_the_command_line_links_and_a_dry_run_says_what_would_be(layered: tuple[Path, Path], tmp_path: Path) -> None:
    arguments = ["merge", *map(str, layered), "-o", str(tmp_path / "out"), "--link"]
    dry = CliRunner().invoke(cli, [*arguments, "--dry-run"])
    assert f"note: {LAST} becomes a link to {layered[0] / LAST}" in dry.stderr
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(cli, arguments)
    assert ", 1 shard linked;" in done.stderr
    assert (tmp_path / "out" / LAST).samefile(layered[0] / LAST)
