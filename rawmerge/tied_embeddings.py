"""Tied embeddings: one tensor on disk that loaders use twice, as input embedding and as output projection.

A LoRA on one side was trained with the other side as the base has it. So when the input embedding changes, the
output projection is written as a tensor of its own and the tie is undone; PEFT's merge changes both.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from rawmerge.errors import Problem, UnsupportedAdapterError
from rawmerge.formats.model_config import ModelConfig

OUTPUT_EMBEDDING: Final = "lm_head.weight"
_INPUT_EMBEDDINGS: Final = ("embed_tokens.weight", "wte.weight")
_PLAIN_HEADS: Final = ("ForCausalLM", "LMHeadModel")


def find_untied(config: ModelConfig, base_names: Collection[str], changed: Collection[str]) -> str:
    """Return the input embedding whose tie the merge undoes, an empty string where it undoes none.

    Args:
        config: the base's config.
        base_names: all tensors of the base.
        changed: the tensors that the adapter updates or replaces.

    Raises:
        UnsupportedAdapterError: a tied embedding changes in a family whose output projection is not known.
    """
    inputs = [name for name in changed if _is_input_embedding(name)]
    head_changed = OUTPUT_EMBEDDING in changed
    if not config.ties_embeddings or not (inputs or head_changed):
        return ""
    if head_changed:  # both lie on disk; the tie would hide one of them
        return next((name for name in base_names if _is_input_embedding(name)), "")
    if not any(name.endswith(_PLAIN_HEADS) for name in config.architectures) or len(inputs) != 1:
        raise UnsupportedAdapterError(_unknown_head(inputs[0], config))
    return inputs[0]


def _is_input_embedding(name: str) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in _INPUT_EMBEDDINGS)


def _unknown_head(name: str, config: ModelConfig) -> Problem:
    expected = f"a base whose output projection is {OUTPUT_EMBEDDING!r}, to undo the tie"
    found = f"tied embeddings in {', '.join(config.architectures) or 'an unnamed architecture'}"
    return Problem(name, expected, found, "adapters on tied embeddings of this family are not merged yet")
