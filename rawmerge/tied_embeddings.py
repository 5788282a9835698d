"""Tied embeddings: one tensor on disk that loaders use twice, as input embedding and as output projection.

A LoRA on one side was trained with the other side as the base has it. So when the input embedding changes, the
output projection is written as a tensor of its own and the tie is undone; PEFT's merge changes both. Where the
output projection's name is not certain, the merge is refused.

Source: transformers 5.23, `_tied_weights_keys` of the causal language models.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final

from rawmerge.errors import Problem, UnsupportedAdapterError
from rawmerge.formats.model_config import ModelConfig

OUTPUT_EMBEDDING: Final = "lm_head.weight"

#: Last parts of the names of input embeddings that an output projection may be tied to.
_INPUT_EMBEDDINGS: Final = (
    "embed_tokens",
    "wte",
    "word_embeddings",
    "tok_embeddings",
    "tokens_embed",
    "embed_in",
    "shared",
)
#: Embeddings of something else than tokens have no output projection.
_NO_TOKENS: Final = re.compile(r"position|wpe|pos_emb|token_type|segment|type_emb")
#: Classes with an output projection end so; others, such as encoders and classifiers, have nothing to tie.
_WITH_OUTPUT: Final = (
    "ForCausalLM",
    "LMHeadModel",
    "ForMaskedLM",
    "ForPreTraining",
    "ForConditionalGeneration",
    "ForSpeechSeq2Seq",
    "LMHead",
)
_CAUSAL: Final = ("ForCausalLM", "LMHeadModel")
#: Causal models whose output projection is not `lm_head.weight`.
_OTHER_OUTPUT: Final = frozenset({"biogpt", "trocr", "whisper", "gpt_neox_japanese", "modernbert-decoder"})
_WORD_EMBEDDINGS_FAMILIES: Final = frozenset({"bloom", "falcon"})


def find_untied(
    config: ModelConfig, base_names: Collection[str], changed: Collection[str], embeddings: Collection[str]
) -> str:
    """Return the input embedding whose tie the merge undoes, an empty string where it undoes none.

    Args:
        config: the base's config.
        base_names: all tensors of the base.
        changed: the tensors that the adapter updates or replaces.
        embeddings: those of them that are embeddings, by the kind of their pair.

    Raises:
        UnsupportedAdapterError: a tied embedding changes in a family whose output projection is not known.
    """
    if not config.ties_embeddings:
        return ""
    if OUTPUT_EMBEDDING in changed:  # both lie on disk; the tie would hide one of them
        return next((name for name in base_names if _module(name) in _INPUT_EMBEDDINGS), OUTPUT_EMBEDDING)
    inputs = sorted(
        {name for name in changed if _module(name) in _INPUT_EMBEDDINGS}
        | {name for name in embeddings if not _NO_TOKENS.search(_module(name))}
    )
    if not inputs or not _ties_something(config, inputs):
        return ""
    if len(inputs) > 1 or not _has_plain_head(config, inputs[0]):
        raise UnsupportedAdapterError(_unknown_head(inputs[0], config))
    return inputs[0]


def _module(tensor_name: str) -> str:
    """Return the name of the module that a weight belongs to, an empty string for other parameters."""
    path, _, parameter = tensor_name.rpartition(".")
    return path.rpartition(".")[2] if parameter == "weight" else ""


def _ties_something(config: ModelConfig, inputs: Collection[str]) -> bool:
    is_shared = any(_module(name) == "shared" for name in inputs)  # between encoder and decoder
    return is_shared or not config.architectures or any(name.endswith(_WITH_OUTPUT) for name in config.architectures)


def _has_plain_head(config: ModelConfig, name: str) -> bool:
    """Whether the tied output projection is `lm_head.weight` for certain."""
    is_causal = any(architecture.endswith(_CAUSAL) for architecture in config.architectures)
    if config.model_type in _WORD_EMBEDDINGS_FAMILIES:
        return is_causal and _module(name) == "word_embeddings"
    is_plain = _module(name) in {"embed_tokens", "wte", "tokens_embed"} and config.model_type not in _OTHER_OUTPUT
    return is_causal and is_plain


def _unknown_head(name: str, config: ModelConfig) -> Problem:
    expected = f"a base whose output projection is {OUTPUT_EMBEDDING!r}, to undo the tie"
    found = f"tied embeddings in {', '.join(config.architectures) or 'an unnamed architecture'}"
    return Problem(name, expected, found, "adapters on tied embeddings of this family are not merged yet")
