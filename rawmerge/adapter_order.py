"""An order of several adapters that is their own, not that in which they are named: by what they hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from rawmerge.merge_plan import MergePlan
from rawmerge.output.record import file_sha256

#: Bytes of a file in which two adapters of the same training nearly always differ.
_LOOK: Final = 2**20


def own_order(plans: Sequence[MergePlan]) -> list[list[object]]:
    """Return keys that sort adapters by what they are, wherever they lie; files are read only where that is needed.

    Raises:
        InputChangedError: a file is shorter than it was; OSError: it cannot be read.
    """
    keys: list[list[object]] = [[] for _ in plans]
    for look in (_facts, _beginnings, _contents):
        before = [list(key) for key in keys]
        for key, own, plan in zip(keys, before, plans, strict=True):
            if before.count(own) > 1:  # else it is told apart already
                key.append(look(plan))
    return keys


def _facts(plan: MergePlan) -> object:
    adapter = plan.adapters[0]
    return adapter.weight, adapter.config_sha256, [file.header_sha256 for file in adapter.files]


def _beginnings(plan: MergePlan) -> object:
    return [file_sha256(replace(file, byte_count=min(file.byte_count, _LOOK))) for file in plan.adapters[0].files]


def _contents(plan: MergePlan) -> object:
    return [file_sha256(file) for file in plan.adapters[0].files]
