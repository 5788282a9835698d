"""Calls that move fewer bytes than asked, and inputs that end early while they are read."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors import safe_open

import rawmerge
from rawmerge.engine.anonymous_memory import PAGE_BYTES
from rawmerge.engine.shard_writer import OutputFile
from rawmerge.errors import InputChangedError
from rawmerge.inputs.tensor_source import OpenFiles
from tests.builders import ALPHA, RANK, folder_bytes, lora_pair, merged, random_tensor, write_adapter, write_base

Paths = tuple[Path, Path]
PREFIX = "base_model.model."
ROWS, COLUMNS = 100, 333
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def paged(tmp_path: Path) -> Paths:
    """Return a base of many pages, no tensor of which begins or ends with one, and an adapter on two of its tensors."""
    shards = [
        {
            f"{name}.kept.weight": random_tensor((ROWS, COLUMNS), seed=seed),
            f"{name}.q_proj.weight": random_tensor((ROWS, COLUMNS), seed=seed + 1),
            f"{name}.norm.weight": random_tensor((77,), seed=seed),
        }
        for seed, name in enumerate("ab")
    ]
    pairs = lora_pair("a.q_proj", ROWS, COLUMNS) | lora_pair("b.q_proj", ROWS, COLUMNS, seed=1)
    return write_base(tmp_path / "base", shards), write_adapter(tmp_path / "adapter", pairs)


class ShortCalls:
    """Lets reads and writes move any number of bytes from 1 to what was asked, seldom all; from any thread."""

    def __init__(self, patch: pytest.MonkeyPatch, seed: int) -> None:
        self.short = dict.fromkeys(("pwrite", "pread", "preadv"), 0)
        self._random, self._lock = Random(seed), threading.Lock()
        self._pwrite, self._pread, self._preadv = os.pwrite, os.pread, os.preadv
        for name in self.short:
            patch.setattr(os, name, getattr(self, name))

    def pwrite(self, descriptor: int, data: Any, offset: int) -> int:
        """Write the first part; a direct write of an odd length, which only the system can do, goes by another way."""
        view = memoryview(data).cast("B")[: self._count("pwrite", len(data))]
        if not fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            return self._pwrite(descriptor, view, offset)
        cached = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY)
        try:
            return self._pwrite(cached, view, offset)
        finally:
            os.close(cached)

    def pread(self, descriptor: int, count: int, offset: int) -> bytes:
        return self._pread(descriptor, self._count("pread", count), offset)

    def preadv(self, descriptor: int, buffers: Any, offset: int) -> int:
        (buffer,) = buffers
        return self._preadv(descriptor, [buffer[: self._count("preadv", len(buffer))]], offset)

    def _count(self, name: str, most: int) -> int:
        with self._lock:
            count = min(most, max(1, int(most ** self._random.random() * 2)))
            self.short[name] += count < most
        return count


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="Linux only")
@pytest.mark.parametrize(
    "options",
    [
        {"threads": 1},
        {"threads": 2, "without": ["kernel"]},
        {"threads": 2, "without": ["direct-io", "preallocation"]},
        {"verify": True, "checksum": True},
        {"consume_base": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 12))])
def test_calls_that_move_fewer_bytes_change_no_bit(
    paged: Paths, tmp_path: Path, options: dict[str, Any], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone: dict[str, Any] = {"checksum": True} if "checksum" in options else {}
    rawmerge.merge_adapter(*paged, tmp_path / "golden", **alone)
    with monkeypatch.context() as patch:
        calls = ShortCalls(patch, seed)
        rawmerge.merge_adapter(*paged, tmp_path / "out", **options)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "golden")
    assert min(calls.short.values()) > 3, calls.short


def test_what_short_calls_give_is_what_torch_gives(
    paged: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with safe_open(paged[0] / SHARDS[0], "pt") as file:
        weight, kept = file.get_tensor("a.q_proj.weight"), file.get_tensor("a.kept.weight")
    with safe_open(paged[1] / "adapter_model.safetensors", "pt") as file:
        pair = [file.get_tensor(f"{PREFIX}a.q_proj.lora_{part}.weight") for part in "AB"]
    with monkeypatch.context() as patch:
        ShortCalls(patch, 0)
        rawmerge.merge_adapter(*paged, tmp_path / "out")
    with safe_open(tmp_path / "out" / SHARDS[0], "pt") as file:
        assert torch.equal(file.get_tensor("a.q_proj.weight"), merged(weight, pair[0], pair[1], ALPHA / RANK))
        assert torch.equal(file.get_tensor("a.kept.weight"), kept)


def test_a_write_that_takes_nothing_is_an_error_that_names_the_byte(
    paged: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    with pytest.raises(rawmerge.MergeError, match=r"(model|config|token).*no byte and gave no reason.*at byte \d+"):
        rawmerge.merge_adapter(*paged, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@contextmanager
def cut_at(number: int, path: Path, size: int) -> Iterator[Callable[[], bool]]:
    """Let a file end early from the read of that number on, counting those of mapped pages; give whether it came."""
    left, lock, has_come = number, threading.Lock(), False

    def before(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            nonlocal left, has_come
            with lock:
                left -= 1
                if left == 0:
                    has_come = True
                    os.truncate(path, size)
            return call(*arguments)

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", before(os.preadv))
        patch.setattr(os, "pwrite", before(os.pwrite))
        yield lambda: has_come


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", [*(f"base/{shard}" for shard in SHARDS), "adapter/adapter_model.safetensors"])
def test_an_input_that_ends_early_is_named_or_was_read_before(
    paged: Paths, tmp_path: Path, name: str, threads: int
) -> None:
    rawmerge.merge_adapter(*paged, tmp_path / "golden")
    golden = folder_bytes(tmp_path / "golden")
    path = tmp_path / name
    whole, failed = path.read_bytes(), 0
    for number in range(1, 100, 3):
        for size in (len(whole) - 1, len(whole) // 2):
            output = tmp_path / f"out-{number}-{size}"
            with cut_at(number, path, size) as has_come:
                try:
                    rawmerge.merge_adapter(*paged, output, threads=threads, reuse=False)
                except rawmerge.MergeError as error:
                    failed += 1
                    assert path.name in str(error)  # noqa: PT017  # or it was read before
                    assert error.exit_code == 4  # noqa: PT017
                    assert not output.exists()
                else:
                    assert folder_bytes(output) == golden
            path.write_bytes(whole)
        if not has_come():
            break
    assert failed > 2  # how many come before the read depends on the threads; each is judged above


@pytest.mark.parametrize("missing", [1, 100, PAGE_BYTES - 1])
def test_a_page_that_is_cut_short_while_it_is_mapped_is_no_page_of_zeros(
    tmp_path: Path, missing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of the file lies in the last page, all of which a map shows."""
    source, pwrite, size = tmp_path / "source", os.pwrite, 4 * PAGE_BYTES
    source.write_bytes(Random(0).randbytes(size))

    def cut_first(descriptor: int, data: memoryview, at: int) -> int:
        os.truncate(source, size - missing)
        return pwrite(descriptor, data, at)

    with OpenFiles() as files, OutputFile(tmp_path / "out", size, is_direct=True) as file:
        if file._direct < 0:
            pytest.skip("no direct writes on this file system")
        files.descriptor(str(source))
        monkeypatch.setattr(os, "pwrite", cut_first)
        with pytest.raises(InputChangedError, match=r"source.*changed while it was read"):
            file.copy_from(files, str(source), 0, 0, size)


def test_a_shard_that_becomes_shorter_before_it_is_cloned_is_an_error(
    paged: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clone of a shorter file leaves the longer one that was allocated its end, of zeros."""
    victim, pwrite = paged[0] / SHARDS[1], os.pwrite

    def clone(target: int, _: int, source: int) -> None:
        if os.path.samestat(os.fstat(source), victim.stat()):
            os.truncate(victim, victim.stat().st_size - 20)
        pwrite(target, os.pread(source, 2**30, 0), 0)

    monkeypatch.setattr(fcntl, "ioctl", clone)
    with pytest.raises(InputChangedError, match=r"model-00002.*changed while it was read"):
        rawmerge.merge_adapter(*paged, tmp_path / "out", without=["kernel"])
    assert not (tmp_path / "out").exists()
