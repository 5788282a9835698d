"""One file per adapter kind: pure tensor maths, and what a kind needs to know of shapes. No files, no names."""

from __future__ import annotations

from typing import Final

from rawmerge.methods import lora
from rawmerge.methods.interface import Method

METHODS: Final[dict[str, Method]] = {lora.KIND: lora.LoraMethod()}
