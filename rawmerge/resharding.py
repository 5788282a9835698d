"""A finished plan with its tensors in other shards: as many as a largest size calls for, or one file.

Only the plan changes. Every step keeps its source, so that what runs, checks or resumes a plan needs to know nothing of
it.

Source: huggingface_hub 2.4 `split_state_dict_into_shards_factory` (which tensor goes where, names) and transformers
5.24 `PreTrainedModel.save_pretrained` (the index).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any, Final

from rawmerge.byte_sizes import format_bytes
from rawmerge.dtypes import DTYPES
from rawmerge.formats.shard_header import format_shard_header, parse_shard_header
from rawmerge.formats.shard_names import shard_names
from rawmerge.formats.weight_map import INDEX_NAME, WeightMap, format_weight_map, parse_weight_map
from rawmerge.merge_plan import MergePlan, ShardPlan, Step, WrittenFile

#: Beginnings of the codes of dtypes that torch's parameters have; integers are buffers.
_PARAMETER_DTYPES: Final = ("F", "BF", "C")


def reshard(plan: MergePlan, max_bytes: int) -> MergePlan:
    """Return the plan with its tensors in shards of at most `max_bytes` each, in the order in which it has them.

    A tensor larger than that gets a shard of its own. Shards and index have the names that transformers gives them;
    what fits in one file is `model.safetensors`, and has no index. A shard that holds just the tensors of one of the
    plan's own is that one, byte for byte, whatever its name is now.

    Args:
        plan: any plan.
        max_bytes: of the tensors of a shard, the header not counted; at least 1.
    """
    groups = list(_groups(plan.steps(), max_bytes))
    source = _OwnShards(plan.shards)
    shards = tuple(map(source.regrouped, shard_names(len(groups)), groups))
    written = tuple(file for file in plan.written_files if file.name != INDEX_NAME)
    index = [WrittenFile(INDEX_NAME, _index_text(shards, plan))] if len(shards) > 1 else []
    notes = (*plan.notes, *_notes(plan.steps(), max_bytes))
    return replace(plan, shards=shards, written_files=(*written, *index), notes=notes)


def _groups(steps: Iterable[Step], max_bytes: int) -> Iterator[list[Step]]:
    """Yield the steps of each shard; one of a single large tensor comes before the one that was being filled."""
    filling: list[Step] = []
    filled = 0
    for step in steps:
        size = step.entry.byte_count
        if size > max_bytes:
            yield [step]
            continue
        if filled + size > max_bytes:
            yield filling
            filling, filled = [], 0
        filling.append(step)
        filled += size
    if filling:
        yield filling


class _OwnShards:
    """The shards that a plan has, of which others are made."""

    def __init__(self, shards: Sequence[ShardPlan]) -> None:
        self._by_tensors = {frozenset(step.entry.name for step in shard.steps): shard for shard in shards}
        self._metadata: dict[str, Mapping[str, str] | None] = {}
        for shard in shards:
            self._metadata |= dict.fromkeys((step.entry.name for step in shard.steps), _metadata(shard))

    def regrouped(self, name: str, steps: Sequence[Step]) -> ShardPlan:
        """Return a shard of some of the plan's steps."""
        if same := self._by_tensors.get(frozenset(step.entry.name for step in steps)):
            return replace(same, name=name)
        placed = tuple(_place(steps))
        return ShardPlan(name, format_shard_header([step.entry for step in placed], self._joined(steps)), placed)

    def _joined(self, steps: Sequence[Step]) -> dict[str, str] | None:
        """Return what the headers say that the steps come from; of two that differ, the first."""
        joined: dict[str, str] | None = None
        for step in reversed(steps):
            if (table := self._metadata[step.entry.name]) is not None:
                joined = {**(joined or {}), **table}
        return joined


def _metadata(shard: ShardPlan) -> Mapping[str, str] | None:
    size = shard.byte_count - shard.data_start
    return parse_shard_header(shard.header_text.encode(), size, shard.name).metadata


def _place(steps: Sequence[Step]) -> Iterator[Step]:
    """Yield a shard's steps with new offsets, large elements first, so that each tensor lies at a multiple of its own.

    The safetensors library sorts by dtype as well, for the same reason; here tensors of one size keep their order.
    """
    position = 0
    for step in sorted(steps, key=lambda step: -DTYPES[step.entry.dtype].bits):
        end = position + step.entry.byte_count
        yield replace(step, entry=replace(step.entry, start=position, end=end))
        position = end


def _index_text(shards: Iterable[ShardPlan], plan: MergePlan) -> str:
    """Return the index; the text of the one that the plan has where that says the same."""
    steps = list(plan.steps())
    text = next((file.text for file in plan.written_files if file.name == INDEX_NAME), "")
    before = parse_weight_map(text.encode(), INDEX_NAME) if text else None
    metadata: dict[str, Any] = dict(before.metadata) if before else {"total_parameters": _parameter_count(steps)}
    metadata["total_size"] = sum(step.entry.byte_count for step in steps)
    index = WeightMap({step.entry.name: shard.name for shard in shards for step in shard.steps}, metadata)
    return text if index == before else format_weight_map(index)


def _parameter_count(steps: Iterable[Step]) -> int:
    """Return the elements of all tensors that may be parameters: floats, for headers do not tell a float's role."""
    entries = (step.entry for step in steps)
    return sum(prod(entry.shape) for entry in entries if entry.dtype.startswith(_PARAMETER_DTYPES))


def _notes(steps: Iterable[Step], max_bytes: int) -> Iterator[str]:
    larger = [size for step in steps if (size := step.entry.byte_count) > max_bytes]
    if larger:
        tensors = "1 tensor is" if len(larger) == 1 else f"{len(larger)} tensors are"
        shards = "a shard of its own" if len(larger) == 1 else "shards of their own"
        yield (
            f"{tensors} larger than --max-shard-size {format_bytes(max_bytes)} and in {shards}: "
            f"up to {format_bytes(max(larger))}"
        )
