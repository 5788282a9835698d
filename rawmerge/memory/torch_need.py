"""What a merge needs torch for, in words: the steps that the compiled kernel does not do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from rawmerge.computing.plain_pairs import find_pairs
from rawmerge.dtypes import DTYPES
from rawmerge.errors import quote
from rawmerge.merge_plan import COMBINATION, ROUNDING, ReplaceTensor, UpdateTensor
from rawmerge.methods import ADAPTER_KINDS

#: What people call LoRA's other ways, which are one kind of adapter with it.
_LORA_TITLES: Final = {
    "dora": "DoRA",
    "dora_columns": "DoRA",
    "lora_bias": "LoRA's biases",
    "expert_lora": "LoRA of fused experts",
    "token_rows": "trained token rows",
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "bdlora": "BD-LoRA",
    "kasa": "KaSA",
    "kasa_truncation": "KaSA",
    "lora_twice": "LoRA on a tensor that two modules share",
    "combined_lora": "--combine",
}
_TRIAL: Final = "to be asked how it sums, once"
_CAST: Final = "for the cast to "
#: How many needs are told.
_MOST: Final = 3


@dataclass(frozen=True, slots=True)
class TorchNeed:
    """Why torch is imported.

    Attributes:
        texts: each need, the one of most tensors first; empty where torch is not needed.
        is_cast: whether casts are all it is needed for, beside being asked how it sums.
        is_trial: whether it is needed only to be asked how it sums, which is remembered.
    """

    texts: tuple[str, ...] = ()
    is_cast: bool = False
    is_trial: bool = False

    def __str__(self) -> str:
        """Return the needs as one list, long ones cut with a count."""
        more = f"; {len(self.texts) - _MOST} other needs" if len(self.texts) > _MOST else ""
        return "; ".join(self.texts[:_MOST]) + more


def torch_need(reasons: Iterable[tuple[str, str]]) -> TorchNeed:
    """Return what torch is needed for, from (reason, name of a tensor) of each step that needs it."""
    names: dict[str, list[str]] = {}
    for reason, name in reasons:
        names.setdefault(reason, []).append(name)
    ordered = sorted(names, key=lambda reason: -len(names[reason]))
    texts = tuple(reason if reason == _TRIAL else f"{reason} ({_listed(names[reason])})" for reason in ordered)
    others = [reason for reason in ordered if reason != _TRIAL]
    is_cast = bool(others) and all(reason.startswith(_CAST) for reason in others)
    return TorchNeed(texts, is_cast, is_trial=bool(ordered) and not others)


def torch_reason(
    step: UpdateTensor | ReplaceTensor, blocks: Sequence[int | None], compute_dtype: str, *, has_kernel: bool
) -> str:
    """Return why a step needs torch; empty where it does not.

    Args:
        step: one that is computed, not copied.
        blocks: the block of each of its pairs, 0 for none, None where no trial was made; empty where it has no pairs.
        compute_dtype: the plan's.
        has_kernel: whether the compiled kernel is there and used.
    """
    if blocks:
        known = "for sums that the kernel makes otherwise on this processor" if 0 in blocks else ""
        return known or (_TRIAL if None in blocks else "")
    if isinstance(step, ReplaceTensor) or not (step.updates or step.overlay):
        return f"{_CAST}{_dtype_name(step.entry.dtype)}"
    if not has_kernel:
        return "for all that changes, as no kernel computes here"
    if find_pairs(step, compute_dtype):
        return "for low products, whose bits depend on the threads of this program's torch"
    return _of_updates(step)


def _of_updates(step: UpdateTensor) -> str:
    """Return why the kernel does not do a step that is no plain LoRA, or one of a dtype or shape that it leaves."""
    kinds = list(dict.fromkeys(update.kind for update in step.updates if update.kind not in (ROUNDING, COMBINATION)))
    if any(update.kind == COMBINATION for update in step.updates):
        return "for --combine"
    if step.overlay:
        return "for rows of another vocabulary"
    others = [kind for kind in kinds if kind != "lora"]
    if others:
        return f"for {', '.join(map(_title, others))}"
    if step.held_dtype or step.base_dtype != step.source.dtype:
        return f"for roundings to {_dtype_name(step.held_dtype or step.base_dtype)} on the way"
    return "for LoRA of a shape or dtype that the kernel leaves to it"


def _title(kind: str) -> str:
    if kind in _LORA_TITLES:
        return _LORA_TITLES[kind]
    return next((own.title for own in ADAPTER_KINDS.values() if kind in own.methods), kind)


def _dtype_name(code: str) -> str:
    return DTYPES[code].torch_name or code


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{quote(names[0])}{more}"
