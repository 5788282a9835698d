"""What an output tells without its inputs: headers, index and record must agree with each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rawmerge.errors import Problem
from rawmerge.inputs.base_checkpoint import BaseCheckpoint
from rawmerge.inputs.identity import RECORD_NAME
from rawmerge.output.record import RECORD_FORMAT


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
    index = found.index_name
    if found.weight_map is None:
        if len(found.shards) > 1:
            hint = f"take {index} from where the shards came from, or write one"
            yield Problem(index, f"an index of {len(found.shards)} shards", "none: loaders do not find them", hint)
        return
    listed = found.weight_map.shard_by_tensor
    for name in found.tensors:
        if name not in listed:
            hint = "the index is of another checkpoint, or was edited: take the one that came with the shards"
            yield Problem(name, f"a tensor that {index} lists", "one that it does not: loaders pass it over", hint)
    stated = found.weight_map.metadata.get("total_size")
    total = sum(at.byte_count for at in found.tensors.values())
    # torch.save stores what has several names once, and who writes an index may count it once
    once = sum({(at.path, at.offset): at.byte_count for at in found.tensors.values() if at.byte_count}.values())
    if stated is not None and stated not in {total, once}:
        hint = "the index is of another checkpoint, or was made for tensors of another dtype"
        yield Problem(index, f"a total_size of {total}, the bytes of all tensors", repr(stated)[:80], hint)


def _record_problems(found: BaseCheckpoint, record: Mapping[str, Any]) -> Iterator[Problem]:
    if record.get("format") != RECORD_FORMAT:
        yield Problem(RECORD_NAME, f"a record in the format {RECORD_FORMAT}", ascii(record.get("format"))[:80])
        return
    counts = record.get("tensors")
    if not isinstance(counts, dict) or not all(type(count) is int for count in counts.values()):
        yield Problem(RECORD_NAME, "a table of counts in 'tensors'", ascii(counts)[:80])
    elif sum(counts.values()) != len(found.tensors):
        yield Problem(RECORD_NAME, f"an account of {len(found.tensors)} tensors", f"one of {sum(counts.values())}")
