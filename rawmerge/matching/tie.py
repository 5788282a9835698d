"""Which tensors of a base are one in its loaders' eyes: the input embedding, and the output projection tied to it.

Source: transformers 5.24, `_tied_weights_keys` of the causal language models; `tied_outputs.py` for other names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from rawmerge.formats.model_config import ModelConfig
from rawmerge.matching.disk_names import DiskNames
from rawmerge.matching.embedding_names import INPUT_EMBEDDINGS, module_of
from rawmerge.matching.ledger import Ledger
from rawmerge.matching.places import Place, whole
from rawmerge.matching.tied_outputs import known_tie

OUTPUT_EMBEDDING: Final = "lm_head.weight"
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
#: Input embeddings of text models inside others, whose output projection is `lm_head` for certain.
_NESTED_INPUT: Final = re.compile(r"(model\.)?language_model\.(model\.)?embed_tokens\.weight")


@dataclass(frozen=True, slots=True)
class Tie:
    """A base whose loaders use its input embedding as output projection.

    Attributes:
        input: the input embedding on disk.
        output: the name that the output projection has on disk, or gets there.
        is_certain: whether that name is known; if not, the tie cannot be undone.
        is_written: whether the disk holds the output projection beside the tie.
        model: what to call the model in messages.
        canonical_output: the output projection's name in memory.
        biases: name to write and name of the tensor to take it from, of biases that are tied as well.
    """

    input: str
    output: str
    is_certain: bool
    is_written: bool
    model: str
    canonical_output: str = OUTPUT_EMBEDDING
    biases: tuple[tuple[str, str], ...] = ()

    def place_of(self, canonical_name: str, ledger: Ledger) -> Place | None:
        """Return the place of the output projection, if that is what the name means and the disk lacks it."""
        if canonical_name != self.canonical_output or self.is_written or not self.is_certain:
            return None
        return whole(self.output, ledger.shape_of(self.output if self.output in ledger.additions else self.input))


def find_tie(config: ModelConfig, names: DiskNames) -> Tie | None:
    """Return the base's tie, None where nothing is tied."""
    model = ", ".join(config.architectures) or "an unnamed architecture"
    if config.ties_embeddings and (known := known_tie(config.architectures, names)):
        is_written = known.output in names.tensors
        return Tie(known.input, known.output, True, is_written, model, known.canonical_output, known.biases)
    inputs = [name for name in names.tensors if module_of(name) in INPUT_EMBEDDINGS]
    if not config.ties_embeddings or not inputs or not has_output(config, inputs):
        return None
    ranked = sorted(inputs, key=lambda name: (name.count("."), len(name)))
    name = next((name for name in ranked if _has_plain_head(config, name)), ranked[0])
    output = _output_name(name, names)
    return Tie(name, output, _has_plain_head(config, name), output in names.tensors, model)


def has_output(config: ModelConfig, inputs: Iterable[str]) -> bool:
    """Whether the base's class has an output projection that these input embeddings may be tied to."""
    is_shared = any(module_of(name) == "shared" for name in inputs)  # between encoder and decoder
    return is_shared or not config.architectures or any(name.endswith(_WITH_OUTPUT) for name in config.architectures)


def _has_plain_head(config: ModelConfig, name: str) -> bool:
    """Whether the tied output projection is the model's `lm_head` for certain."""
    is_causal = any(architecture.endswith(_CAUSAL) for architecture in config.architectures)
    if config.model_type in _WORD_EMBEDDINGS_FAMILIES:
        return is_causal and module_of(name) == "word_embeddings"
    is_plain = module_of(name) in {"embed_tokens", "wte", "tokens_embed"} and config.model_type not in _OTHER_OUTPUT
    is_nested = bool(_NESTED_INPUT.fullmatch(name)) and any(
        architecture.endswith("ForConditionalGeneration") for architecture in config.architectures
    )
    return is_plain and (is_causal or is_nested)


def _output_name(input_name: str, names: DiskNames) -> str:
    """Return the output projection's name on disk: where the disk has it, else in the disk's own style."""
    if places := names.places.get(OUTPUT_EMBEDDING):
        return places[0].name
    is_old_style = input_name.startswith("language_model.model.")
    return f"language_model.{OUTPUT_EMBEDDING}" if is_old_style else OUTPUT_EMBEDDING
