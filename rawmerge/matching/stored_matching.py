"""Tensors that the adapter stores whole: saved modules, trained biases, embeddings, token rows.

Source: PEFT 0.21.2 `utils/save_and_load.py` `get_peft_model_state_dict` (what is stored), `utils/other.py`
`ModulesToSaveWrapper`, `tuners/trainable_tokens/layer.py` (rows replace rows).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Final

from rawmerge.comparison import same_values, sample_rows_equal
from rawmerge.dtypes import DTYPES
from rawmerge.errors import PlanError, Problem, UnsupportedAdapterError, quote
from rawmerge.formats.adapter_config import is_saved_module
from rawmerge.formats.adapter_names import AdapterTensorName
from rawmerge.matching.ledger import Addition, Ledger
from rawmerge.matching.naming import NameResolver, Resolution, Target
from rawmerge.matching.places import Place
from rawmerge.matching.tied_embeddings import INPUT_EMBEDDINGS, OUTPUT_EMBEDDINGS, Tie
from rawmerge.matching.unmatched import Unmatched
from rawmerge.merge_options import OVERLAY
from rawmerge.methods import METHODS
from rawmerge.methods.interface import ModuleFacts, ShapeMismatchError
from rawmerge.tensor_source import TensorSource

_EMBEDDINGS: Final = frozenset(
    {*INPUT_EMBEDDINGS, *OUTPUT_EMBEDDINGS, "embeddings", "input_embedding", "token_embedding", "proj_out"}
)
#: Dtypes from fine to coarse; values are compared in the coarser one of two.
_PRECISION: Final = ("F64", "F32", "F16", "BF16")
#: How many rows are compared, and the share that must agree: a resized or trained few do not make another base.
_SAMPLED_ROWS: Final = 64
_LIKENESS: Final = 0.5
#: Modules whose rows are labels, of which an adapter may have others than the base.
_HEADS: Final = frozenset({"score", "classifier", "classification_head", "qa_outputs"})


@dataclass(slots=True)
class StoredMatcher:
    """Writes what replaces or joins the base's tensors into the ledger.

    Attributes:
        ledger: where it is written.
        resolver: finds places; unmatched: tells why there is none.
        tie: the base's tied embeddings.
        vocab: `overlay` to write a smaller vocabulary's rows over the first rows of the base's.
        is_forced: take stored embeddings that are unlike the base's.
        paired: modules whose weight is stored beside their LoRA pair.
    """

    ledger: Ledger
    resolver: NameResolver
    unmatched: Unmatched
    tie: Tie | None
    vocab: str
    is_forced: bool
    paired: Collection[str]

    def match(self, names: Iterable[AdapterTensorName]) -> None:
        """Record replacements and additions."""
        names = list(names)
        wanted = [name for name in self._without_copies(names) if self._is_declared(name)]
        targets = [Target(name.target, _LikeShape(self.ledger, name)) for name in wanted]
        resolutions = self.resolver.resolve(targets)
        for name in sorted(wanted, key=lambda name: resolutions[name.target].place is None):  # a twin needs the other
            self._record(name, resolutions[name.target])

    def match_rows(self, names: Iterable[AdapterTensorName]) -> None:
        """Record trained token rows."""
        for name in names:
            resolution = self.resolver.resolve([Target(name.target, lambda place: len(place.shape) == 2)])[name.target]
            place = resolution.place
            if place is None and self.tie:
                place = self.tie.place_of(self.resolver.names.family.canonical(name.target), self.ledger)
            if place is None or not place.is_whole:
                problem = self.unmatched.problem(name.text, name.target, resolution, "whose rows these are")
                self.ledger.problems.add(PlanError, [problem])
            else:
                self._record_rows(name, place)

    def _without_copies(self, names: list[AdapterTensorName]) -> list[AdapterTensorName]:
        """Return the names of trained tensors; PEFT stores copies beside them where the vocabulary was resized."""
        trained = {name.target for name in names if name.role in {"stored", "stored_base"}}
        kept = []
        for name in names:
            if name.role == "original_copy":
                self._ignore(name, "the untrained copy of a saved module")
            elif name.role == "saved_copy" and name.target in trained:
                self._ignore(name, "a copy of the tensor that is stored under its own name")
            else:
                kept.append(name)
        return kept

    def _ignore(self, name: AdapterTensorName, reason: str) -> None:
        self.ledger.account([name], "ignored", name.target, reason)

    def _is_declared(self, name: AdapterTensorName) -> bool:
        """Whether the config explains that the adapter holds this tensor whole; if not, the merge is refused."""
        config = self.ledger.adapter.config
        is_bias = name.parameter == "bias" and config.bias != "none"
        if (
            is_bias
            or self._is_embedding(name)
            or name.role == "saved_copy"
            or (is_saved_module(config, name.module_path) and name.role != "stored_base")
        ):
            return True
        expected = "a tensor of a LoRA pair, of a module in modules_to_save, or a bias that the config trains"
        found = f"a tensor {quote(name.parameter)} of module {quote(name.module_path)}"
        hint = "the config does not say what it is for; nothing may be dropped"
        self.ledger.problems.add(UnsupportedAdapterError, [Problem(name.text, expected, found, hint)])
        return False

    def _is_embedding(self, name: AdapterTensorName) -> bool:
        """Whether PEFT stored the tensor because it is of an input or output embedding, trained or resized."""
        # only embeddings are stored beside their pairs, whatever their names
        is_beside = name.role == "stored_base" and name.module_path in self.paired
        return is_beside or name.module_path.rpartition(".")[2] in _EMBEDDINGS

    def _record(self, name: AdapterTensorName, resolution: Resolution) -> None:
        place = resolution.place
        if place and place.is_whole:
            self._replace(name, place)
        elif place or resolution.candidates:
            problem = self.unmatched.problem(name.text, name.target, resolution, "that it replaces")
            self.ledger.problems.add(PlanError, [problem])
        elif self.tie and (head := self.tie.place_of(self.resolver.names.family.canonical(name.target), self.ledger)):
            self.ledger.additions[head.name] = Addition(self.ledger.source(name), self.tie.input, self.tie.input)
            self.ledger.account([name], "adds", head.name)
        elif twin := self._twin(name):
            self._ignore(name, f"equal to {quote(twin)}, which the base ties to it")
        elif is_saved_module(self.ledger.adapter.config, name.module_path):
            self.ledger.additions[name.target] = Addition(self.ledger.source(name))
            self.ledger.account([name], "adds", name.target)
        else:
            problem = self.unmatched.problem(name.text, name.target, resolution, "that it replaces")
            self.ledger.problems.add(PlanError, [problem])

    def _twin(self, name: AdapterTensorName) -> str:
        """Return a replaced tensor of the same values: a tied one is stored under each of its names."""
        source = self.ledger.source(name)
        alike = ((at, other) for at, other in self.ledger.replacements.items() if other.shape == source.shape)
        return next((at for at, other in alike if same_values(source, other, source.dtype)), "")

    def _replace(self, name: AdapterTensorName, place: Place) -> None:
        source, base = self.ledger.source(name), self.ledger.base.tensors[place.name]
        problem = self._shape_problem(name, source, base) or _dtype_problem(name, source, base)
        problem = problem or self._unlike_problem(name, source, base)
        if problem:
            self.ledger.problems.add(PlanError, [problem])
            return
        if source.shape and source.shape[0] < base.shape[0] and not self._is_head(name):
            self.ledger.overlays[place.name] = source
        else:
            self.ledger.replacements[place.name] = source
        self.ledger.account([name], "replaces", place)

    def _shape_problem(self, name: AdapterTensorName, source: TensorSource, base: TensorSource) -> Problem | None:
        if source.shape == base.shape:
            return None
        expected, found = f"the base's shape {list(base.shape)}", f"{list(source.shape)}"
        is_matrix = (
            len(source.shape) == len(base.shape) and source.shape[1:] == base.shape[1:] and 0 not in source.shape
        )
        if self._is_head(name) and is_matrix:
            return None
        if not is_matrix or not self._is_embedding(name):
            return Problem(name.text, expected, found, "is this the base the adapter was trained on?")
        if source.shape[0] > base.shape[0] or self.vocab == OVERLAY:
            return None
        hint = (
            f"the adapter's vocabulary has {base.shape[0] - source.shape[0]} rows less than the base's, which may be "
            "padded; --vocab overlay writes its rows over the first of the base's and keeps the rest"
        )
        return Problem(name.text, expected, found, hint)

    def _unlike_problem(self, name: AdapterTensorName, source: TensorSource, base: TensorSource) -> Problem | None:
        """Return why a frozen embedding, stored beside what was trained, shows that the base is another one."""
        is_frozen = not is_saved_module(self.ledger.adapter.config, name.module_path)
        if not is_frozen or self.is_forced or len(source.shape) != 2 or not DTYPES[base.dtype].is_mergeable:
            return None
        coarser = max((source.dtype, base.dtype), key=_PRECISION.index)
        share = sample_rows_equal(source, base, _SAMPLED_ROWS, coarser)
        if share >= _LIKENESS:
            return None
        expected = "rows equal to the base's, for they were frozen in training"
        found = f"{share:.0%} of {_SAMPLED_ROWS} sampled rows equal"
        hint = "the adapter was trained on another base; --force takes its embedding all the same"
        return Problem(name.text, expected, found, hint)

    def _is_head(self, name: AdapterTensorName) -> bool:
        """Whether the tensor is of a classification head, whose rows are labels."""
        is_saved = is_saved_module(self.ledger.adapter.config, name.module_path)
        return is_saved and not _HEADS.isdisjoint(name.module_path.split("."))

    def _record_rows(self, name: AdapterTensorName, place: Place) -> None:
        indices = self._indices(name)
        if indices is None:
            expected = "trainable_token_indices that say which rows these are"
            self.ledger.problems.add(PlanError, [Problem(name.text, expected, "none for this module")])
            return
        source = self.ledger.source(name)
        facts = ModuleFacts(self.ledger.place_shape(place), 1, 1.0, None, token_indices=indices)
        try:
            settings = METHODS["token_rows"].settings({"rows": source.shape}, facts)
        except ShapeMismatchError as error:
            self.ledger.problems.add(PlanError, [Problem(name.text, error.expected, error.found, error.hint)])
            return
        if any(update.kind == "token_rows" for update in self.ledger.updates.get(place.name, ())):
            problem = Problem(name.text, f"one set of trained rows for {quote(place.name)}", "another")
            self.ledger.problems.add(PlanError, [problem])
            return
        self.ledger.update_place(place, "token_rows", {"rows": source}, settings)
        self.ledger.account([name], "updates", place)

    def _indices(self, name: AdapterTensorName) -> tuple[int, ...] | None:
        """Return the rows that a token adapter replaces, in the order of its own rows."""
        tables = self.ledger.adapter.config.token_indices
        # PEFT matches these keys by plain suffix (utils/other.py `_set_trainable`)
        named = [rows for key, rows in tables.items() if key and name.module_path.endswith(key)]
        if named:
            return named[0]
        # the rows of a tied output side are stored under its own name where the vocabulary was resized
        return tables.get("") or (next(iter(tables.values())) if len(tables) == 1 and self.tie else None)


class _LikeShape:
    """Whether a place may be replaced by a stored tensor: all dimensions but the first agree."""

    def __init__(self, ledger: Ledger, name: AdapterTensorName) -> None:
        self._shape = ledger.source(name).shape
        self._is_rigid = name.module_path.rpartition(".")[2] not in _EMBEDDINGS

    def __call__(self, place: Place) -> bool:
        if self._is_rigid or not self._shape:
            return place.shape == self._shape
        return len(place.shape) == len(self._shape) and place.shape[1:] == self._shape[1:]


def _dtype_problem(name: AdapterTensorName, source: TensorSource, base: TensorSource) -> Problem | None:
    is_castable = DTYPES[source.dtype].is_mergeable and DTYPES[base.dtype].is_mergeable
    return (
        None if is_castable or source.dtype == base.dtype else Problem(name.text, f"dtype {base.dtype}", source.dtype)
    )
