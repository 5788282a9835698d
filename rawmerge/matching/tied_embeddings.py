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
from collections import defaultdict
from collections.abc import Set
from dataclasses import replace
from typing import Final

from rawmerge.errors import PlanError, Problem, UnsupportedAdapterError, quote
from rawmerge.formats.model_config import ModelConfig
from rawmerge.inputs.comparison import same_transposed, same_values
from rawmerge.inputs.tensor_source import TensorSource
from rawmerge.matching.embedding_names import INPUT_EMBEDDINGS, module_of
from rawmerge.matching.ledger import Addition, Ledger
from rawmerge.matching.tie import OUTPUT_EMBEDDING, Tie, has_output
from rawmerge.merge_plan import Update

#: Names of input embeddings in families whose ties are not followed.
_UNUSUAL_INPUTS: Final = frozenset({"embeddings", "embedding", "word_embedding", "input_embedding", "emb", "w"})
#: Embeddings of something else than tokens have no output projection.
_NO_TOKENS: Final = re.compile(r"position|wpe|pos_emb|token_type|segment|type_emb")


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
    aliased = _spread_rows(ledger, known)
    listed = (ledger.embeddings | stored | heads | aliased) - known
    changed = sorted(name for name in listed if not _NO_TOKENS.search(name))
    if changed and config.ties_embeddings and has_output(config, changed):
        model = ", ".join(config.architectures) or "an unnamed architecture"
        raise UnsupportedAdapterError(_unknown_head(changed[0], model))


def _spread_rows(ledger: Ledger, known: Set[str]) -> set[str]:
    """Give trained rows to all names of a tensor that files of torch.save hold under several.

    Args:
        ledger: where they are written.
        known: names that are not looked at.

    Returns:
        embeddings and what shares their bytes, changed otherwise than by rows: then the names would part.
    """
    names: dict[tuple[str, int, int], list[str]] = defaultdict(list)
    for name, source in ledger.base.tensors.items():
        names[source.path, source.offset, source.byte_count].append(name)
    parted: set[str] = set()
    for group in names.values():
        is_embedding = any(module_of(name) in {*_UNUSUAL_INPUTS, *INPUT_EMBEDDINGS} for name in group)
        changed = [name for name in group if ledger.updates.get(name) or ledger.is_stored(name)]
        if len(group) < 2 or not is_embedding or not changed or not known.isdisjoint(group):
            continue
        updates = ledger.updates.get(changed[0], [])
        if len(changed) == 1 and not ledger.is_stored(changed[0]) and all(at.kind == "token_rows" for at in updates):
            ledger.updates.update({name: list(updates) for name in group})
        else:
            parted.add(changed[0])
    return parted


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
        if not self._tie.is_certain and not (self._stays_tied() and self._spread()):
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
        if not stays:
            self._write_biases()
        return not stays

    def _spread(self) -> bool:
        """Change further copies of the embedding on disk as it is changed; return whether all of them are copies."""
        ledger, name = self._ledger, self._tie.input
        tensors = ledger.base.tensors
        alike = [other for other in tensors if tensors[other].shape == tensors[name].shape]
        others = [other for other in alike if other not in {name, self._tie.output}]
        copies = [other for other in others if tensors[other].is_same_place(tensors[name]) or _is_input(other)]
        if any(self._changes(other) or not self._is_copy(other) for other in copies):
            return False
        for copy in copies:
            ledger.updates[copy] = list(ledger.updates.get(name, ()))
            for table in (ledger.replacements, ledger.overlays):
                if name in table:
                    table[copy] = table[name]
        return True

    def _is_copy(self, name: str) -> bool:
        tensors = self._ledger.base.tensors
        other, own = tensors[name], tensors[self._tie.input]
        return other.is_same_place(own) or same_values(other, own, self._dtype)

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
        self._write_biases()
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

    def _write_biases(self) -> None:
        """Write the biases that loaders tie as well, and leave untied from now on, as they are after the merge."""
        ledger = self._ledger
        for name, other in self._tie.biases:
            source = ledger.replacements.get(other) or ledger.base.tensors[other]
            if name not in ledger.additions:
                ledger.additions[name] = Addition(source, other, other)
                ledger.updates[name] = list(ledger.updates.get(other, ()))


def _is_input(name: str) -> bool:
    return module_of(name) in INPUT_EMBEDDINGS


def _unknown_head(name: str, model: str) -> Problem:
    expected = f"a base whose output projection is {OUTPUT_EMBEDDING!r}, to undo the tie"
    found = f"tied embeddings in {model}"
    return Problem(name, expected, found, "adapters on tied embeddings of this family are not merged yet")
