"""Tensors of a base that are the same bytes of a file of torch.save, of which an adapter changes some.

Programs differ in what such names are once the file is loaded: one tensor, or tensors of their own. Were each written
with its own delta, a loader that makes one of them would lose all deltas but one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from rawmerge.errors import Problem, quote
from rawmerge.formats.shard_names import is_pickle
from rawmerge.inputs.base_checkpoint import BaseCheckpoint
from rawmerge.inputs.tensor_source import TensorSource
from rawmerge.matching.disk_names import DiskNames
from rawmerge.matching.embedding_names import is_embedding
from rawmerge.matching.tie import find_tie
from rawmerge.merge_plan import ReplaceTensor, Step, UpdateTensor

_MOST_NAMES: Final = 4


def shared_bytes_problems(base: BaseCheckpoint, steps: Iterable[Step]) -> Iterator[Problem]:
    """Yield the tensors that are the same bytes as another which is not changed alike, but for tied embeddings.

    Args:
        base: the base; only files of torch.save have such tensors.
        steps: all that becomes of its tensors.
    """
    if not any(is_pickle(shard.path.name) for shard in base.shards):
        return
    changes = {step.entry.name: change for step in steps if (change := _change(step))}
    tied = _tied_names(base)
    for names in _sharing(base.tensors.items()):
        hit = [name for name in names if name in changes]
        alike = len(hit) == len(names) and all(changes[name] == changes[names[0]] for name in names)
        if hit and not alike and not tied.intersection(names) and not any(map(is_embedding, names)):
            shown = ", ".join(map(quote, names[:_MOST_NAMES])) + (" and others" if names[_MOST_NAMES:] else "")
            found = f"{len(names)} names of the same bytes: {shown}"
            hint = "save the base with a tensor of its own under each name, or under one name if they are one"
            yield Problem(hit[0], "a tensor of its own, for the adapter changes it", found, hint)


def _change(step: Step) -> tuple[object, ...]:
    """Return what a step does to a tensor of the base; nothing where that is kept, or cast."""
    if isinstance(step, ReplaceTensor):
        return (step.source,)
    return (step.updates, step.overlay) if isinstance(step, UpdateTensor) and (step.updates or step.overlay) else ()


def _tied_names(base: BaseCheckpoint) -> set[str]:
    """Return the names of tied embeddings and their biases, of which others see to it that they stay tied or part."""
    tie = find_tie(base.config, DiskNames(base, ""))
    if tie is None:
        return set()
    biases = (name for pair in tie.biases for name in pair)
    return {tie.input, tie.output, f"{tie.output.removesuffix('.weight')}.bias", *biases}


def _sharing(tensors: Iterable[tuple[str, TensorSource]]) -> Iterator[list[str]]:
    """Yield the names of each place that has more than one; what overlaps in part is refused as it is read."""
    places: dict[tuple[str, int, int], list[str]] = {}
    for name, at in tensors:
        if at.byte_count:
            places.setdefault((at.path, at.offset, at.byte_count), []).append(name)
    return (names for names in places.values() if len(names) > 1)
