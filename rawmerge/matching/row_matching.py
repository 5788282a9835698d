"""Trained token rows: they take the place of an embedding's rows.

Source: PEFT 0.21.2 `tuners/trainable_tokens/layer.py` (rows replace rows, in the order of the indices), `model.py`
(tied modules share the rows of the one that is targeted, and are stored beside it), `utils/other.py` `_set_trainable`
(which modules the keys of the config name).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from rawmerge.dtypes import DTYPES
from rawmerge.errors import PlanError, Problem, quote
from rawmerge.formats.adapter_config import matches_target
from rawmerge.formats.adapter_fields import LORA
from rawmerge.formats.adapter_names import AdapterTensorName
from rawmerge.inputs.comparison import same_values
from rawmerge.matching.ledger import Ledger
from rawmerge.matching.naming import NameResolver, Resolution, Target
from rawmerge.matching.places import Place
from rawmerge.matching.tie import Tie
from rawmerge.matching.unmatched import Unmatched
from rawmerge.merge_plan import Update
from rawmerge.methods.interface import ModuleFacts, ShapeMismatchError
from rawmerge.methods.token_rows import TokenRowsMethod

#: Patterns in `target_modules` that mean one path only; PEFT writes the input embedding's where none was named.
_PLAIN_PATH: Final = re.compile(r"[A-Za-z0-9_.]+")


class RowMatcher:
    """Writes the updates of all trained token rows into the ledger."""

    def __init__(self, ledger: Ledger, resolver: NameResolver, unmatched: Unmatched, tie: Tie | None) -> None:
        self._ledger = ledger
        self._resolver = resolver
        self._unmatched = unmatched
        self._tie = tie

    def match(self, names: Iterable[AdapterTensorName]) -> None:
        """Record trained token rows; those that may repeat others come last."""
        placed = [(name, *self._place(name)) for name in names]
        for name, resolution, place in sorted(placed, key=lambda one: one[2] is None or not self._is_targeted(one[0])):
            # a tied copy that the adapter stores whole, too, gets its rows like the other
            is_own = place and self._ledger.is_stored(place.name) and self._twin(name)
            if place and place.is_whole and (is_own or self._is_targeted(name)):
                self._record_rows(name, place)
            elif twin := self._twin(name):
                reason = f"equal to the rows of {quote(twin)}, which the base ties to it"
                self._ledger.account([name], "ignored", name.target, reason)
            elif place and place.is_whole:
                problem = Problem(
                    name.text, "rows of a module in target_modules", f"those of {quote(name.module_path)}"
                )
                self._ledger.problems.add(PlanError, [problem])
            else:
                problem = self._unmatched.problem(name.text, name.target, resolution, "whose rows these are")
                self._ledger.problems.add(PlanError, [problem])

    def _place(self, name: AdapterTensorName) -> tuple[Resolution, Place | None]:
        resolution = self._resolver.resolve([Target(name.target, lambda place: len(place.shape) == 2)])[name.target]
        place = resolution.place
        if place is None and self._tie:
            place = self._tie.place_of(self._resolver.names.family.canonical(name.target), self._ledger)
        return resolution, place

    def _is_targeted(self, name: AdapterTensorName) -> bool:
        """Whether the config may name the module; PEFT's own kind for tokens stores rows of tied modules beside it."""
        config = self._ledger.adapter.config
        targets = config.target_modules
        if config.kind == LORA or not targets:
            return True
        if isinstance(targets, str):
            return not _PLAIN_PATH.fullmatch(targets) or targets == name.module_path
        return matches_target(targets, name.module_path)

    def _twin(self, name: AdapterTensorName) -> str:
        """Return a tensor that gets these very rows, where the base ties embeddings."""
        source = self._ledger.source(name)
        if self._ledger.adapter.config.kind == LORA or not self._ledger.base.config.ties_embeddings:
            return ""
        rows = ((at, update.tensors["rows"]) for at, own in self._ledger.updates.items() for update in own)
        alike = ((at, other) for at, other in rows if (other.shape, other.dtype) == (source.shape, source.dtype))
        return next((at for at, other in alike if same_values(source, other, source.dtype)), "")

    def _record_rows(self, name: AdapterTensorName, place: Place) -> None:
        indices = self._indices(name)
        if indices is None:
            expected = "trainable_token_indices that say which rows these are"
            self._ledger.problems.add(PlanError, [Problem(name.text, expected, "none for this module")])
            return
        source = self._ledger.source(name)
        problem = self._unmatched.dtype_problem(place)
        if not DTYPES[source.dtype].is_mergeable:
            problem = Problem(name.text, "a plain float dtype (F64, F32, BF16, F16)", source.dtype)
        if problem:
            self._ledger.problems.add(PlanError, [problem])
            return
        facts = ModuleFacts(self._ledger.place_shape(place), 1, 1.0, None, token_indices=indices)
        try:
            settings = TokenRowsMethod().settings({"rows": source.shape}, facts)
        except ShapeMismatchError as error:
            self._ledger.problems.add(PlanError, [Problem(name.text, error.expected, error.found, error.hint)])
            return
        if any(update.kind == "token_rows" for update in self._ledger.updates.get(place.name, ())):
            problem = Problem(name.text, f"one set of trained rows for {quote(place.name)}", "another")
            self._ledger.problems.add(PlanError, [problem])
            return
        self._ledger.update_place(place, Update("token_rows", {"rows": source}, settings))
        self._ledger.account([name], "updates", place)

    def _indices(self, name: AdapterTensorName) -> tuple[int, ...] | None:
        """Return the rows that a token adapter replaces, in the order of its own rows."""
        tables = self._ledger.adapter.config.token_indices
        # PEFT matches these keys by plain suffix (utils/other.py `_set_trainable`)
        named = [rows for key, rows in tables.items() if key and name.module_path.endswith(key)]
        if named:
            return named[0]
        # the rows of a tied output side are stored under its own name where the vocabulary was resized
        return tables.get("") or (next(iter(tables.values())) if len(tables) == 1 and self._tie else None)
