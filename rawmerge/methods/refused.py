"""Kinds of PEFT adapters that cannot be merged into weights, or not faithfully, with the reasons.

Source: PEFT 0.21.2 `utils/peft_types.py`; the kinds without a `merge` of their own fall back to
`tuners/tuners_utils.py` `BaseTunerLayer.merge`, which refuses.
"""

from __future__ import annotations

from typing import Final

_VIRTUAL_TOKENS: Final = "it trains virtual tokens that are put before the input, and changes no weight"
_ROUTED: Final = "which of its parts apply is decided for each input, so it has no place in the weights"

REFUSED_KINDS: Final = {
    "ADAMSS": "its row clusters are found anew at loading, by seeded k-means over a randomised decomposition of the "
    "base (scikit-learn), which cannot be repeated faithfully",
    "ADAPTION_PROMPT": "it adds a gated attention prefix, and changes no weight",
    "CARTRIDGE": "it trains a cache of keys and values, and changes no weight",
    "CPT": _VIRTUAL_TOKENS,
    "FROD": "a part of it is made anew at loading, by a joint decomposition of the base's weights of all layers, which "
    "is not in the file and, in half precision, cannot be repeated faithfully",
    "LILY": f"it has a router: {_ROUTED}",
    "MULTITASK_PROMPT_TUNING": _VIRTUAL_TOKENS,
    "POLY": f"it mixes its parts by task: {_ROUTED}",
    "PREFIX_TUNING": "it trains keys and values that are put before the input's, and changes no weight",
    "PROMPT_TUNING": _VIRTUAL_TOKENS,
    "P_TUNING": _VIRTUAL_TOKENS,
    "SHADOW": "it is a network beside the model, and changes no weight",
    "XLORA": f"it mixes LoRA adapters by input: {_ROUTED}; those that it was made of can be merged from their own "
    "folders, one by one",
}
