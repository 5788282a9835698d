"""`SHA256SUMS`: the SHA-256 of every file of an output, as `sha256sum -c` reads it.

Source: GNU coreutils, "Invoking sha256sum" and "Invoking md5sum" (the escapes of names).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final

from rawmerge.errors import MissingFileError, Problem
from rawmerge.inputs.tensor_source import open_regular_file

MANIFEST_NAME: Final = "SHA256SUMS"
MAX_MANIFEST_BYTES: Final = 16 * 2**20
#: So many problems of one kind are told one by one.
MAX_TOLD: Final = 20
_LINE: Final = re.compile(rb"(?P<escape>\\?)(?P<digest>[0-9a-fA-F]{64}) [ *](?P<name>[^\n]+)")
_ESCAPES: Final = {b"\\\\": b"\\", b"\\n": b"\n", b"\\r": b"\r"}


class Manifest:
    """The digests of a folder's files, each made as soon as its file is complete, beside the writing of the others."""

    def __init__(self, folder: Path) -> None:
        """Begin with no digest; files are read back from `folder`."""
        self._folder = folder
        self._pool = ThreadPoolExecutor(1)
        self._digests: dict[str, Future[str]] = {}

    def add(self, name: str) -> None:
        """Begin to read a file that is complete; from any thread."""
        self._digests[name] = self._pool.submit(file_digest, self._folder / name)

    def raw(self) -> bytes:
        """Return the manifest of all files in the folder, itself left out, once they are read.

        Raises:
            OSError: a file cannot be read.
        """
        for name in _names(self._folder):
            if name not in self._digests:
                self.add(name)
        return b"".join(_line(name, self._digests[name].result()) for name in sorted(self._digests))

    def close(self) -> None:
        """Read no further."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a regular file's content, in hexadecimal digits.

    Raises:
        MissingFileError: it cannot be opened, or is no regular file; OSError: it cannot be read.
    """
    with (
        open_regular_file(path, "a file to compare with its checksum") as (descriptor, _),
        open(descriptor, "rb", buffering=0, closefd=False) as file,  # it has no path
    ):
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_manifest(raw: bytes) -> dict[str, str]:
    """Return file name to digest; comments are passed over, and names begin in the folder, with `./` or without.

    Raises:
        ValueError: a line is none of `sha256sum`'s, a name twice, or one that leads out of the folder.
    """
    digests: dict[str, str] = {}
    for number, given in enumerate(raw.split(b"\n"), 1):
        line = given.removesuffix(b"\r")  # lines may end as Windows ends them
        if not line or line.startswith(b"#"):
            continue
        match = _LINE.fullmatch(line)
        name = _plain(_unescaped(match["name"], is_escaped=bool(match["escape"]))) if match else ""
        if match is None or name in digests or not _is_inside(name):
            raise ValueError(f"line {number}")
        digests[name] = match["digest"].decode().lower()
    return digests


def manifest_problems(folder: Path, digests: Mapping[str, str], needed: Iterable[str] = ()) -> Iterator[Problem]:
    """Yield each file that is missing, cannot be read, or has another digest than a manifest says.

    Of each of these kinds the first `MAX_TOLD` are told, and before them how many there are: a stranger's manifest may
    list a hundred thousand. A file is read once, whatever the number of its names.

    Args:
        folder: where the files lie.
        digests: what `parse_manifest` returned.
        needed: names that it must list.
    """
    told = _ToldProblems()
    for name in needed:
        if name not in digests:
            found = Problem(name, f"a file that {MANIFEST_NAME} lists", "one that it does not")
            told.add("shards that it does not list", found)
    known: dict[tuple[int, int], str] = {}
    for name, digest in digests.items():
        path = folder / name
        if not os.path.lexists(path):
            absent = Problem(name, f"a file that {MANIFEST_NAME} lists", "no such file")
            told.add("files that it lists and that are not there", absent)
        else:
            _check_digest(path, name, digest, known, told)
    yield from told


class _ToldProblems:
    """Problems by their kinds: the first of each, and how many there are."""

    def __init__(self) -> None:
        self._first: dict[str, list[Problem]] = {}
        self._counts: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Problem]:
        for kind, count in self._counts.items():
            if count > MAX_TOLD:
                yield Problem(MANIFEST_NAME, f"no {kind}", f"{count}, of which the first {MAX_TOLD} are told")
        for problems in self._first.values():
            yield from problems

    def add(self, kind: str, problem: Problem) -> None:
        self._counts[kind] += 1
        first = self._first.setdefault(kind, [])
        if len(first) < MAX_TOLD:
            first.append(problem)


def _check_digest(path: Path, name: str, digest: str, known: dict[tuple[int, int], str], told: _ToldProblems) -> None:
    try:
        status = path.stat()
        identity = (status.st_dev, status.st_ino)
        found = known.get(identity) or file_digest(path)
    except MissingFileError as error:
        told.add("files that cannot be read", error.problems[0])
        return
    except OSError as error:
        problem = Problem(name, f"a file that {MANIFEST_NAME} lists", error.strerror or str(error))
        told.add("files that cannot be read", problem)
        return
    known[identity] = found
    if found != digest:
        problem = Problem(name, f"SHA-256 {digest}, by {MANIFEST_NAME}", found, "it was changed, or damaged, since")
        told.add("files with another checksum", problem)


def _names(folder: Path) -> Iterator[str]:
    for parent, _, files in os.walk(folder):
        for file in files:
            name = Path(parent, file).relative_to(folder).as_posix()
            if name != MANIFEST_NAME:
                yield name


def _line(name: str, digest: str) -> bytes:
    raw = os.fsencode(name)
    escaped = raw.replace(b"\\", b"\\\\").replace(b"\n", b"\\n").replace(b"\r", b"\\r")
    return (b"\\" if escaped != raw else b"") + digest.encode() + b"  " + escaped + b"\n"


def _unescaped(raw: bytes, *, is_escaped: bool) -> str:
    if is_escaped:
        raw = re.sub(rb"\\[\\nr]", lambda match: _ESCAPES[match[0]], raw)
    return os.fsdecode(raw)


def _plain(name: str) -> str:
    """Return a relative path without the `./` that `find` and `sha256sum ./*` put in front."""
    *folders, last = name.split("/")
    is_absolute = name.startswith("/")
    return name if is_absolute else "/".join([*(part for part in folders if part not in {"", "."}), last])


def _is_inside(name: str) -> bool:
    return not ({"", ".", ".."} & set(name.split("/")) or "\0" in name)
