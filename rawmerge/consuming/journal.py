"""What a merge that consumes its base has done so far, so that it can be finished after a crash.

The journal is a file of JSON lines that only grows; each line is durable before what it allows is done. The first holds
all that is needed to go on without the base shards that are gone, above all the plan.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from rawmerge.computing.losses import Losses
from rawmerge.errors import OutputError, Problem, RefusedError
from rawmerge.formats.strict_json import StrictJsonError, parse_json_object
from rawmerge.inputs.file_status import FileStatus
from rawmerge.inputs.tensor_source import read_small_file
from rawmerge.merge_plan import MergePlan
from rawmerge.output.loss_fields import loss_fields, parse_losses
from rawmerge.output.staging_directory import sync_directory
from rawmerge.plan_json import format_plan, parse_plan

FORMAT: Final = "rawmerge-journal-2"
JOURNAL_NAME: Final = "journal.jsonl"
#: The plan of a large model with an adapter on each expert takes a tenth of it.
MAX_JOURNAL_BYTES: Final = 2**30


@dataclass(frozen=True, slots=True)
class Beginning:
    """What the merge was when it began; the same must hold when it goes on.

    Attributes:
        plan: what it writes.
        means: by name, what else decides the output's bits: versions, device.
        base: base shard to its status: no other file is ever deleted.
        adapter: file of the adapter to the SHA-256 of its content.
    """

    plan: MergePlan
    means: Mapping[str, str]
    base: Mapping[str, FileStatus]
    adapter: Mapping[str, str]


@dataclass(slots=True)
class Journal:
    """The journal of one merge.

    Attributes:
        path: the file.
        beginning: what the merge was when it began.
        is_prepared: all files but the shards are durable.
        finished: durable output shard to its updated tensors of which no element differs from the base.
        losses: what rounding left of the deltas of their updated tensors, and what casts took from others.
        has_changed: a tensor of a finished shard differs from the base's.
        deleted: base shard to the output shard after which it was deleted, or was about to be.
        is_complete: only publishing is left.
        failed_tensor: output tensor whose values allow no merge, so that going on would fail again; else empty.
    """

    path: Path
    beginning: Beginning
    is_prepared: bool = False
    finished: dict[str, tuple[str, ...]] = field(default_factory=dict)
    losses: Losses = field(default_factory=Losses)
    has_changed: bool = False
    deleted: dict[str, str] = field(default_factory=dict)
    is_complete: bool = False
    failed_tensor: str = ""

    def begin(self) -> None:
        """Write the first line, durably with the folder; the file must not exist."""
        document = {
            "format": FORMAT,
            "means": dict(self.beginning.means),
            "base": self.beginning.base,
            "adapter": dict(self.beginning.adapter),
            "plan": json.loads(format_plan(self.beginning.plan)),
        }
        self._append(document)
        sync_directory(self.path.parent)
        sync_directory(self.path.parent.parent)

    def prepared(self) -> None:
        """Note that all files but the shards are durable."""
        self._note({"prepared": True})

    def finish(self, shard_name: str, unchanged: tuple[str, ...], losses: Losses, *, changes: bool) -> None:
        """Note that an output shard is durable, and whether it differs from the base."""
        line = {"finished": shard_name, "unchanged": unchanged, "changes": changes}
        self._note(line | loss_fields(losses))

    def delete(self, base_path: str, shard_name: str) -> None:
        """Note that a base shard is about to be deleted, now that an output shard has taken its place."""
        self._note({"deleted": base_path, "after": shard_name})

    def complete(self) -> None:
        """Note that the output only has to be published."""
        self._note({"complete": True})

    def fail(self, tensor_name: str) -> None:
        """Note that the values of a tensor allow no merge."""
        self._note({"failed": tensor_name})

    def apply(self, line: Mapping[str, Any]) -> None:
        """Take over what a line says; KeyError or TypeError: it is none of this journal's."""
        if "finished" in line:
            self.finished[line["finished"]] = tuple(line["unchanged"])
            self.losses |= parse_losses(line)
            self.has_changed |= line["changes"]
        elif "deleted" in line:
            self.deleted[line["deleted"]] = line["after"]
        elif "prepared" in line:
            self.is_prepared = line["prepared"]
        elif "failed" in line:
            self.failed_tensor = line["failed"]
        else:
            self.is_complete = line["complete"]

    def _note(self, line: Mapping[str, Any]) -> None:
        self._append(line)
        self.apply(line)

    def _append(self, line: Mapping[str, Any]) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        with os.fdopen(os.open(self.path, flags, 0o666), "ab", buffering=0) as file:
            raw = memoryview((json.dumps(line) + "\n").encode())
            while raw:
                raw = raw[file.write(raw) :]
            os.fsync(file.fileno())


def read_journal(folder: Path) -> Journal | None:
    """Return the journal in `folder`; None where there is none, or where the crash came before its first line.

    Raises:
        OutputError: it cannot be read.
    """
    path = folder / JOURNAL_NAME
    if not os.path.exists(path):  # noqa: PTH110  # false for a name that no file can have, which Path says loudly
        return None
    try:
        lines = _whole_lines(read_small_file(path, MAX_JOURNAL_BYTES))
        return _parse(path, lines) if lines else None
    except (OSError, RefusedError, StrictJsonError, LookupError, TypeError, ValueError, AttributeError) as error:
        hint = (
            "it may be another version's, or damaged; the folder holds the only copy of what is no longer in the base"
        )
        raise OutputError(Problem(str(path), "the journal of an unfinished merge", str(error)[:200], hint)) from error


def drop_half_line(journal: Journal) -> None:
    """Cut off a line that a crash left unfinished, before more are written."""
    raw = journal.path.read_bytes()
    whole = sum(len(line) + 1 for line in _whole_lines(raw))
    if whole < len(raw):
        os.truncate(journal.path, whole)


def _whole_lines(raw: bytes) -> list[bytes]:
    """Return the lines but a last one that was not written whole: without an end, or with holes in it.

    A file system may have a file's size on the disk, and not all of what was added. What such a line allows has not
    been done.
    """
    lines = raw.split(b"\n")[:-1]
    try:
        parse_json_object(lines[-1] if lines else b"{}")
    except (StrictJsonError, ValueError):
        return lines[:-1]
    return lines


def _parse(path: Path, lines: list[bytes]) -> Journal:
    first, *more = map(parse_json_object, lines)
    if first["format"] != FORMAT:
        raise ValueError(f"expected {FORMAT}")
    beginning = Beginning(
        plan=parse_plan(json.dumps(first["plan"])),
        means=first["means"],
        base={name: FileStatus(*status) for name, status in first["base"].items()},
        adapter=first["adapter"],
    )
    journal = Journal(path, beginning)
    for line in more:
        journal.apply(line)
    return journal
