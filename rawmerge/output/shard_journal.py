"""Which shards a merge has finished, noted in the hidden folder beside its output, so that the next one can go on.

The notes speed things up and decide nothing alone: a shard is taken over where the file is untouched since, in the same
run of the system, or where every byte of it is computed again and compared (`rawmerge.output.finished_shards`). So they
need not be durable themselves.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from rawmerge.errors import RefusedError
from rawmerge.file_errors import named_errors
from rawmerge.formats.strict_json import StrictJsonError, parse_json_object
from rawmerge.inputs.identity import MAX_RECORD_BYTES
from rawmerge.inputs.tensor_source import read_small_file
from rawmerge.output.earlier_output import MadeShard, made_fields, parse_made
from rawmerge.output.staging_directory import JOURNAL_NAME
from rawmerge.user_cache import replace_text

FORMAT: Final = "rawmerge-finished-1"
#: Linux, Documentation/admin-guide/sysctl/kernel.rst.
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
#: Space for notes of a merge whose disk runs full: about what a shard's note and a tensor's part of one take.
_RESERVE_NAME: Final = "reserve"
_SHARD_BYTES: Final = 400
_TENSOR_BYTES: Final = 200
_MOST_RESERVED: Final = 2**20
#: What reading something else than a note raises.
_NO_NOTE: Final = (StrictJsonError, LookupError, TypeError, ValueError, AttributeError, OverflowError)


@dataclass(frozen=True, slots=True)
class EarlierRun:
    """What a merge that was cut off noted.

    Attributes:
        choices: its inputs and options, for people.
        boot: the run of the system that it was in; empty where that is not known.
        shards: finished shard to what is remembered of it.
    """

    choices: Mapping[str, str]
    boot: str
    shards: Mapping[str, MadeShard] = field(default_factory=dict)


class ShardJournal:
    """The notes of one merge.

    Attributes:
        finished: shards that are noted.
    """

    def __init__(self, folder: Path, choices: Mapping[str, str], shards: Mapping[str, MadeShard]) -> None:
        """Begin them with shards that are there already, in place of those of an earlier merge.

        Raises:
            OSError: they cannot be written.
        """
        self.finished = set(shards)
        self._path = folder / JOURNAL_NAME
        beginning = {"format": FORMAT, "boot": boot_id(), "choices": dict(choices)}
        lines = [json.dumps(beginning), *(_line(name, shard) for name, shard in shards.items())]
        if self._path.is_dir() and not self._path.is_symlink():
            shutil.rmtree(self._path)  # nothing of rawmerge's
        with named_errors(self._path, "writing"):
            replace_text(self._path, "\n".join(lines) + "\n")

    def reserve(self, shards: int, tensors: int) -> None:
        """Take the space of the notes of so many, for when the disk is full; without it they may be lost."""
        with suppress(OSError):
            count = shards * _SHARD_BYTES + tensors * _TENSOR_BYTES
            (self._path.parent / _RESERVE_NAME).write_bytes(bytes(min(count, _MOST_RESERVED)))

    def note(self, name: str, shard: MadeShard) -> None:
        """Note a shard that is durable; where the note cannot be written, it will be made again."""
        raw = f"{_line(name, shard)}\n".encode()
        with suppress(OSError):
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            try:
                raw = raw[_written(descriptor, raw) :]
                if raw:  # the disk is full
                    (self._path.parent / _RESERVE_NAME).unlink(missing_ok=True)
                    raw = raw[_written(descriptor, raw) :]
            finally:
                os.close(descriptor)
            if not raw:
                self.finished.add(name)


def read_earlier_run(folder: Path) -> EarlierRun | None:
    """Return what a merge noted in its hidden folder; None where there is nothing that can be read."""
    try:
        raw = read_small_file(folder / JOURNAL_NAME, MAX_RECORD_BYTES)
        lines = raw.split(b"\n")[:-1]  # a last line without an end is half a line
        first = parse_json_object(lines[0])
        if first.get("format") != FORMAT:
            return None
        choices = {str(name): str(value) for name, value in first["choices"].items()}
        return EarlierRun(choices, str(first["boot"]), dict(_parsed(lines[1:])))
    except (OSError, RefusedError, *_NO_NOTE):
        return None


def boot_id() -> str:
    """Return what the system calls the time since it was started; an empty text where it has no name for it."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def _written(descriptor: int, raw: bytes) -> int:
    """Write as much as there is room for; return how many bytes that was."""
    try:
        return os.write(descriptor, raw)
    except OSError:
        return 0


def _parsed(lines: Iterable[bytes]) -> Iterator[tuple[str, MadeShard]]:
    for line in lines:
        with suppress(*_NO_NOTE):  # half a line, of a disk that was full
            fields = parse_json_object(line)
            yield str(fields["finished"]), parse_made(fields)


def _line(name: str, shard: MadeShard) -> str:
    fields: dict[str, Any] = {"finished": name, **made_fields(shard)}
    return json.dumps(fields)
