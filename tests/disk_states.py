"""What may be on a disk after a loss of power: of what was not synced, anything.

The model, after ALICE (Pillai et al., OSDI 2014) and CrashMonkey (Mohan et al., OSDI 2018), without the order that any
file system keeps: a name is durable once its folder was synced, bytes and size once their file was. Of the rest any
part may be there: single names whatever happened before them, single sectors of a file, a size without the bytes. One
call's changes of names (a rename is two, an exchange too) come together, as every file system with a journal has it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TypeAlias

from tests.disk_record import DiskRecorder, Event, FileChanged, Name, NamesChanged, Vault, Version

#: A disk writes a sector as a whole.
SECTOR = 512
#: Chooses of a file's versions, the durable one first, what the file is; and whether a change of names is there.
Mix: TypeAlias = Callable[[Sequence[Version]], Version]
Takes: TypeAlias = Callable[[int], bool]


@dataclass
class State:
    """One content of the disk.

    Attributes:
        point: after how many events the power was lost.
        kind: which part of what was not synced is there.
        folders: paths below the root, parents first.
        files: path to inode and content.
    """

    point: int
    kind: str
    folders: list[str]
    files: dict[str, tuple[int, Version]]

    @property
    def key(self) -> tuple[object, ...]:
        """What two states share that are the same."""
        files = {path: version.content for path, (_, version) in self.files.items()}
        return (tuple(sorted(self.folders)), tuple(sorted(files.items())))

    def put(self, root: Path, vault: Vault) -> None:
        """Let the folder be so; every file is the one that it was, by inode and modification time."""
        vault.gather(root)
        for folder in self.folders:
            (root / folder).mkdir()
        placed: dict[int, Path] = {}
        for path, (inode, version) in self.files.items():
            if inode in placed:
                os.link(placed[inode], root / path)
                continue
            placed[inode] = root / path
            vault.place(inode).rename(root / path)
            if (root / path).read_bytes() != version.content:
                (root / path).write_bytes(version.content)
            os.utime(root / path, ns=(version.modified_ns, version.modified_ns))


class Disk:
    """The disk of a recorded program after its first events: what is durable, and what may be."""

    def __init__(self, record: DiskRecorder, count: int) -> None:
        self.point = count
        self._root = record.root.stat().st_ino
        self._folders = record.folders
        self._names = dict(record.before.names)
        self._versions = {inode: [version] for inode, version in record.before.files.items()}
        self._changes: list[tuple[dict[Name, int], bool]] = []
        for event in record.events[:count]:
            self._add(event)

    def _add(self, event: Event) -> None:
        if isinstance(event, NamesChanged):
            self._changes.append((event.names, False))
        elif isinstance(event, FileChanged):
            self._versions.setdefault(event.inode, [Version()]).append(event.version)
        else:
            self._sync(event.inode)

    def _sync(self, inode: int) -> None:
        if inode in self._versions:
            self._versions[inode] = self._versions[inode][-1:]
        self._changes = [
            (names, is_durable or any(folder == inode for folder, _ in names)) for names, is_durable in self._changes
        ]

    @property
    def pending(self) -> int:
        """How many changes of names are not durable."""
        return sum(not is_durable for _, is_durable in self._changes)

    def state(self, kind: str, takes: Takes, mix: Mix) -> State:
        """Return the content of the disk with some of what was not synced.

        Args:
            kind: what to call it.
            takes: whether the pending change of names of that number is there.
            mix: what a file is.
        """
        names, number = dict(self._names), 0
        for changes, is_durable in self._changes:
            if is_durable or takes(number):
                _apply(changes, names, is_durable)
            number += not is_durable
        files = {inode: mix(versions) for inode, versions in self._versions.items()}
        state = State(self.point, kind, [], {})
        self._fill(state, names, (self._root, ""), files)
        return state

    def _fill(self, state: State, names: dict[Name, int], folder: tuple[int, str], files: dict[int, Version]) -> None:
        for (parent, name), inode in names.items():
            path = folder[1] + name
            if parent != folder[0] or not inode:
                continue
            if inode in self._folders:
                state.folders.append(path)
                self._fill(state, names, (inode, f"{path}/"), files)
            else:
                state.files[path] = (inode, files.get(inode, Version()))


def _apply(changes: dict[Name, int], names: dict[Name, int], is_durable: bool) -> None:
    """Let a change be there; one that would give a file or folder that was moved a second place is left out."""
    placed = set(changes.values()) - {0}
    twice = [key for key, inode in names.items() if inode in placed and key not in changes]
    if twice and len(changes) > 1:
        if not is_durable:
            return
        for key in twice:
            del names[key]
    names.update(changes)


def first(versions: Sequence[Version]) -> Version:
    """Return what is durable."""
    return versions[0]


def last(versions: Sequence[Version]) -> Version:
    """Return what was written last."""
    return versions[-1]


def mixed(random: Random, *, tears: bool) -> Mix:
    """Return what takes any version; with `tears`, its size only, and every sector from any."""

    def mix(versions: Sequence[Version]) -> Version:
        size = random.choice(versions)
        if not tears:
            return size
        count = len(size.content)
        parts = (
            random.choice(versions).content[at : at + SECTOR].ljust(SECTOR, b"\0") for at in range(0, count, SECTOR)
        )
        return Version(b"".join(parts)[:count], size.modified_ns)

    return mix


def states(record: DiskRecorder, seeds: Sequence[int], *, singles: bool = False, tears: bool = True) -> Iterator[State]:
    """Yield the states after a loss of power before every event and after the last, each content once, the last first.

    Args:
        record: of the program.
        seeds: a random part of what was not synced for each.
        singles: whether also each change of names is there alone, and is the only one that is not.
        tears: whether of a write some sectors may be there, and not only all or none.
    """
    seen: set[int] = set()
    for count in reversed(range(len(record.events) + 1)):
        for state in _states_at(Disk(record, count), seeds, singles, tears):
            key = hash(state.key)
            if key not in seen:
                seen.add(key)
                yield state


def _states_at(disk: Disk, seeds: Sequence[int], singles: bool, tears: bool) -> Iterator[State]:
    yield disk.state("nothing", lambda _: False, first)
    yield disk.state("everything", lambda _: True, last)
    yield disk.state("names", lambda _: True, first)
    yield disk.state("bytes", lambda _: False, last)
    for number in range(disk.pending) if singles else ():
        yield disk.state(f"name {number}", number.__eq__, last)
        yield disk.state(f"all but name {number}", number.__ne__, last)
    for seed in seeds:
        random = Random(f"{disk.point} {seed}")
        taken = [random.random() < 0.5 for _ in range(disk.pending)]
        yield disk.state(f"seed {seed}", taken.__getitem__, mixed(random, tears=tears))
