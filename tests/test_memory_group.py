"""A merge in a control group whose memory is far smaller than its files: not killed, not much slower.

Groups belong to whoever manages the machine, so none is made unasked: RAWMERGE_TEST_GROUP names a folder of version 2
(with the memory controller handed down) or version 1 below which these tests may make one, for example
`/sys/fs/cgroup/memory/mine`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rawmerge.native import kernel
from tests.builders import folder_bytes
from tests.test_write_behind import large_merge

pytestmark = pytest.mark.slow
MEBIBYTE = 2**20
ENTER = 'echo $$ > "$1/cgroup.procs" && shift && exec "$@"'


@pytest.fixture
def group() -> Iterator[Path]:
    """Return a fresh control group."""
    parent = os.environ.get("RAWMERGE_TEST_GROUP")
    if not parent:
        pytest.skip("RAWMERGE_TEST_GROUP names no folder in which groups may be made")
    folder = Path(parent) / f"rawmerge-test-{os.getpid()}"
    folder.mkdir()
    yield folder
    folder.rmdir()


def limit(group: Path, byte_count: int) -> None:
    name = "memory.max" if (group / "memory.max").exists() else "memory.limit_in_bytes"
    (group / name).write_text(f"{byte_count}\n")


def timed_merge(
    folder: Path, output: str, without: list[str], group: Path | None = None
) -> tuple[float, dict[str, Any]]:
    enter = ["sh", "-c", ENTER, "sh", str(group)] if group else []
    arguments = ["merge", str(folder / "base"), str(folder / "adapter"), "-o", str(folder / output), "--json", *without]
    started = time.perf_counter()
    done = subprocess.run(
        [*enter, sys.executable, "-m", "rawmerge", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return time.perf_counter() - started, json.loads(done.stdout)


@pytest.mark.parametrize(
    ("byte_count", "without"),
    [
        pytest.param(
            160 * MEBIBYTE,
            [],
            marks=pytest.mark.skipif(kernel() is None, reason="the kernel is not compiled, or not for this processor"),
        ),
        (400 * MEBIBYTE, ["--without", "kernel"]),
    ],
)
def test_a_merge_in_a_small_group_ends_well(
    tmp_path: Path, group: Path, byte_count: int, without: list[str], record_property: Any
) -> None:
    large_merge(tmp_path)
    timed_merge(tmp_path, "first", without)  # the kernel's trials
    shutil.rmtree(tmp_path / "first")
    free, _ = timed_merge(tmp_path, "free", without)
    limit(group, byte_count)
    limited, summary = timed_merge(tmp_path, "limited", without, group)
    assert summary["predicted_peak_bytes"] <= byte_count
    assert summary["measured_peak_bytes"] <= byte_count
    assert folder_bytes(tmp_path / "limited") == folder_bytes(tmp_path / "free")
    record_property("limited_to_free", limited / free)
