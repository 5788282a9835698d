"""The output's `config.json`: the base's text, edited only where the merge makes it untrue."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rawmerge.errors import PlanError, Problem, quote
from rawmerge.formats.adapter_config import matches_target
from rawmerge.formats.config_edits import head_facts, with_labels, with_vocab_size
from rawmerge.formats.layer_edits import layer_config_paths, with_layer_count
from rawmerge.formats.model_config import with_dtype, with_untied_embeddings
from rawmerge.inputs.base_checkpoint import BaseCheckpoint
from rawmerge.matching.embedding_names import is_embedding
from rawmerge.matching.matcher import Matches

#: Modules whose rows are labels, at the end of a path.
_HEADS = ("score", "classifier", "qa_outputs", "classifier.out_proj", "classification_head.out_proj")
#: What PEFT's task types are called at the end of transformers' class names.
_CLASSES = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}


class OutputConfig:
    """Edits one base's config for one merge.

    Attributes:
        text: the config as the output gets it.
        notes: what was changed, or could not be with certainty.
    """

    def __init__(self, base: BaseCheckpoint, matches: Matches, task_type: str = "") -> None:
        self._base = base
        self._class = _CLASSES.get(task_type, "")
        self._matches = matches
        self.text = base.config.text
        self.notes: list[str] = []

    def edit(self, dtype: str, layer_order: list[int]) -> None:
        """Make every edit that the merge calls for.

        Args:
            dtype: torch name of the dtype that all float tensors get, an empty string where each keeps its own.
            layer_order: the old layer that each new one copies; empty where layers stay.

        Raises:
            PlanError: an edit that the output would not load without cannot be made with certainty.
        """
        if not self.text:
            return
        if dtype:
            self.text = with_dtype(self._base.config, dtype)
        if self._matches.is_untied:
            self.text = with_untied_embeddings(self._base.config, self.text)
        if layer_order:
            self._set_layers(layer_order)
        self._set_vocabulary()
        self._set_labels()
        if not self._base.is_directory and self.text != self._base.config.text:
            self.notes.append("beside a single file no config.json is written: edit the one that you load it with")

    def _set_layers(self, order: list[int]) -> None:
        paths = layer_config_paths(self._base.config)
        if len(paths) != 1:
            found = ", ".join(".".join(path) or "config.json" for path in paths) or "none"
            raise PlanError(Problem("layer_replication", "one number of layers in config.json", found))
        self.text = with_layer_count(self._base.config, self.text, next(iter(paths)), order)
        count = len(set(order))
        self.notes.append(f"{count} of the base's layers become {len(order)}, each written with its own delta")

    def _set_vocabulary(self) -> None:
        sizes = dict(self._resized())
        if len(sizes) > 1:
            found = ", ".join(f"{old} to {new}" for old, new in sizes.items())
            raise PlanError(Problem("vocab_size", "one change of the vocabulary", found))
        for old, new in sizes.items():
            edit = with_vocab_size(self._base.config, self.text, old, new)
            self.text = edit.text
            self.notes.append(f"the vocabulary grows from {old} to {new} rows; config.json follows")
            if not edit.is_certain:
                self.notes.append(
                    "where config.json states the vocabulary's size is not certain; check vocab_size in it"
                )

    def _resized(self) -> Iterator[tuple[int, int]]:
        """Yield (old rows, new rows) of each embedding that grows."""
        for name, source in self._matches.replacements.items():
            old = self._base.tensors[name].shape
            if source.shape != old and is_embedding(name):
                yield old[0], source.shape[0]

    def _set_labels(self) -> None:
        heads = {name: rows for name, rows in self._new_heads().items() if _is_labelled(name)}
        facts = head_facts(self._base.config)
        for name, rows in heads.items():
            edited = with_labels(self._base.config, self.text, rows)
            self.text = edited if edited is not None else self.text
            if edited is not None and self._class and any(known.endswith(self._class) for known in facts.architectures):
                continue
            stated = ", ".join(facts.architectures) or "no architecture"
            labels = "" if edited is not None else f"; config.json states {facts.num_labels} labels, correct it by hand"
            wanted = f"AutoModel{self._class}" if self._class else "the class that was trained"
            self.notes.append(
                f"{quote(name)} is a head of {rows} labels; config.json names {stated}: load the output with {wanted}"
                f"{labels}"
            )

    def _new_heads(self) -> Mapping[str, int]:
        added = {name: addition.source.shape for name, addition in self._matches.additions.items()}
        resized = {
            name: source.shape
            for name, source in self._matches.replacements.items()
            if source.shape != self._base.tensors[name].shape
        }
        return {name: shape[0] for name, shape in (added | resized).items() if len(shape) == 2}


def _is_labelled(tensor_name: str) -> bool:
    return matches_target(_HEADS, tensor_name.removesuffix(".weight"))
