"""Tied embeddings: one tensor on disk that loaders use twice, as input embedding and as output projection.

An adapter on one side was trained with the other side as the base has it. So where the sides differ after the merge,
the output projection is written as a tensor of its own and the tie is undone; where they are equal, it stays. PEFT's
merge changes both sides, which is not the function that was trained. With `ensure_weight_tying` both sides carry the
same delta by design: it is added once, and the tie stays.

Source: transformers 5.23, `_tied_weights_keys` of the causal language models; PEFT 0.21.2 `tuners/lora/model.py`
`_add_targets_to_tie` (the output side's factors are the input side's, transposed).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

from rawmerge.errors import PlanError, Problem, UnsupportedAdapterError, quote
from rawmerge.formats.model_config import ModelConfig
from rawmerge.inputs.comparison import same_transposed, same_values
from rawmerge.inputs.tensor_source import TensorSource
from rawmerge.matching.disk_names import DiskNames
from rawmerge.matching.embedding_names import INPUT_EMBEDDINGS, module_of
from rawmerge.matching.ledger import Addition, Ledger
from rawmerge.matching.places import Place, whole
from rawmerge.merge_plan import Update

OUTPUT_EMBEDDING: Final = "lm_head.weight"
#: Names of input embeddings in families whose ties are not followed.
_UNUSUAL_INPUTS: Final = frozenset({"embeddings", "embedding", "word_embedding", "input_embedding", "emb", "w"})
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
    """

    input: str
    output: str
    is_certain: bool
    is_written: bool
    model: str

    def place_of(self, canonical_name: str, ledger: Ledger) -> Place | None:
        """Return the place of the output projection, if that is what the name means and the disk lacks it."""
        if canonical_name != OUTPUT_EMBEDDING or self.is_written or not self.is_certain:
            return None
        return whole(self.output, ledger.shape_of(self.output if self.output in ledger.additions else self.input))


def find_tie(config: ModelConfig, names: DiskNames) -> Tie | None:
    """Return the base's tie, None where nothing is tied."""
    inputs = [name for name in names.tensors if module_of(name) in INPUT_EMBEDDINGS]
    if not config.ties_embeddings or not inputs or not _has_output(config, inputs):
        return None
    ranked = sorted(inputs, key=lambda name: (name.count("."), len(name)))
    name = next((name for name in ranked if _has_plain_head(config, name)), ranked[0])
    output = _output_name(name, names)
    model = ", ".join(config.architectures) or "an unnamed architecture"
    return Tie(name, output, _has_plain_head(config, name), output in names.tensors, model)


def _has_output(config: ModelConfig, inputs: Iterable[str]) -> bool:
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


def check_unknown_tie(config: ModelConfig, tie: Tie | None, ledger: Ledger) -> None:
    """Refuse a changed embedding that may be tied under names that are not known.

    Raises:
        UnsupportedAdapterError: the base ties embeddings, and which tensors these are is not certain.
    """
    if tie and tie.is_certain:
        return
    tables = (*ledger.replacements, *ledger.overlays)
    stored = {name for name in tables if module_of(name) in {*_UNUSUAL_INPUTS, *INPUT_EMBEDDINGS}}
    heads = {name for name in ledger.additions if name.endswith(OUTPUT_EMBEDDING)}
    known = {tie.input, tie.output} if tie else set()  # these are settled
    changed = sorted(name for name in (ledger.embeddings | stored | heads) - known if not _NO_TOKENS.search(name))
    if changed and config.ties_embeddings and _has_output(config, changed):
        model = ", ".join(config.architectures) or "an unnamed architecture"
        raise UnsupportedAdapterError(_unknown_head(changed[0], model))


class TieSettlement:
    """Decides, once everything is matched, whether a tie stays."""

    def __init__(self, tie: Tie, ledger: Ledger) -> None:
        self._tie = tie
        self._ledger = ledger

    def settle(self) -> bool:
        """Write the output projection where it differs; return whether the tie is undone."""
        if not (self._changes(self._tie.input) or self._changes(self._tie.output)):
            return False
        # where the flag found no tie to keep, PEFT trained one side alone
        is_both = self._changes(self._tie.input) and self._changes(self._tie.output)
        if self._ledger.adapter.config.ensure_weight_tying and is_both:
            return self._keep_tied()
        if not self._tie.is_certain and (not self._stays_tied() or self._has_copies()):
            self._ledger.problems.add(UnsupportedAdapterError, [_unknown_head(self._tie.input, self._tie.model)])
            return False
        if self._tie.is_written:
            return self._settle_written()
        if self._stays_tied():
            self._drop_output("equal to the input embedding, which stays tied to it")
            return False
        self._write_output()
        return True

    def _settle_written(self) -> bool:
        """Settle a tie of which the disk holds both sides: loaders may read either."""
        ledger, tie = self._ledger, self._tie
        stays = self._stays_tied()
        if stays and not self._changes(tie.output):
            for table in (ledger.replacements, ledger.overlays):
                if tie.input in table:
                    table[tie.output] = table[tie.input]
        if not self._changes(tie.output) or not self._is_stored(tie.output):
            self._inherit_rows()
        return not stays

    def _has_copies(self) -> bool:
        """Whether the disk holds the embedding under further names, which would have to change with it."""
        tensors, name = self._ledger.base.tensors, self._tie.input
        others = (other for other in tensors if other != name and module_of(other) in INPUT_EMBEDDINGS)
        return any(tensors[other].shape == tensors[name].shape for other in others)

    def _is_stored(self, name: str) -> bool:
        return any(
            name in table for table in (self._ledger.replacements, self._ledger.overlays, self._ledger.additions)
        )

    def _inherit_rows(self) -> None:
        """Give the output projection the trained rows of the input embedding, for they are the tied tensor's."""
        ledger, tie = self._ledger, self._tie
        own = ledger.updates.get(tie.output, [])
        rows = [update for update in ledger.updates.get(tie.input, ()) if update.kind == "token_rows"]
        if rows and not any(update.kind == "token_rows" for update in own):
            ledger.updates[tie.output] = [*rows, *own]

    def _changes(self, name: str) -> bool:
        return bool(self._ledger.updates.get(name)) or self._is_stored(name)

    def _stays_tied(self) -> bool:
        """Whether both sides hold the same values after the merge."""
        ledger, tie = self._ledger, self._tie
        inner, outer = ledger.updates.get(tie.input, []), ledger.updates.get(tie.output, [])
        if any(update.kind != "token_rows" for update in (*inner, *outer)):
            return False
        if not self._changes(tie.output):
            is_stored = tie.input in ledger.replacements or tie.input in ledger.overlays
            return not is_stored or not self._is_trained(tie.input)
        are_rows_equal = len(inner) == len(outer) and all(map(self._are_same_rows, inner, outer))
        return are_rows_equal and same_values(self._value(tie.output), self._value(tie.input), self._dtype)

    def _are_same_rows(self, first: Update, second: Update) -> bool:
        is_same_place = first.settings["indices"] == second.settings["indices"]
        return is_same_place and same_values(first.tensors["rows"], second.tensors["rows"], self._dtype)

    @property
    def _dtype(self) -> str:
        return self._ledger.base.tensors[self._tie.input].dtype

    def _is_trained(self, name: str) -> bool:
        """Whether a stored embedding was trained whole, not stored beside its pair or because it was resized."""
        saved = self._ledger.adapter.config.modules_to_save
        return any(name.removesuffix(".weight").endswith(module) for module in saved)

    def _value(self, name: str) -> TensorSource:
        ledger = self._ledger
        source = ledger.overlays.get(name) or ledger.replacements.get(name) or ledger.base.tensors.get(name)
        if source is None:
            source = ledger.additions[name].source if name in ledger.additions else self._value(self._tie.input)
        return source

    def _keep_tied(self) -> bool:
        tie = self._tie
        if not self._is_same_change():
            expected = f"the change of {quote(tie.input)}, transposed, as ensure_weight_tying says"
            self._ledger.problems.add(PlanError, [Problem(tie.output, expected, "another change, or one side alone")])
        elif not tie.is_written:
            self._drop_output("the input embedding's, transposed; ensure_weight_tying keeps the two one tensor")
        return False

    def _is_same_change(self) -> bool:
        """Whether the output projection changes as the input embedding does, or not at all."""
        ledger, tie = self._ledger, self._tie
        stored = [name for name in (tie.input, tie.output) if name in {**ledger.replacements, **ledger.additions}]
        is_equal = len(stored) < 2 or same_values(self._value(stored[0]), self._value(stored[1]), self._dtype)
        inner, outer = ledger.updates.get(tie.input, []), ledger.updates.get(tie.output, [])
        pairs = [update for update in (*inner, *outer) if update.kind == "lora"]
        if not outer or not is_equal:
            return is_equal and self._changes(tie.input)
        if len(inner) != len(outer) or len(pairs) != 2:
            return False
        if pairs[0].settings["scaling"] != pairs[1].settings["scaling"]:
            return False
        first, second = (update.tensors for update in pairs)
        return same_transposed(first["lora_embedding_b"], second["lora_a"]) and same_transposed(
            first["lora_embedding_a"], second["lora_b"]
        )

    def _drop_output(self, reason: str) -> None:
        ledger, name = self._ledger, self._tie.output
        ledger.updates.pop(name, None)
        ledger.additions.pop(name, None)
        ledger.overlays.pop(name, None)
        ledger.uses[:] = [
            replace(use, use="ignored", reason=reason) if use.tensor_name == name else use for use in ledger.uses
        ]

    def _write_output(self) -> None:
        ledger, tie = self._ledger, self._tie
        is_frozen = tie.input in ledger.replacements and not self._is_trained(tie.input)
        source = ledger.replacements[tie.input] if is_frozen else ledger.base.tensors[tie.input]
        if tie.output not in ledger.additions:
            self._inherit_rows()
            if tie.input in ledger.overlays and not self._is_trained(tie.input):
                ledger.overlays[tie.output] = ledger.overlays[tie.input]
        written = ledger.additions.setdefault(tie.output, Addition(source, tie.input, tie.input))
        shape = ledger.base.tensors[tie.input].shape if tie.input in ledger.overlays else ledger.shape_of(tie.input)
        if written.source.shape != shape:
            expected = f"as many rows as {quote(tie.input)} has now, {shape[0]}"
            hint = "the adapter stores one side of a tie with another vocabulary; save both"
            problem = Problem(tie.output, expected, f"{written.source.shape[0]}", hint)
            ledger.problems.add(PlanError, [problem])
        ledger.notes.append(
            f"{tie.input!r} and the output projection that was tied to it differ now: {tie.output!r} is written, "
            "and tie_word_embeddings is false"
        )


def _unknown_head(name: str, model: str) -> Problem:
    expected = f"a base whose output projection is {OUTPUT_EMBEDDING!r}, to undo the tie"
    found = f"tied embeddings in {model}"
    return Problem(name, expected, found, "adapters on tied embeddings of this family are not merged yet")
