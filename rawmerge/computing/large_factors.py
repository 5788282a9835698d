"""Which left factors of plain LoRA are too large to be held on the torch path, so that each tile reads its rows."""

from __future__ import annotations

from math import prod
from typing import Final

from rawmerge.merge_plan import Update
from rawmerge.methods.lora import KIND, WHOLE_ELEMENTS

#: Elements of a left factor that are held: 8 MiB of float32.
HELD_ELEMENTS: Final = 2**21


def left_role(update: Update) -> str:
    """Return the role of a plain pair's left factor that is too large to be held; empty where there is none."""
    if update.kind != KIND:
        return ""
    (role_a, lora_a), (role_b, lora_b) = sorted(update.tensors.items())
    role, source = (role_a, lora_a) if update.settings["is_transposed"] else (role_b, lora_b)
    elements = prod(lora_a.shape[1:]) * lora_b.shape[0]
    is_large = prod(source.shape) > HELD_ELEMENTS and elements > WHOLE_ELEMENTS
    return role if is_large and len(lora_a.shape) == len(lora_b.shape) == 2 else ""
