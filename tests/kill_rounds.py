"""Kills a merge before each of its file operations in turn, runs it again, and compares the output.

A program of its own: it imports torch once and computes nothing itself, so that every round is a fork of milliseconds.

Usage: python -m tests.kill_rounds MODE FOLDER STEP [ROUNDS]   (MODE is a key of `MODES`; FOLDER holds base and adapter;
kills before operations 1, 1 + STEP, 1 + 2 STEP and so on, and begins again, twice as far apart, until ROUNDS merges
were killed; prints one JSON object)
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import rawmerge
import rawmerge.api
import rawmerge.computing.blas_threads
import rawmerge.computing.tile_computer  # what each round would import
from rawmerge.output.shard_journal import read_earlier_run
from rawmerge.output.staging_directory import hidden_beside
from tests.builders import folder_bytes

KILLED = -signal.SIGKILL
CALLS = (
    "fsync",
    "fdatasync",
    "pwrite",
    "unlink",
    "rename",
    "mkdir",
    "rmdir",
    "open",
    "write",
    "replace",
    "truncate",
    "posix_fallocate",
    "copy_file_range",
)


def main(mode: Mode, folder: Path, step: int, wanted: int = 0) -> dict[str, Any]:
    """Run rounds until one is not killed and enough were; return how many there were and what was wrong."""
    for name in ("fsync", "fdatasync"):  # which matter to a power cut, not to a kill, and take most of the time
        setattr(os, name, lambda _: None)
    assert in_fork(partial(merge, folder, folder / "golden", Mode(format=mode.format))) == 0
    assert in_fork(partial(merge, folder, folder / "before", Mode(), dtype="float32")) == 0
    found = Found()
    number = 1
    while found.rounds < 5000:
        killed = play(mode, folder, number, found)
        number += step
        if not killed:
            if found.killed >= wanted:
                return found.as_dict()
            number = 1
    return found.as_dict() | {"wrong": ["it never ends"]}


def play(mode: Mode, folder: Path, number: int, found: Found) -> bool:
    """Play one round; return whether its merge was killed."""
    place = folder / f"round-{number}"
    shutil.copytree(folder / "base", place / "base", copy_function=shutil.copy2)
    if mode.overwrites:
        shutil.copytree(folder / "before", place / "out")
    time.sleep(mode.pause)  # what was written just now is not trusted by what goes on
    was_killed = in_fork(partial(die_at, number, place, mode)) == KILLED
    found.rounds += 1
    found.killed += was_killed
    found.wrong.extend(f"round {number}: {fault}" for fault in halves(place, folder, mode))
    # half of the rounds are killed once more, early or late in the second run
    if was_killed and found.rounds % 2 and not is_done(place, mode):
        found.killed += in_fork(partial(die_at, 3 + number // 2, place, mode)) == KILLED
    found.resumed += is_resumable(place, mode)
    is_plain = not mode.consumes and not mode.overwrites
    is_over = (place / "out").exists() if is_plain else is_done(place, mode) and mode.consumes
    code = 0 if is_over else in_fork(partial(merge, folder, place / "out", mode, base=place / "base"))
    rawmerge.clean_output(place / "out")
    found.wrong.extend(f"round {number}: {fault}" for fault in faults(place, folder, code, mode))
    shutil.rmtree(place)
    return was_killed


@dataclass
class Found:
    """What the rounds gave.

    Attributes:
        rounds: how many; killed: merges that were killed in them; resumed: rounds whose last merge had something to go
            on from; wrong: what should not be.
    """

    rounds: int = 0
    killed: int = 0
    resumed: int = 0
    wrong: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return all that, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Mode:
    """Which kind of merge is killed."""

    consumes: bool = False
    overwrites: bool = False
    format: str = "safetensors"

    @property
    def pause(self) -> float:
        """Seconds between making a base and merging it."""
        return 0 if self.consumes else 0.06

    def working_folder(self, place: Path) -> Path:
        """Return where an unfinished merge works."""
        return place / "out.rawmerge-unfinished" if self.consumes else hidden_beside(place / "out")


MODES = {
    "plain": Mode(),
    "overwrite": Mode(overwrites=True),
    "consume": Mode(consumes=True),
    "bin": Mode(format="bin"),
    "consume-bin": Mode(consumes=True, format="bin"),
}


def is_done(place: Path, mode: Mode) -> bool:
    """Whether a merge was killed when it had nothing left to do."""
    return (place / "out").exists() and not mode.working_folder(place).exists()


def is_resumable(place: Path, mode: Mode) -> bool:
    """Whether there is something to go on from: base shards are deleted, or output shards noted."""
    if mode.consumes:
        return len(list((place / "base").glob("*.safetensors"))) < 3
    earlier = read_earlier_run(mode.working_folder(place))
    return bool(earlier and earlier.shards)


def merge(folder: Path, output: Path, mode: Mode, *, base: Path | None = None, dtype: str | None = None) -> None:
    """Merge the folder's adapter; finding out what the kernel may do takes longer than all else."""
    rawmerge.merge_adapter(
        base or folder / "base",
        folder / "adapter",
        output,
        dtype=dtype,
        format=mode.format,
        consume_base=mode.consumes,
        overwrite=mode.overwrites,
        reuse=False,
        threads=1,
        without=["kernel"],
    )


def die_at(number: int, place: Path, mode: Mode) -> None:
    """Merge, and end this process by SIGKILL just before its file operation of that number."""
    lock, left = threading.Lock(), number

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            with lock:
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **named)

        return run

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    merge(place.parent, place / "out", mode, base=place / "base")


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


def halves(place: Path, folder: Path, mode: Mode) -> list[str]:
    """Return whether a killed merge shows an output that is neither what stood there nor whole."""
    found = folder_bytes(place / "out") if (place / "out").exists() else None
    before = folder_bytes(folder / "before") if mode.overwrites else None
    wrong = [] if found in (before, folder_bytes(folder / "golden")) else ["the output is half"]
    if not mode.consumes and folder_bytes(place / "base") != folder_bytes(folder / "base"):
        wrong.append("the base was touched")
    return wrong


def faults(place: Path, folder: Path, code: int, mode: Mode) -> list[str]:
    """Return what is not as after an uninterrupted merge."""
    found = [] if code == 0 else [f"the last run ended with {code}"]
    if not (place / "out").exists() or folder_bytes(place / "out") != folder_bytes(folder / "golden"):
        found.append("the output is another")
    if mode.consumes and list((place / "base").glob("*.safetensors")):
        found.append("base shards are left")
    if names := {path.name for path in place.iterdir()} - {"base", "out"}:
        found.append(f"there is more: {sorted(names)}")
    return found


def run_rounds(folder: Path, mode: str, step: int, kills: int) -> dict[str, Any]:
    """Run the rounds in a process of its own, and return what they found; none may have gone wrong."""
    command = [sys.executable, "-m", "tests.kill_rounds", mode, str(folder), str(step), str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["wrong"] == [], done.stderr
    assert found["killed"] >= kills
    return found


if __name__ == "__main__":
    counts = [int(text) for text in sys.argv[3:]]
    sys.stdout.write(json.dumps(main(MODES[sys.argv[1]], Path(sys.argv[2]), *counts)) + "\n")
