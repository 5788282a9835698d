"""What is in the file of a planned shard, whichever of the two formats it has."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from rawmerge.errors import RefusedError
from rawmerge.formats.shard_names import is_pickle
from rawmerge.inputs.tensor_source import read_pickle_file, read_shard_file
from rawmerge.merge_plan import ShardPlan


def first_bytes(shard: ShardPlan) -> Sequence[int]:
    """Return where each tensor begins in the file, in the order of the steps."""
    if is_pickle(shard.name):
        return shard.layout.tensor_starts
    return tuple(shard.data_start + step.entry.start for step in shard.steps)


def is_shard_file(path: Path, shard: ShardPlan) -> bool:
    """Whether a file has a shard's size, and says of its tensors what that would; they are not looked at.

    Raises:
        OSError: it cannot be read.
    """
    try:
        return (_is_archive_of if is_pickle(shard.name) else _has_header_of)(path, shard)
    except RefusedError:
        return False


def _has_header_of(path: Path, shard: ShardPlan) -> bool:
    found, digest = read_shard_file(path), hashlib.sha256(shard.header_text.encode()).hexdigest()
    return (found.size, found.digest) == (shard.byte_count, digest)


def _is_archive_of(path: Path, shard: ShardPlan) -> bool:
    found = read_pickle_file(path)
    listed = [(name, at.dtype, at.shape, at.offset) for name, at in found.sources()]
    starts = zip(shard.steps, first_bytes(shard), strict=True)
    planned = [(step.entry.name, step.entry.dtype, step.entry.shape, start) for step, start in starts]
    return found.size == shard.byte_count and listed == planned
