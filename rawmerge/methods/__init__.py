"""One file per adapter kind: pure tensor maths, and what a kind needs to know of shapes. No files, no names."""

from __future__ import annotations

from typing import Final

from rawmerge.methods import expert_lora, lora, lora_bias, token_rows
from rawmerge.methods.interface import Method

METHODS: Final[dict[str, Method]] = {
    lora.KIND: lora.LoraMethod(),
    lora_bias.KIND: lora_bias.LoraBiasMethod(),
    expert_lora.KIND: expert_lora.ExpertLoraMethod(),
    token_rows.KIND: token_rows.TokenRowsMethod(),
}
