"""In what a merge differs from one that was begun: each choice and input by name, before and now."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Final

from rawmerge.dtypes import AUTO_DTYPE, OUTPUT_DTYPES
from rawmerge.errors import Problem, quote
from rawmerge.merge_options import MergeOptions
from rawmerge.merge_plan import MergePlan

#: What a user calls a choice, and a part of a plan.
_NAMES: Final = {
    "compute_dtype": "--compute-dtype",
    "dtype": "--dtype",
    "moe_lora_b_layout": "--moe-lora-b-layout",
    "vocab": "--vocab",
    "tokenizer": "--tokenizer",
    "max_shard_size": "--max-shard-size",
    "format": "--format",
    "like": "--like",
    "force": "--force",
    "card": "the model card",
    "base_root": "BASE",
    "order": "--order",
    "replaced_by": "--replaced-by",
    "combine": "--combine",
    "density": "--density",
    "majority_sign": "--majority-sign",
    "seed": "--seed",
    "adapters": "ADAPTER",
}


def option_differences(before: MergeOptions, now: MergeOptions) -> Iterator[Problem]:
    """Yield a problem for each choice that is another."""
    yield from _differences(before, as_resolved(now, before.dtype))


def as_resolved(options: MergeOptions, dtype: str) -> MergeOptions:
    """Return what is asked for with the dtype of a plan of the same base, which `auto` stands for if it has one."""
    is_auto = options.dtype == AUTO_DTYPE and dtype in OUTPUT_DTYPES
    return dataclasses.replace(options, dtype=dtype) if is_auto else options


def plan_differences(before: MergePlan, now: MergePlan) -> Iterator[Problem]:
    """Yield a problem for each choice and input that is another; for parts that follow from them only without those."""
    causes = [*option_differences(before.options, now.options), *_differences(before, now, kind=str)]
    yield from causes or _differences(before, now)


def difference(name: str, before: str, now: str) -> Problem:
    """Return the problem of one choice or input, with what it was when the merge began and what it is now."""
    return Problem(name, f"{before}, as when the unfinished merge began", now)


def _differences(before: Any, now: Any, kind: type = object) -> Iterator[Problem]:
    for field in dataclasses.fields(before):
        values = getattr(before, field.name), getattr(now, field.name)
        if values[0] != values[1] and isinstance(values[0], kind):
            yield difference(_NAMES.get(field.name, field.name), *_texts(*values))


def _texts(before: object, now: object) -> tuple[str, str]:
    match before, now:
        case str(), str():
            return (quote(before) if before else "none"), (quote(now) if now else "none")
        case bool(), bool():
            return ("given" if before else "not given"), ("given" if now else "not given")
        case (int(), int()) | (float(), float()):
            return f"{before or 'none'}", f"{now or 'none'}"
    return "the same", "another"
