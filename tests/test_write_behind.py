"""Pages behind the work where memory is limited: few wait for the disk, and none stays."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from rawmerge.engine.shard_writer import OutputFile
from rawmerge.engine.write_behind import WriteBehind
from rawmerge.inputs.tensor_source import OpenFiles, TensorSource
from tests.builders import PREFIX, write_adapter, write_base
from tests.page_cache import can_give_up_pages, resident_bytes

MEBIBYTE = 2**20


class SlowDisk:
    """A file that counts what waits for the disk."""

    def __init__(self) -> None:
        self.dirty = self.highest = self.flushes = 0
        self.lock = threading.Lock()

    def write(self, behind: WriteBehind, byte_count: int) -> None:
        with self.lock:
            self.dirty += byte_count
            self.highest = max(self.highest, self.dirty)
        behind.wrote(self, byte_count)  # type: ignore[arg-type]  # all that it uses is flush

    def flush(self) -> None:
        with self.lock:
            before = self.dirty
        time.sleep(0.002)
        with self.lock:
            self.dirty -= before
            self.flushes += 1


@pytest.mark.parametrize("threads", [1, 4])
def test_no_more_than_two_windows_wait_for_the_disk(threads: int) -> None:
    behind, disk = WriteBehind(100), SlowDisk()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda _: disk.write(behind, 10), range(400)))
    assert disk.highest <= 2 * 100 + threads * 10
    assert 400 * 10 / 200 - 1 <= disk.flushes <= 400 * 10 / 100


def test_without_a_window_nobody_waits() -> None:
    behind, disk = WriteBehind(0), SlowDisk()
    disk.write(behind, 10**9)
    assert (disk.flushes, behind.is_on) == (0, False)


def test_a_file_that_is_finished_is_left_alone(tmp_path: Path) -> None:
    behind = WriteBehind(100)
    with OutputFile(tmp_path / "a", 80) as first, OutputFile(tmp_path / "b", 80) as second:
        first.write_at(0, memoryview(bytes(80)))
        behind.wrote(first, 80)
        first.finish()
        behind.wrote(second, 80)  # flushes both


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Return a folder on a disk that is not all memory."""
    if not can_give_up_pages(tmp_path):
        pytest.skip("the file system keeps its pages, or the system does not tell them")
    return tmp_path


def test_what_was_written_and_read_is_given_up(disk: Path) -> None:
    size, path = 4 * MEBIBYTE, disk / "source"
    path.write_bytes(b"\1" * size)
    behind = WriteBehind(size)
    with OpenFiles() as files, OutputFile(disk / "target", size) as file:
        file.copy_from(files, str(path), 0, 0, size)
        behind.wrote(file, size)
        assert resident_bytes(disk / "target") == 0
        with path.open("rb") as dirty:
            os.fsync(dirty.fileno())
        source = TensorSource(str(path), 0, size, "U8", (4, size // 4))
        behind.read_rows(files, source, (0, 3), 4)  # less than a window
        WriteBehind(0).read(files, str(path), 0, size)
        assert resident_bytes(path) == size
        behind.read_rows(files, source, (3, 1), 4)
        assert resident_bytes(path) == 0
    assert (disk / "target").read_bytes() == path.read_bytes()


def test_a_finished_file_is_given_up_when_asked(disk: Path) -> None:
    for gives_up in (False, True):
        with OutputFile(disk / f"{gives_up}", MEBIBYTE) as file:
            file.write_at(0, memoryview(b"\1" * MEBIBYTE))
            file.finish(gives_up_pages=gives_up)
        assert (resident_bytes(disk / f"{gives_up}") == 0) is gives_up


def large_merge(folder: Path) -> tuple[Path, Path]:
    """Write 480 MB in two shards, half of it updated."""
    rows, columns = 2048, 3072
    weight = (torch.arange(rows * columns, dtype=torch.float32).reshape(rows, columns) % 997 / 997).bfloat16()
    names = [f"layers.{layer}.{part}" for layer in range(20) for part in "qk"]
    shards = [{f"{name}.weight": weight.clone() for name in names[number::2]} for number in range(2)]
    pairs = {}
    for name in names[:20]:
        pairs[f"{PREFIX}{name}.lora_A.weight"] = torch.full((4, columns), 0.25)
        pairs[f"{PREFIX}{name}.lora_B.weight"] = torch.full((rows, 4), 0.5)
    return write_base(folder / "base", shards), write_adapter(folder / "adapter", pairs)


def page_samples(process: subprocess.Popen[bytes], folder: Path) -> Iterator[int]:
    """Yield how much of all tensor files in a folder is in memory, while a process runs."""
    while process.poll() is None:
        sampled = 0
        for parent, _, names in os.walk(folder):
            for name in names:
                with suppress(OSError):  # it was renamed meanwhile
                    sampled += resident_bytes(Path(parent, name))
        yield sampled
        time.sleep(0.01)


@pytest.mark.slow
def test_the_pages_of_a_limited_merge_stay_few(disk: Path) -> None:
    base, adapter = large_merge(disk)
    highest = {}
    for limit in ((), ("--max-memory", "300M")):
        for path in base.glob("*.safetensors"):
            with OpenFiles() as files:
                os.fsync(files.descriptor(str(path)))
                WriteBehind(1).read(files, str(path), 0, path.stat().st_size)
        assert sum(map(resident_bytes, base.glob("*.safetensors"))) < MEBIBYTE
        command = [sys.executable, "-m", "rawmerge", "merge", str(base), str(adapter), *limit]
        with subprocess.Popen([*command, "-o", str(disk / "out")]) as process:
            highest[bool(limit)] = max(page_samples(process, disk))
        assert process.returncode == 0
        shutil.rmtree(disk / "out")
    assert highest[True] < 280 * MEBIBYTE
    assert highest[False] > 600 * MEBIBYTE
