"""What the system lets this process take: its control group's memory, and the limits of setrlimit(2).

Sources: the kernel's `Documentation/admin-guide/cgroup-v2.rst` (memory.max, memory.high), `cgroup-v1/memory.rst`
(memory.limit_in_bytes), proc(5) for `/proc/self/cgroup` and `/proc/self/mountinfo`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_V2_FILES: Final = {"memory.max": True, "memory.high": False}
_V1_FILES: Final = {"memory.limit_in_bytes": True}
#: Version 1 tells "no limit" as the highest multiple of a page.
_NO_LIMIT: Final = 2**60


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """A number of bytes that is not to be exceeded.

    Attributes:
        byte_count: the number.
        origin: where it comes from, in words.
        is_hard: whether the process fails or is killed beyond it, rather than slowed down.
    """

    byte_count: int
    origin: str
    is_hard: bool = True


def group_limit(root: Path = Path("/")) -> MemoryLimit | None:
    """Return the lowest memory limit of this process's control group and those above it; None for none.

    Args:
        root: under which `/proc` and the mounts are looked for.
    """
    limits: list[MemoryLimit] = []
    with suppress(OSError):
        for folder, files in _group_folders(root):
            limits.extend(_limits_of(folder, files))
    return min(limits, key=lambda limit: limit.byte_count, default=None)


def data_limit() -> MemoryLimit | None:
    """Return the soft RLIMIT_DATA, which bounds a process's private memory; None for none."""
    count = _soft_limit("RLIMIT_DATA")
    return None if count is None else MemoryLimit(count, "RLIMIT_DATA (ulimit -d)")


def address_space_limit() -> int | None:
    """Return the soft RLIMIT_AS in bytes, which bounds mappings, resident or not; None for none."""
    return _soft_limit("RLIMIT_AS")


def _soft_limit(name: str) -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    soft, _ = resource.getrlimit(getattr(resource, name))
    return None if soft == resource.RLIM_INFINITY else soft


def _group_folders(root: Path) -> Iterator[tuple[Path, dict[str, bool]]]:
    """Yield the folder of each group that counts this process's memory, and its files that tell a limit."""
    groups = _own_groups(root)
    for line in (root / "proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        mount, _, kind = line.partition(" - ")
        fields, described = mount.split(), kind.split()
        if len(fields) < 5 or len(described) < 3:
            continue
        if described[0] == "cgroup2" and "" in groups:
            name, files = "", _V2_FILES
        elif described[0] == "cgroup" and "memory" in described[2].split(",") and "memory" in groups:
            name, files = "memory", _V1_FILES
        else:
            continue
        top = root / fields[4].lstrip("/")
        yield from ((folder, files) for folder in _upward(top, _below(groups[name], fields[3])))


def _own_groups(root: Path) -> dict[str, str]:
    """Return controller to the path of this process's group; an empty controller for version 2."""
    groups: dict[str, str] = {}
    for line in (root / "proc/self/cgroup").read_text(encoding="utf-8", errors="replace").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        groups |= dict.fromkeys(controllers.split(","), path)
    return groups


def _below(path: str, mounted: str) -> tuple[str, ...]:
    """Return the parts of a group's path below the group that is mounted; none where it lies elsewhere."""
    parts, top = Path(path).parts, Path(mounted).parts
    is_below = parts[: len(top)] == top and ".." not in parts
    return parts[len(top) :] if is_below else ()


def _upward(top: Path, parts: tuple[str, ...]) -> Iterator[Path]:
    for count in range(len(parts), -1, -1):
        yield top.joinpath(*parts[:count])


def _limits_of(folder: Path, files: dict[str, bool]) -> Iterator[MemoryLimit]:
    for name, is_hard in files.items():
        with suppress(OSError, ValueError):  # the topmost group has none, and "max" is no number
            count = int((folder / name).read_text(encoding="ascii"))
            if count < _NO_LIMIT:
                yield MemoryLimit(count, str(folder / name), is_hard)
