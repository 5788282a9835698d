"""What an output tells without its inputs: headers, index, config and record must agree with each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Final

from rawmerge.dtypes import DTYPES, OUTPUT_DTYPES
from rawmerge.errors import Problem, quote
from rawmerge.formats.config_text import CONFIG_NAME
from rawmerge.formats.weight_map import INDEX_NAME
from rawmerge.inputs.base_checkpoint import BaseCheckpoint
from rawmerge.inputs.identity import RECORD_NAME
from rawmerge.output.record import RECORD_FORMAT
from rawmerge.output.side_files import CHECKSUM_FILES, left_out_reason

_CODES: Final = {**OUTPUT_DTYPES, "float64": "F64"}


def checkpoint_problems(found: BaseCheckpoint, record: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield what contradicts itself in a checkpoint whose headers could be read.

    Args:
        found: the checkpoint.
        record: its merge record; empty where it has none.
    """
    yield from _index_problems(found)
    if record:
        yield from _record_problems(found, record)


def _index_problems(found: BaseCheckpoint) -> Iterator[Problem]:
    if found.weight_map is None:
        return
    listed = found.weight_map.shard_by_tensor
    for name in found.tensors:
        if name not in listed:
            yield Problem(name, f"a tensor that {INDEX_NAME} lists", "one that it does not: loaders pass it over")
    stated = found.weight_map.metadata.get("total_size")
    total = sum(at.byte_count for at in found.tensors.values())
    if stated is not None and stated != total:
        yield Problem(INDEX_NAME, f"a total_size of {total}, the bytes of all tensors", repr(stated)[:80])


def checkpoint_notes(found: BaseCheckpoint) -> Iterator[str]:
    """Yield what is odd, and may be meant: a dtype in the config that no tensor has, weights that are not listed."""
    fields = found.config.fields
    stated = fields.get("dtype", fields.get("torch_dtype"))
    code = _CODES.get(stated) if isinstance(stated, str) else None
    stored = Counter(at.dtype for at in found.tensors.values() if DTYPES[at.dtype].is_mergeable)
    if code and stored and code not in stored:
        yield f"{CONFIG_NAME} says {stated}, and most of the tensors are {stored.most_common(1)[0][0]}"
    own = {INDEX_NAME, *(shard.path.name for shard in found.shards), *CHECKSUM_FILES}
    names = sorted(path.name for path in found.root.iterdir()) if found.is_directory else []
    if others := [name for name in names if name not in own and left_out_reason(name, 0)]:
        yield f"it also holds {', '.join(map(quote, others[:8]))}, which some loaders take for its weights"


def _record_problems(found: BaseCheckpoint, record: Mapping[str, Any]) -> Iterator[Problem]:
    if record.get("format") != RECORD_FORMAT:
        yield Problem(RECORD_NAME, f"a record in the format {RECORD_FORMAT}", ascii(record.get("format"))[:80])
        return
    counts = record.get("tensors")
    if not isinstance(counts, dict) or not all(type(count) is int for count in counts.values()):
        yield Problem(RECORD_NAME, "a table of counts in 'tensors'", ascii(counts)[:80])
    elif sum(counts.values()) != len(found.tensors):
        yield Problem(RECORD_NAME, f"an account of {len(found.tensors)} tensors", f"one of {sum(counts.values())}")
