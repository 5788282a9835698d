"""The hub's cache is read through its links, and never written: not into, not through, not away."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import rawmerge
from rawmerge.cli import cli
from rawmerge.errors import OutputError
from rawmerge.inputs.file_status import TICK_NS
from rawmerge.inputs.hub_cache import is_in_hub_cache
from tests.builders import folder_bytes, layered_merge, shard_name

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CHANGED, UNCHANGED = shard_name(1, 3), shard_name(3, 3)
#: Of every entry of a tree: its number, content or link, mode, count of names, and time of the last write.
Entries = dict[str, tuple[int, str, int, int, int]]


def to_cache(files: Path, root: Path) -> Path:
    """Lay a folder out as huggingface_hub 1.x does; return the repo's folder."""
    repo = root / "models--org--name"
    snapshot, blobs = repo / "snapshots" / COMMIT, repo / "blobs"
    blobs.mkdir(parents=True)
    for path in sorted(path for path in files.rglob("*") if path.is_file()):
        blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copyfile(path, blob)
        link = snapshot / path.relative_to(files)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(COMMIT)
    return repo


def entries(root: Path) -> Entries:
    found: Entries = {}
    for path in [root, *sorted(root.rglob("*"))]:
        status = path.lstat()
        content = str(path.readlink()) if path.is_symlink() else path.read_bytes().hex() if path.is_file() else ""
        found[str(path)] = (status.st_ino, content, status.st_mode, status.st_nlink, status.st_mtime_ns)
    return found


@pytest.fixture
def merge(tmp_path: Path) -> tuple[Path, Path]:
    """Return a base with a nested side file, and an adapter on two of its three shards."""
    base, adapter = layered_merge(tmp_path / "plain")
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling/config.json").write_text('{"dim": 8}')
    return base, adapter


@pytest.fixture
def repo(merge: tuple[Path, Path], tmp_path: Path) -> Iterator[Path]:
    """Return the base's repo in a cache; nothing in that cache may have changed when the test is over."""
    repo = to_cache(merge[0], tmp_path / "hub")
    before = entries(tmp_path / "hub")
    yield repo
    assert entries(tmp_path / "hub") == before


def snapshot(repo: Path) -> Path:
    return repo / "snapshots" / COMMIT


@pytest.mark.parametrize("without", [[], ["reflink", "direct-io"]], ids=["fast", "plain"])
def test_a_merge_from_the_cache_has_files_of_its_own(
    merge: tuple[Path, Path], repo: Path, tmp_path: Path, without: list[str]
) -> None:
    rawmerge.merge_adapter(*merge, tmp_path / "expected", card=False)  # a card would know the hub id of one of them
    choices = {"checksum": True, "verify": True, "without": without}
    rawmerge.merge_adapter(snapshot(repo), merge[1], tmp_path / "out", card=False, **choices)  # type: ignore[arg-type]
    made = folder_bytes(tmp_path / "out")
    del made["SHA256SUMS"]
    assert made == folder_bytes(tmp_path / "expected")
    blobs = {path.stat().st_ino for path in (repo / "blobs").iterdir()}
    for path in (tmp_path / "out").rglob("*"):
        assert not path.is_symlink()
        assert path.stat().st_ino not in blobs


def places(repo: Path) -> dict[str, Path]:
    return {
        "in the snapshot": snapshot(repo) / "out",
        "a folder in the snapshot": snapshot(repo) / "1_Pooling",
        "the snapshot": snapshot(repo),
        "another snapshot": repo / "snapshots" / ("f" * 40),
        "all snapshots": repo / "snapshots",
        "in the blobs": repo / "blobs/out",
        "the blobs": repo / "blobs",
        "in the refs": repo / "refs/out",
        "in the repo": repo / "out/deep",
        "the repo": repo,
    }


PLACES = list(places(Path()))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]], ids=["", "overwrite"])
def test_an_output_in_the_cache_is_refused(
    merge: tuple[Path, Path], repo: Path, place: str, overwrite: list[str]
) -> None:
    output = places(repo)[place]
    # the base lies elsewhere: it is the cache that is spared, not the base
    arguments = ["merge", *map(str, merge), "-o", str(output), *overwrite, "--json"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 3
    told = json.loads(result.stdout)["problems"]
    assert "an output apart from the hub's cache" in [problem["expected"] for problem in told]


@pytest.mark.parametrize("place", [*PLACES, "the cache"])
def test_an_output_in_or_around_the_base_s_own_cache_is_refused(
    merge: tuple[Path, Path], repo: Path, place: str
) -> None:
    output = {**places(repo), "the cache": repo.parent}[place]
    with pytest.raises(OutputError, match=r"an output apart from|a checkpoint to overwrite"):
        rawmerge.merge_adapter(snapshot(repo), merge[1], output, overwrite=True)


@pytest.mark.parametrize("place", PLACES)
def test_an_output_whose_folder_is_a_link_into_the_cache_is_refused(
    merge: tuple[Path, Path], repo: Path, tmp_path: Path, place: str
) -> None:
    (tmp_path / "mine").mkdir()
    target = places(repo)[place]
    (tmp_path / "mine/link").symlink_to(target if target.exists() else target.parent)
    with pytest.raises(OutputError, match="an output apart from the hub's cache"):
        rawmerge.merge_adapter(*merge, tmp_path / "mine/link/out")


@pytest.mark.parametrize("place", PLACES)
def test_an_output_that_is_a_link_into_the_cache_is_refused(
    merge: tuple[Path, Path], repo: Path, tmp_path: Path, place: str
) -> None:
    (tmp_path / "out").symlink_to(places(repo)[place])
    with pytest.raises(OutputError, match="an output apart from the hub's cache"):
        rawmerge.merge_adapter(*merge, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").is_symlink()


def test_an_output_through_a_link_into_the_base_is_refused(merge: tuple[Path, Path], tmp_path: Path) -> None:
    before = entries(tmp_path)
    (tmp_path / "link").symlink_to(merge[0] / "1_Pooling")
    for output in (tmp_path / "link/out", tmp_path / "link/../out", merge[1] / "../base/out"):
        with pytest.raises(OutputError, match="an output apart from the base"):
            rawmerge.merge_adapter(*merge, output, overwrite=True)
    (tmp_path / "link").unlink()
    after = entries(tmp_path)
    del before[str(tmp_path)], after[str(tmp_path)]  # the link came and went
    assert after == before


@pytest.mark.parametrize("kind", ["datasets--org--name", "spaces--org--name"])
def test_a_cache_holds_other_repos_too(merge: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    (tmp_path / kind / "blobs").mkdir(parents=True)
    with pytest.raises(OutputError, match="an output apart from the hub's cache"):
        rawmerge.merge_adapter(*merge, tmp_path / kind / "out")


def test_a_folder_that_only_has_a_repo_s_name_is_the_user_s_own(merge: tuple[Path, Path], tmp_path: Path) -> None:
    flat = tmp_path / "models--org--name"
    shutil.copytree(merge[0], flat)
    output = tmp_path / "models--org--name-merged"
    assert rawmerge.merge_adapter(flat, merge[1], output, link=True).linked == 1
    assert (output / UNCHANGED).samefile(flat / UNCHANGED)
    assert not is_in_hub_cache(flat)


@pytest.mark.parametrize("option", ["--link", "--consume-base"])
@pytest.mark.parametrize("form", ["snapshot", "link to it", "links to its files"])
def test_blobs_are_neither_linked_to_nor_consumed(
    merge: tuple[Path, Path], repo: Path, tmp_path: Path, option: str, form: str
) -> None:
    base = snapshot(repo)
    if form == "link to it":
        base = tmp_path / "link"
        base.symlink_to(snapshot(repo))
    if form == "links to its files":
        base = tmp_path / "links"
        base.mkdir()
        for path in snapshot(repo).iterdir():
            (base / path.name).symlink_to(path)
    result = CliRunner().invoke(cli, ["merge", str(base), str(merge[1]), "-o", str(tmp_path / "out"), option])
    assert result.exit_code == 3
    assert "found one in the hub's cache, which " in result.stderr
    assert not (tmp_path / "out").exists()


def links_to_blobs(repo: Path, output: Path) -> None:
    """Put links to the cache's blobs, symbolic and hard, at names that a merge writes."""
    for path in sorted(path for path in snapshot(repo).rglob("*") if path.is_file()):
        at = output / path.relative_to(snapshot(repo))
        at.parent.mkdir(parents=True, exist_ok=True)
        at.symlink_to(path)
    for name in ("SHA256SUMS", "rawmerge.json", "extra.txt"):
        (output / name).symlink_to(next((repo / "blobs").iterdir()))


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("choice", ["plain", "checksum", "verify", "link", "consume_base"])
def test_links_to_blobs_in_an_output_that_is_replaced_are_not_written_through(
    merge: tuple[Path, Path],
    repo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    choice: str,
    exchanges: bool,
) -> None:
    if not exchanges:
        monkeypatch.setattr("rawmerge.output.staging_directory.exchange", lambda *_: False)
    rawmerge.merge_adapter(*merge, tmp_path / "expected")
    links_to_blobs(repo, tmp_path / "out")
    choices: Any = {choice: True} if choice != "plain" else {}
    rawmerge.merge_adapter(*merge, tmp_path / "out", overwrite=True, **choices)
    made = folder_bytes(tmp_path / "out")
    made.pop("SHA256SUMS", None)
    assert made == folder_bytes(tmp_path / "expected")
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


@pytest.mark.parametrize("kind", ["symbolic", "hard"])
def test_a_shard_that_became_a_link_to_a_blob_is_made_anew(
    merge: tuple[Path, Path], repo: Path, tmp_path: Path, kind: str
) -> None:
    """A merge that replaces an output takes over shards that it made before, but none that is a link by now."""
    time.sleep(1.2 * TICK_NS / 1e9)  # inputs this young are not trusted to be as they were
    rawmerge.merge_adapter(*merge, tmp_path / "out")
    before = folder_bytes(tmp_path / "out")
    kept = (tmp_path / "out" / UNCHANGED).stat().st_ino
    for name in (CHANGED, shard_name(2, 3)):
        (tmp_path / "out" / name).unlink()
        put_link(kind, (snapshot(repo) / name).resolve(), tmp_path / "out" / name)
    summary = rawmerge.merge_adapter(*merge, tmp_path / "out", overwrite=True)
    assert summary.reused == 1
    assert folder_bytes(tmp_path / "out") == before
    assert (tmp_path / "out" / UNCHANGED).stat().st_ino == kept
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def put_link(kind: str, target: Path, at: Path) -> None:
    if kind == "symbolic":
        at.symlink_to(target)
        return
    try:
        at.hardlink_to(target)
    except PermissionError:
        pytest.skip("this file system, or this kernel, allows no hard links")
