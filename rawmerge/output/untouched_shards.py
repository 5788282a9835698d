"""Which output shards are a base shard byte for byte, told from the plan alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from rawmerge.formats.shard_names import is_pickle
from rawmerge.merge_plan import InputFile, KeepTensor, MergePlan, ShardPlan


def untouched_shards(plan: MergePlan) -> dict[str, str]:
    """Return output shard name to the path of the base shard that it equals, header and tensors alike."""
    files = {file.path: file for file in plan.base_files}
    found = ((shard.name, _twin(shard, files)) for shard in plan.shards)
    return {name: path for name, path in found if path}


def _twin(shard: ShardPlan, files: Mapping[str, InputFile]) -> str:
    """Return the path of the base file that the shard equals; an empty string where there is none."""
    paths = {step.source.path if isinstance(step, KeepTensor) else "" for step in shard.steps}
    file = files.get(paths.pop()) if len(paths) == 1 else None
    if file is None or file.byte_count != shard.byte_count or is_pickle(shard.name):
        return ""
    digest = hashlib.sha256(shard.header_text.encode()).hexdigest()
    start = shard.data_start
    is_in_place = all(step.source.offset == start + step.entry.start for step in shard.steps)
    return file.path if is_in_place and digest == file.header_sha256 else ""
