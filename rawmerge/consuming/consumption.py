"""`--consume-base`: in which order shards are written, which base shards may go after each, and the space it takes.

A base shard may be deleted once every output shard that reads it, or has its name, is durable. None goes before the
merge has changed a tensor: a merge that changes nothing is an error, and must leave the base whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from rawmerge.inputs.tensor_source import TensorSource
from rawmerge.merge_plan import MergePlan, ReplaceTensor, ShardPlan, UpdateTensor
from rawmerge.output.outcome import has_other_tensors

_Order: TypeAlias = tuple[ShardPlan, ...]


@dataclass(frozen=True, slots=True)
class Consumption:
    """How the base gives way to the output.

    Attributes:
        order: the output's shards, in the order in which they are written.
        frees: output shard name to the base shards that no later one reads.
        peak: most bytes that are taken at any time, beside what was taken before.
    """

    order: _Order
    frees: Mapping[str, tuple[str, ...]]
    peak: int


def plan_consumption(plan: MergePlan, finished: Collection[str] = ()) -> Consumption:
    """Return the order of shards that takes least space, the plan's own where no other is better.

    Args:
        plan: what will be written.
        finished: output shards that are there already; they come first, and take no space any more.
    """
    readers = _readers(plan)
    sizes = {file.path: file.byte_count for file in plan.base_files}
    own = {
        shard.name: sum(sizes[path] for path, names in readers.items() if names == {shard.name})
        for shard in plan.shards
    }
    done = [shard for shard in plan.shards if shard.name in finished]
    rest = [shard for shard in plan.shards if shard.name not in finished]
    keys: tuple[Callable[[ShardPlan], Any], ...] = (
        lambda _: 0,
        lambda shard: not _changes(shard),
        lambda shard: (not _changes(shard), *_least_first(shard.byte_count, own[shard.name])),
    )
    changes_anyway = has_other_tensors(plan) or any(map(_changes, done))
    small = plan.byte_count - sum(shard.byte_count for shard in plan.shards)
    found = [
        Consumption(
            order, frees := _frees(order, readers), _peak(order[len(done) :], frees, sizes, small, changes_anyway)
        )
        for order in ((*done, *sorted(rest, key=key)) for key in keys)
    ]
    return min(found, key=lambda each: each.peak)


def _least_first(taken: int, freed: int) -> tuple[bool, int]:
    """Sort shards that free space before those that take it; the smallest first, then those that free most."""
    grows = taken > freed
    return grows, -freed if grows else taken


def _changes(shard: ShardPlan) -> bool:
    """Whether a tensor of the shard may differ from the base's; a cast alone does not count, as for a merge."""
    return any(
        isinstance(step, ReplaceTensor) or (isinstance(step, UpdateTensor) and step.updates) for step in shard.steps
    )


def _readers(plan: MergePlan) -> dict[str, set[str]]:
    """Return base shard to the output shards that need it."""
    paths = {Path(file.path).name: file.path for file in plan.base_files}
    readers: dict[str, set[str]] = {path: set() for path in paths.values()}
    for shard in plan.shards:
        for path in {*_paths(shard.steps), paths.get(shard.name, "")}:
            if path in readers:
                readers[path].add(shard.name)
    return readers


def _paths(value: Any) -> Iterator[str]:
    """Yield the file of every tensor that a part of a plan reads."""
    if isinstance(value, TensorSource):
        yield value.path
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _paths(getattr(value, field.name))
    elif isinstance(value, Mapping):
        yield from _paths(tuple(value.values()))
    elif isinstance(value, tuple):
        for item in value:
            yield from _paths(item)


def _frees(order: Iterable[ShardPlan], readers: Mapping[str, set[str]]) -> dict[str, tuple[str, ...]]:
    waiting = {path: set(names) for path, names in readers.items() if names}
    frees: dict[str, tuple[str, ...]] = {}
    for shard in order:
        for names in waiting.values():
            names.discard(shard.name)
        frees[shard.name] = tuple(path for path, names in waiting.items() if not names)
        waiting = {path: names for path, names in waiting.items() if names}
    return frees


def _peak(
    order: Iterable[ShardPlan],
    frees: Mapping[str, tuple[str, ...]],
    sizes: Mapping[str, int],
    taken: int,
    has_changed: bool,
) -> int:
    """Return the most bytes that are taken at any time, `taken` of them before the first shard."""
    peak, pending = taken, 0
    for shard in order:
        taken += shard.byte_count
        peak = max(peak, taken)
        pending += sum(sizes[path] for path in frees[shard.name])
        has_changed = has_changed or _changes(shard)
        if has_changed:
            taken, pending = taken - pending, 0
    return peak
