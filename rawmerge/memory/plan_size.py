"""What a plan takes in memory, told from its steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final

from rawmerge.combination import parts_of
from rawmerge.formats.shard_names import is_pickle
from rawmerge.merge_plan import ROUNDING, KeepTensor, MergePlan, Step, UpdateTensor

#: What a planned tensor takes: one that is changed, with its updates and names, and one that is kept.
CHANGED_BYTES: Final = 5500
KEPT_BYTES: Final = 1200
#: What each further adapter takes for a tensor that it changes, with a plan of its own that became part of the whole.
#: Measured with 2 to 6 adapters on 800 to 2500 tensors: 5.2 to 6.3 kB.
FURTHER_BYTES: Final = 6200
#: What each tensor takes of the file that lists most, while that is looked at again: the values of its header, or of
#: its pickle's opcodes with its entry in the zip. Measured with 5,000 to 70,000 tensors in one file: 1.2 and 1.8 kB.
PARSED_BYTES: Final = {False: 1300, True: 2000}
#: What each takes that is written to a file of torch.save, beside its part of the table: places and checksums, the list
#: of members at the end, and the index with other names.
_ARCHIVED_BYTES: Final = 300


def plan_bytes(steps: Sequence[Step], adapter_count: int) -> int:
    """Return the bytes that a plan of these steps takes while it is made.

    Args:
        steps: all of them.
        adapter_count: how many adapters it merges.
    """
    changed = [step for step in steps if not isinstance(step, KeepTensor)]
    further = sum(map(_further_pairs, changed)) if adapter_count > 1 else 0
    return CHANGED_BYTES * len(changed) + KEPT_BYTES * (len(steps) - len(changed)) + FURTHER_BYTES * further


def table_bytes(plan: MergePlan) -> int:
    """Return the bytes that tables of tensors take beside the plan: of the inputs as read, of archives as written."""
    listed = (count * PARSED_BYTES[is_pickle(path)] for path, count in Counter(_sources(plan)).items())
    made = [shard for shard in plan.shards if is_pickle(shard.name)]
    archived = sum(len(shard.layout.table) + _ARCHIVED_BYTES * len(shard.steps) for shard in made)
    return max(listed, default=0) + archived


def _sources(plan: MergePlan) -> Iterator[str]:
    """Yield the file of each tensor of the inputs."""
    yield from (step.source.path for step in plan.steps())
    yield from (file.path for adapter in plan.adapters for file in adapter.files for _ in adapter.uses)


def _further_pairs(step: Step) -> int:
    """Return how many updates of adapters a tensor gets beyond the first."""
    updates = step.updates if isinstance(step, UpdateTensor) else ()
    return max(0, sum(len(list(parts_of(update))) for update in updates if update.kind != ROUNDING) - 1)
