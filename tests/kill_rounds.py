"""Kills a consuming merge before each of its file operations in turn, runs it again, and compares the output.

A program of its own: it imports torch once and computes nothing itself, so that every round is a fork of milliseconds.

Usage: python -m tests.kill_rounds FOLDER STEP   (FOLDER holds base and adapter; kills before operations 1, 1 + STEP,
1 + 2 STEP and so on; prints one JSON object)
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import rawmerge
import rawmerge.api
import rawmerge.computing.blas_threads
import rawmerge.computing.tile_computer  # what each round would import
from tests.builders import folder_bytes

KILLED = 137
CALLS = (
    "fsync",
    "fdatasync",
    "pwrite",
    "unlink",
    "rename",
    "mkdir",
    "rmdir",
    "truncate",
    "posix_fallocate",
    "copy_file_range",
)


def main(folder: Path, step: int) -> dict[str, Any]:
    """Run rounds until one is not killed; return how many there were and what was wrong."""
    for name in ("fsync", "fdatasync"):  # which matter to a power cut, not to a kill, and take most of the time
        setattr(os, name, lambda _: None)
    golden = folder / "golden"
    assert in_fork(partial(merge, folder, golden, consumes=False)) == 0
    wrong: list[str] = []
    rounds = resumed = 0
    for number in range(1, 1000, step):
        place = folder / f"round-{number}"
        shutil.copytree(folder / "base", place / "base")
        was_killed = in_fork(partial(die_at, number, place)) == KILLED
        rounds += 1
        resumed += len(list((place / "base").glob("*.safetensors"))) < 3
        # half of the rounds are killed once more, early or late in the second run
        if was_killed and rounds % 2 and not is_done(place):
            in_fork(partial(die_at, 3 + number // 2, place))
        code = 0 if is_done(place) else in_fork(partial(merge, folder, place / "out", base=place / "base"))
        wrong.extend(f"round {number}: {fault}" for fault in faults(place, golden, code))
        shutil.rmtree(place)
        if not was_killed:
            return {"rounds": rounds, "resumed": resumed, "wrong": wrong}
    return {"rounds": rounds, "resumed": resumed, "wrong": [*wrong, "it never ends"]}


def is_done(place: Path) -> bool:
    """Whether a merge was killed when it had nothing left to do."""
    return (place / "out").exists() and not working_folder(place).exists()


def merge(folder: Path, output: Path, *, base: Path | None = None, consumes: bool = True) -> None:
    """Merge the folder's adapter; finding out what the kernel may do takes longer than all else."""
    rawmerge.merge_adapter(
        base or folder / "base", folder / "adapter", output, consume_base=consumes, threads=1, without=["kernel"]
    )


def working_folder(place: Path) -> Path:
    """Return the folder of an unfinished merge."""
    return place / "out.rawmerge-unfinished"


def die_at(number: int, place: Path) -> None:
    """Merge, and end this process like SIGKILL just before its file operation of that number."""
    lock, left = threading.Lock(), number

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            with lock:
                left -= 1
                if left == 0:
                    os._exit(KILLED)
            return call(*arguments, **named)

        return run

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    merge(place.parent, place / "out", base=place / "base")


def in_fork(work: Callable[[], None]) -> int:
    """Run `work` in a child process; return its exit code, 1 after any error."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            raise
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def faults(place: Path, golden: Path, code: int) -> list[str]:
    """Return what is not as after an uninterrupted merge."""
    found = [] if code == 0 else [f"the last run ended with {code}"]
    if not (place / "out").exists() or folder_bytes(place / "out") != folder_bytes(golden):
        found.append("the output is another")
    if list((place / "base").glob("*.safetensors")):
        found.append("base shards are left")
    if working_folder(place).exists():
        found.append("the working folder is left")
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))) + "\n")
