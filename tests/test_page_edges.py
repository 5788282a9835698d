"""Whole pages past the page cache, their edges together: every byte of every range, however ranges are cut."""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest

from rawmerge.engine.anonymous_memory import PAGE_BYTES
from rawmerge.engine.page_edges import PageEdges, cut_at_pages, place_in
from rawmerge.engine.shard_writer import OutputFile
from rawmerge.errors import InputChangedError
from rawmerge.inputs.tensor_source import OpenFiles
from rawmerge.shard_run import write_turns

SIZE = 5 * PAGE_BYTES + 1234


def ranges(seed: int, byte_count: int, longest: int) -> list[tuple[int, int]]:
    """Return (start, stop) of ranges that cover a file, in any order."""
    random, cuts = Random(seed), [0]
    while cuts[-1] < byte_count:
        cuts.append(min(byte_count, cuts[-1] + random.randint(1, longest)))
    found = list(pairwise(cuts))
    random.shuffle(found)
    return found


@pytest.fixture(params=[False, True], ids=["cached", "direct"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OutputFile]:
    with OutputFile(tmp_path / "out", SIZE, is_direct=request.param) as file:
        yield file


@pytest.mark.parametrize("longest", [100, PAGE_BYTES, 3 * PAGE_BYTES])
@pytest.mark.parametrize("seed", range(4))
def test_every_range_is_written(output: OutputFile, seed: int, longest: int) -> None:
    content = memoryview(Random(seed).randbytes(SIZE))
    with ThreadPoolExecutor(3) as pool:
        for start, stop in ranges(seed, SIZE, longest):
            pool.submit(output.write_at, start, content[start:stop]).result()
    output.finish()
    assert output.path.read_bytes() == content


@pytest.mark.parametrize("seed", range(4))
def test_placed_buffers_are_written_without_another_copy(
    output: OutputFile, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    content = Random(seed).randbytes(SIZE)
    memory = memoryview(mmap.mmap(-1, SIZE + PAGE_BYTES))
    for start, stop in ranges(seed, SIZE, 3 * PAGE_BYTES):
        place_in(memory, start, stop - start)[:] = content[start:stop]
        output.write_placed(start, stop - start, memory)
    output.finish()
    assert output.path.read_bytes() == content


def test_copies_are_exact_whatever_their_offsets(output: OutputFile, tmp_path: Path) -> None:
    content = Random(1).randbytes(SIZE + 500)
    (tmp_path / "source").write_bytes(content)
    with OpenFiles() as files:
        for start, stop in ranges(2, SIZE, 2 * PAGE_BYTES):
            output.copy_from(files, str(tmp_path / "source"), start + 500, start, stop - start)
    output.finish()
    assert output.path.read_bytes() == content[500:]


@pytest.mark.parametrize("shift", [0, PAGE_BYTES, 3 * PAGE_BYTES + 8])
def test_ranges_that_lie_alike_are_copied_from_the_page_cache(output: OutputFile, tmp_path: Path, shift: int) -> None:
    content = Random(1).randbytes(SIZE + shift)
    (tmp_path / "source").write_bytes(content)
    with OpenFiles() as files:
        for start, stop in ranges(3, SIZE, 3 * PAGE_BYTES):
            output.copy_from(files, str(tmp_path / "source"), start + shift, start, stop - start)
    output.finish()
    assert output.path.read_bytes() == content[shift:]


def test_a_source_that_becomes_shorter_while_it_is_copied_is_an_error_and_no_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, pwrite = tmp_path / "source", os.pwrite
    source.write_bytes(bytes(SIZE))

    def cut_first(descriptor: int, data: memoryview, at: int) -> int:
        os.truncate(source, PAGE_BYTES)
        return pwrite(descriptor, data, at)

    with OpenFiles() as files, OutputFile(tmp_path / "out", SIZE, is_direct=True) as file:
        if file._direct < 0:
            pytest.skip("no direct writes on this file system")
        files.descriptor(str(source))
        monkeypatch.setattr(os, "pwrite", cut_first)
        with pytest.raises(InputChangedError, match="changed while it was read"):
            file.copy_from(files, str(source), 0, 0, SIZE)


@pytest.mark.parametrize("answer", [errno.EINVAL, "short"])
def test_what_the_system_leaves_goes_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: int | str
) -> None:
    content = memoryview(Random(3).randbytes(SIZE))
    pwrite, direct = os.pwrite, []

    def reluctant(descriptor: int, data: memoryview, at: int) -> int:
        if descriptor not in direct:
            return pwrite(descriptor, data, at)
        if answer == "short":
            return pwrite(descriptor, data[:PAGE_BYTES], at)
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    with OutputFile(tmp_path / "out", SIZE, is_direct=True) as file:
        direct.append(file._direct)
        if file._direct < 0:
            pytest.skip("no direct writes on this file system")
        monkeypatch.setattr(os, "pwrite", reluctant)
        for start, stop in ranges(5, SIZE, 4 * PAGE_BYTES):
            file.write_at(start, content[start:stop])
        file.finish()
    assert (tmp_path / "out").read_bytes() == content


def test_other_errors_of_direct_writes_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with OutputFile(tmp_path / "out", SIZE, is_direct=True) as file:
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            file.write_at(0, memoryview(bytes(SIZE)))


def test_where_there_are_no_direct_writes_the_file_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def without_direct(path: Any, flags: int, *mode: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return opened(path, flags, *mode)

    monkeypatch.setattr(os, "open", without_direct)
    with OutputFile(tmp_path / "out", SIZE, is_direct=True) as file:
        file.write_at(0, memoryview(bytes(range(256)) * 80))
        file.finish()
    assert (tmp_path / "out").read_bytes()[: 256 * 80] == bytes(range(256)) * 80


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir())) if descriptors.exists() else 0
    for number in range(3):
        with OutputFile(tmp_path / f"{number}", SIZE, is_direct=True) as file:
            file.finish()
    assert (len(list(descriptors.iterdir())) if before else 0) == before


def test_edges_are_joined_and_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edges = PageEdges()
    edges.put(10, memoryview(b"cd"))
    edges.put(8, memoryview(b"ab"))
    edges.put(PAGE_BYTES, memoryview(b"z"))
    edges.put(5, memoryview(b""))
    assert len(edges) == 2
    assert list(edges.take()) == [(8, b"abcd"), (PAGE_BYTES, b"z")]
    assert list(edges.take()) == []


def test_parts_begin_with_pages_and_cover_the_range() -> None:
    for offset, count, most in (
        (0, 10, 4096),
        (5, 9000, 4096),
        (4096, 8192, 8192),
        (4000, 100_000, 8192),
        (7, 0, 4096),
    ):
        parts = list(cut_at_pages(offset, count, most))
        assert sum(part for _, part in parts) == count
        assert all(0 < part <= most for _, part in parts)
        assert [start for start, _ in parts] == [sum(part for _, part in parts[:n]) for n in range(len(parts))]
        assert all((offset + start) % PAGE_BYTES == 0 for start, _ in parts[1:])


@pytest.mark.parametrize("seed", range(6))
def test_a_page_that_two_ranges_share_is_written_once_with_the_later_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    content = memoryview(Random(seed).randbytes(SIZE))
    cuts = [0, PAGE_BYTES + 1, 2 * PAGE_BYTES + 4095, 3 * PAGE_BYTES + 4095, 5 * PAGE_BYTES - 8, SIZE]
    parts = list(pairwise(cuts))
    Random(seed).shuffle(parts)
    written: list[tuple[int, int]] = []
    pwrite = os.pwrite

    def recorded(descriptor: int, data: memoryview, at: int) -> int:
        written.append((at, len(data)))
        return pwrite(descriptor, data, at)

    with OutputFile(tmp_path / "out", SIZE, is_direct=True) as file:
        if file._direct < 0:
            pytest.skip("no direct writes on this file system")
        monkeypatch.setattr(os, "pwrite", recorded)
        for start, stop in parts:
            file.write_at(start, content[start:stop])
        assert len(written) <= len(parts)
        file.finish()
    assert (tmp_path / "out").read_bytes() == content
    rest = SIZE % PAGE_BYTES
    assert sum(count for _, count in written) == SIZE  # no byte twice
    assert written[-1] == (SIZE - rest, rest)
    assert all(at % PAGE_BYTES == count % PAGE_BYTES == 0 for at, count in written[:-1])


def test_ranges_written_at_once_lose_no_part_of_a_page(tmp_path: Path) -> None:
    content = memoryview(Random(9).randbytes(64 * PAGE_BYTES + 17))
    with ThreadPoolExecutor(8) as pool:
        for seed in range(20):
            with OutputFile(tmp_path / f"{seed}", len(content), is_direct=True) as file:
                cuts = ranges(seed, len(content), 2 * PAGE_BYTES)
                list(pool.map(lambda cut, file=file: file.write_at(cut[0], content[cut[0] : cut[1]]), cuts))
                file.finish()
            assert (tmp_path / f"{seed}").read_bytes() == content


def test_no_more_threads_wait_for_the_disk_than_have_a_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = memoryview(Random(4).randbytes(64 * PAGE_BYTES))
    (tmp_path / "source").write_bytes(content)
    pwrite, lock, waiting, most = os.pwrite, threading.Lock(), [0], [0]

    def counted(descriptor: int, data: memoryview, at: int) -> int:
        with lock:
            waiting[0] += 1
            most[0] = max(most[0], waiting[0])
        time.sleep(0.002)
        try:
            return pwrite(descriptor, data, at)
        finally:
            with lock:
                waiting[0] -= 1

    turn = write_turns(3)
    with OpenFiles() as files, OutputFile(tmp_path / "out", len(content), is_direct=True, turn=turn) as file:
        if file._direct < 0:
            pytest.skip("no direct writes on this file system")
        monkeypatch.setattr(os, "pwrite", counted)
        with ThreadPoolExecutor(6) as pool:
            for start in range(0, len(content), 4 * PAGE_BYTES):
                part = content[start : start + 4 * PAGE_BYTES]
                if start % (8 * PAGE_BYTES):
                    pool.submit(file.write_at, start, part)
                else:
                    pool.submit(file.copy_from, files, str(tmp_path / "source"), start, start, len(part))
        file.finish()
    assert most == [2]
    assert (tmp_path / "out").read_bytes() == content
