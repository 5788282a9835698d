"""A base without the second name of its tied tensor, as `save_pretrained` writes it.

Files of torch.save list a tied tensor under each of its names, over one storage. The same adapters are to give the
same merge from such a base as from its safetensors twin, which has the tensor once.
"""

from __future__ import annotations

from dataclasses import replace

from rawmerge.formats.weight_map import WeightMap, format_weight_map
from rawmerge.inputs.base_checkpoint import BaseCheckpoint
from rawmerge.matching.disk_names import DiskNames
from rawmerge.matching.tie import find_tie


def without_tied_copy(base: BaseCheckpoint) -> BaseCheckpoint:
    """Return the base without an output projection that is its input embedding's bytes, if loaders tie the two."""
    name = tied_copy(base)
    return _without(base, name) if name else base


def tied_copy(base: BaseCheckpoint) -> str:
    """Return an output projection's name that is its input embedding's bytes, tied by loaders; else an empty string."""
    tie = find_tie(base.config, DiskNames(base, ""))
    if tie is None or not tie.is_certain or not tie.is_written:
        return ""
    return tie.output if base.tensors[tie.output].is_same_place(base.tensors[tie.input]) else ""


def _without(base: BaseCheckpoint, name: str) -> BaseCheckpoint:
    contents = tuple(
        replace(each, tensors=tuple(named for named in each.tensors if named[0] != name)) for each in base.contents
    )
    tensors = {other: source for other, source in base.tensors.items() if other != name}
    if not base.weight_map:
        return replace(base, contents=contents, tensors=tensors)
    places = {other: shard for other, shard in base.weight_map.shard_by_tensor.items() if other != name}
    listed = WeightMap(places, base.weight_map.metadata)
    return replace(base, contents=contents, tensors=tensors, weight_map=listed, index_text=format_weight_map(listed))
