"""A finished plan whose shards become files of `torch.save`: other names, another index, the same steps.

Source: transformers 4.57 `utils/__init__.py` (`WEIGHTS_NAME`, `WEIGHTS_INDEX_NAME`) and
`PreTrainedModel.save_pretrained` with `safe_serialization=False` (the index).
"""

from __future__ import annotations

from dataclasses import replace

from rawmerge.errors import PlanError
from rawmerge.formats.shard_names import PICKLE_NAME, pickle_name
from rawmerge.formats.weight_map import INDEX_NAME, PICKLE_INDEX_NAME, WeightMap, format_weight_map, parse_weight_map
from rawmerge.merge_plan import MergePlan, WrittenFile
from rawmerge.output.side_files import apart_from


def as_pickles(plan: MergePlan) -> MergePlan:
    """Return the plan with files of `torch.save` in place of safetensors files, each with the same tensors.

    A shard that is the only one and in no index gets the name that loaders look for.

    Args:
        plan: any plan of safetensors files.

    Raises:
        PlanError: a tensor's dtype is one that torch does not save, or a shard has too many tensors.
    """
    has_index = any(file.name == INDEX_NAME for file in plan.written_files)
    only = {} if has_index or len(plan.shards) > 1 else {plan.shards[0].name: PICKLE_NAME}
    shards = tuple(replace(shard, name=only.get(shard.name) or pickle_name(shard.name)) for shard in plan.shards)
    if problems := [problem for shard in shards for problem in shard.format_problems()]:
        raise PlanError(*problems)
    written = tuple(_renamed(file) if file.name == INDEX_NAME else file for file in plan.written_files)
    own = {*(shard.name for shard in shards), PICKLE_INDEX_NAME}  # a set of the base's by these names has no more say
    left_out = tuple(file for file in plan.left_out if file.name not in own)
    side_files, gone = apart_from(plan.side_files, own)
    return replace(plan, shards=shards, written_files=written, side_files=side_files, left_out=(*left_out, *gone))


def _renamed(index: WrittenFile) -> WrittenFile:
    before = parse_weight_map(index.text.encode(), INDEX_NAME)
    named = {tensor: pickle_name(shard) for tensor, shard in before.shard_by_tensor.items()}
    return WrittenFile(PICKLE_INDEX_NAME, format_weight_map(WeightMap(named, before.metadata)))
