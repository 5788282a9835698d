"""Tensors that the adapter stores whole: saved modules, trained biases, embeddings.

Source: PEFT 0.21.2 `utils/save_and_load.py` `get_peft_model_state_dict` (what is stored), `utils/other.py`
`ModulesToSaveWrapper`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Final

from rawmerge.dtypes import DTYPES
from rawmerge.errors import PlanError, Problem, UnsupportedAdapterError, quote
from rawmerge.formats.adapter_config import is_saved_module
from rawmerge.formats.adapter_fields import changes_base
from rawmerge.formats.adapter_names import AdapterTensorName
from rawmerge.inputs.comparison import same_values, sample_rows_equal
from rawmerge.inputs.identity import RECORD_NAME, merged_adapters, read_record
from rawmerge.inputs.tensor_source import TensorSource
from rawmerge.matching.embedding_names import EMBEDDINGS
from rawmerge.matching.ledger import Addition, Ledger
from rawmerge.matching.naming import NameResolver, Resolution, Target
from rawmerge.matching.places import Place
from rawmerge.matching.tie import Tie
from rawmerge.matching.unmatched import Unmatched
from rawmerge.matching.vocabulary import is_of_vocabulary
from rawmerge.merge_options import OVERLAY

#: Dtypes from fine to coarse; values are compared in the coarser one of two.
_PRECISION: Final = ("F64", "F32", "F16", "BF16")
#: How many rows are compared, and the share that must agree: a resized or trained few do not make another base.
_SAMPLED_ROWS: Final = 64
_LIKENESS: Final = 0.5
#: Modules whose rows are labels, of which an adapter may have others than the base.
_HEADS: Final = frozenset({"score", "classifier", "classification_head", "qa_outputs"})
#: What becomes of an earlier merge's change of an embedding of which a later adapter brings its frozen copy.
_LOSS: Final = f"what the merge told in the base's {RECORD_NAME} changed in this tensor is lost"
_AT_ONCE: Final = "merge both adapters at once into the base of before: rawmerge merge BASE FIRST SECOND"


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

    def _without_copies(self, names: list[AdapterTensorName]) -> list[AdapterTensorName]:
        """Return the names of trained tensors; PEFT stores copies beside them where the vocabulary was resized."""
        trained = {name.target: name for name in names if name.role in {"stored", "stored_base"}}
        kept = []
        for name in names:
            if name.role == "original_copy":
                self._ignore(name, "the untrained copy of a saved module")
            elif name.role == "saved_copy" and name.target in trained:
                self._ignore_copy(name, trained[name.target])
            else:
                kept.append(name)
        return kept

    def _ignore_copy(self, name: AdapterTensorName, other: AdapterTensorName) -> None:
        """Ignore a tensor that another one repeats; refuse one that it does not."""
        copy, source = self.ledger.source(name), self.ledger.source(other)
        if same_values(copy, source, copy.dtype):
            self._ignore(name, "a copy of the tensor that is stored under its own name")
        else:
            expected = f"the values of {quote(other.text)}, which replaces the same tensor"
            self.ledger.problems.add(PlanError, [Problem(name.text, expected, "others")])

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
        return is_beside or name.module_path.rpartition(".")[2] in EMBEDDINGS

    def _record(self, name: AdapterTensorName, resolution: Resolution) -> None:
        place = resolution.place
        if place and place.is_whole:
            self._replace_once(name, place)
        elif place or resolution.candidates:
            problem = self.unmatched.problem(name.text, name.target, resolution, "that it replaces")
            self.ledger.problems.add(PlanError, [problem])
        elif self.tie and (head := self.tie.place_of(self.resolver.names.family.canonical(name.target), self.ledger)):
            self._add(name, head.name, self.tie.input)
        elif twin := self._twin(name):
            self._ignore(name, f"equal to {quote(twin)}, which the base ties to it")
        elif target := self._beside(name):
            self._add(name, target)
        elif is_saved_module(self.ledger.adapter.config, name.module_path) and not self._is_known(name):
            self._add(name, name.target)
        else:
            problem = self.unmatched.problem(name.text, name.target, resolution, "that it replaces")
            self.ledger.problems.add(PlanError, [problem])

    def _add(self, name: AdapterTensorName, target: str, tied_to: str = "") -> None:
        """Add a tensor that the base lacks, in the place of a tied one where `tied_to` names the other side."""
        source = self.ledger.source(name)
        beside = self.ledger.base.tensors[tied_to] if tied_to else source
        if problem := self._shape_problem(name, source, beside) or _dtype_problem(name, source, beside):
            self.ledger.problems.add(PlanError, [problem])
            return
        if other := self.ledger.additions.get(target):
            same = same_values(source, other.source, source.dtype)
            problem = Problem(name.text, f"one tensor to add as {quote(target)}", "another one, of other values")
            self.ledger.problems.add(PlanError, [] if same else [problem])
            self._ignore(name, f"equal to what is added as {quote(target)}")
            return
        if tied_to and source.shape[0] < beside.shape[0]:
            self.ledger.overlays[target], source = source, beside
        self.ledger.additions[target] = Addition(source, tied_to, tied_to)
        self.ledger.account([name], "adds", target)

    def _beside(self, name: AdapterTensorName) -> str:
        """Return the name for a buffer or bias that the base lacks of a module that it has."""
        if not is_saved_module(self.ledger.adapter.config, name.module_path):
            return ""
        weight = Target(f"{name.module_path}.weight", lambda _: True)
        place = self.resolver.resolve([weight])[weight.name].place
        target = f"{place.name.removesuffix('.weight')}.{name.parameter}" if place and place.is_whole else ""
        return "" if target in self.ledger.base.tensors else target  # one that it has, of another shape, is no new one

    def _is_known(self, name: AdapterTensorName) -> bool:
        """Whether the base has a module of this name, or the path leads into its layers: then it is no new head."""
        segments = name.module_path.split(".")
        paths = [".".join(segments[: count + 1]) for count in range(len(segments))]
        head = next(path for path in paths if is_saved_module(self.ledger.adapter.config, path))
        own = {segment for tensor in self.ledger.base.tensors for segment in tensor.split(".")}
        return head.rpartition(".")[2] in own or any(segment.isdigit() for segment in segments)

    def _twin(self, name: AdapterTensorName) -> str:
        """Return a replaced tensor of the same values: a tied one is stored under each of its names."""
        source = self.ledger.source(name)
        # others, such as biases of zeros, are equal by chance
        tied = ((at, other) for at, other in self.ledger.replacements.items() if is_of_vocabulary(at))
        alike = ((at, other) for at, other in tied if other.shape == source.shape)
        return next((at for at, other in alike if same_values(source, other, source.dtype)), "")

    def _replace_once(self, name: AdapterTensorName, place: Place) -> None:
        """Replace a tensor, unless another of the adapter's has; that one must be the same."""
        source = self.ledger.source(name)
        other = self.ledger.replacements.get(place.name) or self.ledger.overlays.get(place.name)
        if other is None:
            self._replace(name, place)
        elif same_values(source, other, source.dtype):
            self._ignore(name, f"equal to what replaces {quote(place.name)}")
        else:
            problem = Problem(name.text, f"one tensor to replace {quote(place.name)}", "another one, of other values")
            self.ledger.problems.add(PlanError, [problem])

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
        saved = self.ledger.adapter.config.modules_to_save
        # a tied side is stored with the other, which was trained
        is_frozen = not any(module.rpartition(".")[2] in EMBEDDINGS for module in saved)
        is_frozen = is_frozen and not is_saved_module(self.ledger.adapter.config, name.module_path)
        if name.module_path in self.paired and changes_base(self.ledger.adapter.config.values):
            return None  # its initialisation changed it
        if not is_frozen or len(source.shape) != 2 or not DTYPES[base.dtype].is_mergeable:
            return None
        coarser = max((source.dtype, base.dtype), key=_PRECISION.index)
        share = sample_rows_equal(source, base, _SAMPLED_ROWS, coarser)
        is_merged = bool(merged_adapters(read_record(self.ledger.base.root).fields))
        if share >= _LIKENESS:
            if is_merged and not _is_same(source, base, coarser):
                self.ledger.notes.append(f"{quote(name.text)} replaces the base's: {_LOSS}; {_AT_ONCE}")
            return None
        return self._unlike(name, f"{share:.0%} of {_SAMPLED_ROWS} sampled rows equal", is_merged=is_merged)

    def _unlike(self, name: AdapterTensorName, found: str, *, is_merged: bool) -> Problem | None:
        """Return the refusal of a frozen embedding that is not the base's; a note instead where it is forced."""
        expected = "rows equal to the base's, for they were frozen in training"
        if self.is_forced:
            loss = f": {_LOSS}" if is_merged else ""
            self.ledger.notes.append(f"{quote(name.text)}: expected {expected}, found {found}; taken by force{loss}")
            return None
        hint = "the adapter was trained on another base; --force takes its embedding all the same"
        if is_merged:
            hint = f"{_AT_ONCE}. --force takes the adapter's embedding all the same: {_LOSS}"
        return Problem(name.text, expected, found, hint)

    def _is_head(self, name: AdapterTensorName) -> bool:
        """Whether the tensor is of a classification head, whose rows are labels."""
        is_saved = is_saved_module(self.ledger.adapter.config, name.module_path)
        return is_saved and not _HEADS.isdisjoint(name.module_path.split("."))


def _is_same(source: TensorSource, base: TensorSource, dtype: str) -> bool:
    """Whether the rows that both have are the same, rounded to a dtype."""
    common = min(source.shape[0], base.shape[0])
    return same_values(source.rows(0, common), base.rows(0, common), dtype)


class _LikeShape:
    """Whether a place may be replaced by a stored tensor: all dimensions but the first agree."""

    def __init__(self, ledger: Ledger, name: AdapterTensorName) -> None:
        self._shape = ledger.source(name).shape
        self._is_rigid = name.module_path.rpartition(".")[2] not in EMBEDDINGS

    def __call__(self, place: Place) -> bool:
        if self._is_rigid or not self._shape:
            return place.shape == self._shape
        return len(place.shape) == len(self._shape) and place.shape[1:] == self._shape[1:]


def _dtype_problem(name: AdapterTensorName, source: TensorSource, base: TensorSource) -> Problem | None:
    is_castable = DTYPES[source.dtype].is_mergeable and DTYPES[base.dtype].is_mergeable
    return (
        None if is_castable or source.dtype == base.dtype else Problem(name.text, f"dtype {base.dtype}", source.dtype)
    )
