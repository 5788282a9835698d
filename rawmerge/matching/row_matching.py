"""Trained token rows: they take the place of an embedding's rows.

Source: PEFT 0.21.2 `tuners/trainable_tokens/layer.py` (rows replace rows, in the order of the indices),
`utils/other.py` `_set_trainable` (which modules the keys of the config name).
"""

from __future__ import annotations

from collections.abc import Iterable

from rawmerge.dtypes import DTYPES
from rawmerge.errors import PlanError, Problem, quote
from rawmerge.formats.adapter_names import AdapterTensorName
from rawmerge.matching.ledger import Ledger
from rawmerge.matching.naming import NameResolver, Target
from rawmerge.matching.places import Place
from rawmerge.matching.tied_embeddings import Tie
from rawmerge.matching.unmatched import Unmatched
from rawmerge.merge_plan import Update
from rawmerge.methods.interface import ModuleFacts, ShapeMismatchError
from rawmerge.methods.token_rows import TokenRowsMethod


class RowMatcher:
    """Writes the updates of all trained token rows into the ledger."""

    def __init__(self, ledger: Ledger, resolver: NameResolver, unmatched: Unmatched, tie: Tie | None) -> None:
        self._ledger = ledger
        self._resolver = resolver
        self._unmatched = unmatched
        self._tie = tie

    def match(self, names: Iterable[AdapterTensorName]) -> None:
        """Record trained token rows."""
        for name in names:
            resolution = self._resolver.resolve([Target(name.target, lambda place: len(place.shape) == 2)])[name.target]
            place = resolution.place
            if place is None and self._tie:
                place = self._tie.place_of(self._resolver.names.family.canonical(name.target), self._ledger)
            if place is None or not place.is_whole:
                problem = self._unmatched.problem(name.text, name.target, resolution, "whose rows these are")
                self._ledger.problems.add(PlanError, [problem])
            else:
                self._record_rows(name, place)

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
