"""Each kind of file operation fails in turn: the output is absent or whole, and the next merge gives golden bytes."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import rawmerge
from tests.builders import folder_bytes

Paths = tuple[Path, Path]
CALLS = (
    "open",
    "pwrite",
    "preadv",
    "fsync",
    "posix_fallocate",
    "ftruncate",
    "rename",
    "mkdir",
    "rmdir",
    "unlink",
    "scandir",
    "stat",
    "fstat",
    "close",
)


class Fault:
    """Lets the call of one name and number fail; any thread may make it."""

    def __init__(self, patch: pytest.MonkeyPatch, name: str, number: int) -> None:
        self.has_come = False
        self._name, self._left, self._lock = name, number, threading.Lock()
        self._call: Callable[..., Any] = getattr(os, name)
        patch.setattr(os, name, self._run)

    def _run(self, *arguments: Any, **named: Any) -> Any:
        with self._lock:
            self._left -= 1
            fails = self._left == 0
        if fails:
            self.has_come = True
            if self._name == "close":  # which closes all the same
                self._call(*arguments, **named)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self._call(*arguments, **named)


def places(*, all_of_them: bool) -> Iterator[int]:
    """Yield numbers of calls: all, or the first ones, then ever fewer."""
    number = 1
    while True:
        yield number
        number += 1 if all_of_them else 1 + number // 2


@pytest.mark.parametrize("all_of_them", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stands", [False, True])
def test_an_operation_that_fails_leaves_the_output_absent_or_whole(
    tiny: Paths, tmp_path: Path, stands: bool, all_of_them: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    rawmerge.merge_adapter(*tiny, tmp_path / "golden")
    rawmerge.merge_adapter(*tiny, tmp_path / "before", dtype="float32")
    golden, before = folder_bytes(tmp_path / "golden"), folder_bytes(tmp_path / "before")
    inputs = [folder_bytes(path) for path in tiny]
    count = failed = 0
    for name in CALLS:
        for number in places(all_of_them=all_of_them):
            if stands:
                rawmerge.merge_adapter(*tiny, output, dtype="float32", overwrite=True)
            with monkeypatch.context() as patch:
                fault = Fault(patch, name, number)
                with suppress(rawmerge.RawmergeError):
                    rawmerge.merge_adapter(*tiny, output, overwrite=True, threads=2, reuse=False)
                    failed -= 1
            count, failed = count + 1, failed + 1
            found = folder_bytes(output) if output.exists() else None
            assert found in ([before, golden] if stands else [None, golden]), (name, number)
            assert [folder_bytes(path) for path in tiny] == inputs
            if found != golden:
                assert fault.has_come
                rawmerge.merge_adapter(*tiny, output, overwrite=True)
                assert folder_bytes(output) == golden
            if not stands:
                shutil.rmtree(output)
            if not fault.has_come:
                break
    rawmerge.merge_adapter(*tiny, output, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "before", "golden", "out"]
    assert count > 60
    assert failed > 30
