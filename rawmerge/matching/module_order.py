"""The order in which a model registers its modules, which some kinds draw numbers in.

Source: PEFT 0.21.2 `tuners/tinylora/model.py` `_build_target_key_mapping` and `tuners/unilora/model.py`
`_assign_unilora_indices_and_scales`, which go through `named_modules()`.
"""

from __future__ import annotations

from collections.abc import Sequence

from rawmerge.formats.model_config import ModelConfig


def registration_order(config: ModelConfig, paths: Sequence[str]) -> Sequence[str] | None:
    """Return module paths in the order in which the model registers them; None where that is not known."""
    raise AssertionError((config, paths))
