"""What an output tells without its inputs: headers, index, config and record must agree with each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Final

from rawmerge.dtypes import DTYPES, OUTPUT_DTYPES
from rawmerge.errors import Problem
from rawmerge.formats.config_text import CONFIG_NAME
from rawmerge.formats.weight_map import INDEX_NAME
from rawmerge.inputs.base_checkpoint import BaseCheckpoint
from rawmerge.inputs.identity import RECORD_NAME
from rawmerge.output.record import RECORD_FORMAT

_CODES: Final = {**OUTPUT_DTYPES, "float64": "F64"}


def checkpoint_problems(found: BaseCheckpoint, record: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield what contradicts itself in a checkpoint whose headers could be read.

    Args:
        found: the checkpoint.
        record: its merge record; empty where it has none.
    """
    yield from _index_problems(found)
    yield from _config_problems(found)
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


def _config_problems(found: BaseCheckpoint) -> Iterator[Problem]:
    """Yield a dtype in the config that no float tensor has."""
    fields = found.config.fields
    stated = fields.get("dtype", fields.get("torch_dtype"))
    code = _CODES.get(stated) if isinstance(stated, str) else None
    stored = Counter(at.dtype for at in found.tensors.values() if DTYPES[at.dtype].is_mergeable)
    if code and stored and code not in stored:
        usual = stored.most_common(1)[0][0]
        yield Problem(CONFIG_NAME, f"the dtype of some tensor, such as {usual}", f"{stated}, which none has")


def _record_problems(found: BaseCheckpoint, record: Mapping[str, Any]) -> Iterator[Problem]:
    if record.get("format") != RECORD_FORMAT:
        yield Problem(RECORD_NAME, f"a record in the format {RECORD_FORMAT}", ascii(record.get("format"))[:80])
        return
    counts, uses = record.get("tensors"), record.get("adapter_tensors")
    if not isinstance(counts, dict) or not all(type(count) is int for count in counts.values()):
        yield Problem(RECORD_NAME, "a table of counts in 'tensors'", ascii(counts)[:80])
    elif sum(counts.values()) != len(found.tensors):
        yield Problem(RECORD_NAME, f"an account of {len(found.tensors)} tensors", f"one of {sum(counts.values())}")
    for use in uses if isinstance(uses, list) else ():
        name = use.get("tensor") if isinstance(use, dict) else None
        if isinstance(name, str) and name and "*" not in name and name not in found.tensors:
            yield Problem(name, "a tensor that the record accounts for", "no such tensor")
