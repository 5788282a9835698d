"""`SHA256SUMS`: the SHA-256 of every file of an output, as `sha256sum -c` reads it.

Source: GNU coreutils, "Invoking sha256sum" and "Invoking md5sum" (the escapes of names).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final

from rawmerge.errors import MissingFileError, Problem
from rawmerge.inputs.tensor_source import open_regular_file

MANIFEST_NAME: Final = "SHA256SUMS"
MAX_MANIFEST_BYTES: Final = 16 * 2**20
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
    """Return file name to digest.

    Raises:
        ValueError: a line is none of `sha256sum`'s, a name twice, or one that leads out of the folder.
    """
    digests: dict[str, str] = {}
    for number, line in enumerate(raw.split(b"\n"), 1):
        if not line:
            continue
        match = _LINE.fullmatch(line)
        name = _unescaped(match["name"], is_escaped=bool(match["escape"])) if match else ""
        if match is None or name in digests or not _is_inside(name):
            raise ValueError(f"line {number}")
        digests[name] = match["digest"].decode().lower()
    return digests


def manifest_problems(folder: Path, raw: bytes, needed: Iterable[str] = ()) -> Iterator[Problem]:
    """Yield each file that is missing, is no regular file, or has another digest than a manifest says.

    Args:
        folder: where the files lie.
        raw: the manifest.
        needed: names that it must list.

    Raises:
        OSError: a file cannot be read.
    """
    try:
        digests = parse_manifest(raw)
    except ValueError as error:
        yield Problem(MANIFEST_NAME, "lines of a digest and a file's name in the folder, each once", str(error))
        return
    for name in needed:
        if name not in digests:
            yield Problem(name, f"a file that {MANIFEST_NAME} lists", "one that it does not")
    for name, digest in digests.items():
        path = folder / name
        if not os.path.lexists(path):
            yield Problem(name, f"a file that {MANIFEST_NAME} lists", "no such file")
        else:
            yield from _digest_problems(path, name, digest)


def _digest_problems(path: Path, name: str, digest: str) -> Iterator[Problem]:
    try:
        found = file_digest(path)
    except MissingFileError as error:
        yield from error.problems
        return
    if found != digest:
        yield Problem(name, f"SHA-256 {digest}, by {MANIFEST_NAME}", found, "it was changed, or damaged, since")


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


def _is_inside(name: str) -> bool:
    return not ({"", ".", ".."} & set(name.split("/")) or "\0" in name)
