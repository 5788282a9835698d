"""The choices of a merge that decide the output's bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from rawmerge.dtypes import COMPUTE_DTYPES, OUTPUT_DTYPES

#: What may become of a vocabulary that is smaller than the base's.
OVERLAY: Final = "overlay"
#: Whose tokenizer files the output gets.
TOKENIZERS: Final = ("base", "adapter")
#: How the columns of a lora_B on fused experts are ordered: PEFT's way, and Unsloth's until September 2026.
GROUPED: Final = "grouped_by_expert"
LAYOUTS: Final = ("rank_major", GROUPED)


#: Field of `MergeOptions` to what it may be; an empty text stands for what is said of it there.
CHOICES: Final = {
    "compute_dtype": COMPUTE_DTYPES,
    "output_dtype": ("", *OUTPUT_DTYPES),
    "vocab": ("", OVERLAY),
    "tokenizer": TOKENIZERS,
    "moe_lora_b_layout": ("", *LAYOUTS),
}


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """The choices that decide the output's bytes.

    Attributes:
        compute_dtype: `float32` (bit-equal to PEFT) or `float64` (rounded once from float64).
        output_dtype: `float32`, `bfloat16` or `float16` for all float tensors; empty to keep each tensor's own.
        vocab: `overlay` to write a smaller vocabulary over the first rows of the base's; empty to refuse it.
        tokenizer: whose tokenizer files the output gets, `base` or `adapter`.
        moe_lora_b_layout: one of `LAYOUTS`; empty for the adapter's own marker, else PEFT's order.
        force: merge although the base seems to be another one, or holds the adapter already.
    """

    compute_dtype: str = "float32"
    output_dtype: str = ""
    vocab: str = ""
    tokenizer: str = "base"
    moe_lora_b_layout: str = ""
    force: bool = False
