"""Merges to disks that are too small, in a mount namespace of its own; a program, so that limits end with it.

Usage: unshare -rm python -m tests.small_disk FOLDER   (FOLDER is empty; prints one JSON object)
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from click.testing import CliRunner

import rawmerge
from rawmerge.cli import cli
from tests.builders import folder_bytes, lora_pair, random_tensor, write_adapter, write_base

PAGE = 4096
ROWS, COLUMNS = 64, 200


class SmallDisk:
    """A file system in memory, of a size that may change, and base and adapter elsewhere.

    Attributes:
        folder: holds everything.
        place: where the disk is.
        rounds: what came of each merge.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.place = folder, folder / "disk"
        self.place.mkdir()
        self.inputs = (folder / "base", folder / "adapter")
        names = [f"model.layers.{layer}" for layer in range(3)]
        shards = [
            {
                f"{name}.q_proj.weight": random_tensor((ROWS, COLUMNS), seed=layer),
                f"{name}.kept.weight": random_tensor((ROWS, COLUMNS), seed=layer + 9),
            }
            for layer, name in enumerate(names)
        ]
        pairs = [lora_pair(f"{name}.q_proj", ROWS, COLUMNS, seed=layer) for layer, name in enumerate(names)]
        write_base(self.inputs[0], shards)
        write_adapter(self.inputs[1], pairs[0] | pairs[1] | pairs[2])
        rawmerge.merge_adapter(*self.inputs, folder / "golden", without=["kernel"])
        self.golden = folder_bytes(folder / "golden")
        self.mount("size=64M")

    def sized(self, byte_count: int) -> None:
        """Empty the disk, and let it have room for so many bytes."""
        for path in self.place.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.mount(f"remount,size={byte_count}")

    def merge(self, *options: object, base: Path | None = None) -> dict[str, Any]:
        """Merge to the disk by the command line; return what a user would see of it."""
        paths = (base or self.inputs[0], self.inputs[1], "-o", self.place / "out")
        words = [str(word) for word in ("merge", *paths, "--without", "kernel", *options)]
        result = CliRunner().invoke(cli, words)
        found = folder_bytes(self.place / "out") if (self.place / "out").exists() else None
        state = "absent" if found is None else "golden" if found == self.golden else "broken"
        return {"code": result.exit_code, "told": result.stderr, "output": state}

    def mount(self, options: str) -> None:
        """Give the disk its size."""
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.place)], check=True)


def roomy() -> Any:
    """Let the check for space find enough, as where another program fills the disk later."""
    usage = shutil.disk_usage("/")
    return mock.patch("shutil.disk_usage", return_value=usage._replace(free=2**40))


def file_size_rounds(disk: SmallDisk) -> list[dict[str, Any]]:
    """Merge where no file may be larger than so many bytes, then without that limit."""
    rounds = []
    disk.sized(2**26)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 100, PAGE, 50_000):
        for options in (("--threads", 1), ("--threads", 2), ("--without", "preallocation")):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            try:
                made = disk.merge(*options)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
            rounds.append({"limit": limit, **made, "again": disk.merge(*options)})
            shutil.rmtree(disk.place / "out")
    return rounds


def size_rounds(disk: SmallDisk, sizes: range, *options: object) -> list[dict[str, Any]]:
    """Merge to disks of several sizes, and to each again once it is large enough."""
    rounds = []
    for size in sizes:
        disk.sized(size)
        made = disk.merge(*options)
        disk.mount("remount,size=64M")
        again = disk.merge(*options) if made["code"] else None
        rounds.append({"size": size, **made, "again": again})
    return rounds


def filler_rounds(disk: SmallDisk) -> list[dict[str, Any]]:
    """Let another program fill the disk while a merge is at work, and then go."""
    rounds = []
    for number in range(1, 7):
        for threads in (1, 2):
            disk.sized(2**22)
            filler = disk.place / "filler"
            try:
                rawmerge.merge_adapter(
                    *disk.inputs,
                    disk.place / "out",
                    without=["kernel", "preallocation"],
                    progress=_filling(filler, number),
                    threads=threads,
                )
                told, code = "", 0
            except rawmerge.RawmergeError as error:
                told, code = str(error), error.exit_code
            exists = (disk.place / "out").exists()
            was_full = filler.exists()
            filler.unlink(missing_ok=True)
            shutil.rmtree(disk.place / "out", ignore_errors=True)
            rounds.append({"code": code, "told": told, "exists": exists, "full": was_full, "again": disk.merge()})
    return rounds


def _filling(filler: Path, number: int) -> Callable[[rawmerge.Progress], None]:
    left = number

    def fill(_: rawmerge.Progress) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            with filler.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(PAGE))
                except OSError:
                    return

    return fill


def consuming_rounds(disk: SmallDisk, sizes: range) -> list[dict[str, Any]]:
    """Merge with the base on the same disk, which gives way to the output."""
    rounds = []
    for size in sizes:
        disk.sized(2**26)
        shutil.copytree(disk.inputs[0], disk.place / "base")
        disk.mount(f"remount,size={size}")
        made = disk.merge("--consume-base", base=disk.place / "base")
        disk.mount("remount,size=64M")
        again = disk.merge("--consume-base", base=disk.place / "base") if made["code"] else None
        rounds.append({"size": size, **made, "again": again})
    return rounds


def main(folder: Path) -> dict[str, Any]:
    """Run all rounds; return what came of them."""
    disk = SmallDisk(folder)
    pages = sum(-(-len(raw) // PAGE) for raw in disk.golden.values())
    base = sum(-(-path.stat().st_size // PAGE) for path in disk.inputs[0].iterdir())
    largest = max(-(-len(raw) // PAGE) for raw in disk.golden.values())
    checked = range(PAGE, pages * PAGE + 3 * 2**19, 32 * PAGE)
    with roomy():
        near = range((pages - 6) * PAGE, (pages + 12) * PAGE, PAGE)
        unchecked = size_rounds(disk, range(PAGE, (pages + 20) * PAGE, 8 * PAGE))
        smallest = size_rounds(disk, near, "--threads", 2)
        consumed = consuming_rounds(disk, range((base + largest - 6) * PAGE, (base + largest + 14) * PAGE, PAGE))
    return {
        "pages": pages,
        "consuming pages": base + largest,
        "file size": file_size_rounds(disk),
        "checked": size_rounds(disk, checked),
        "checked, consuming": consuming_rounds(disk, range(base * PAGE, (base + largest) * PAGE + 2**21, 48 * PAGE)),
        "unchecked": unchecked,
        "smallest": smallest,
        "smallest, consuming": consumed,
        "filler": filler_rounds(disk),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]))) + "\n")
