"""Which adapter tensor goes to which base tensor: every one of them is accounted for, or the merge is refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from rawmerge.errors import AdapterError, PlanError, Problem, UnsupportedAdapterError, quote
from rawmerge.formats.adapter_fields import LORA
from rawmerge.formats.adapter_names import (
    PAIR_ROLES,
    AdapterTensorName,
    adapter_names,
    describe_foreign,
    find_duplicates,
    parse_adapter_names,
)
from rawmerge.formats.name_grammar import Grammar
from rawmerge.inputs.adapter import Adapter
from rawmerge.inputs.base_checkpoint import BaseCheckpoint
from rawmerge.inputs.tensor_source import TensorSource
from rawmerge.matching.disk_names import DiskNames
from rawmerge.matching.embedding_names import INPUT_EMBEDDINGS, module_of
from rawmerge.matching.flat_names import unflatten
from rawmerge.matching.ledger import Addition, Ledger
from rawmerge.matching.module_matching import ModuleMatcher
from rawmerge.matching.naming import NameResolver
from rawmerge.matching.row_matching import RowMatcher
from rawmerge.matching.stored_matching import StoredMatcher
from rawmerge.matching.tie import find_tie
from rawmerge.matching.tied_embeddings import TieSettlement, check_unknown_tie
from rawmerge.matching.unmatched import Unmatched
from rawmerge.matching.untouched import absent_note, untouched_note
from rawmerge.matching.vocabulary import check_vocabulary
from rawmerge.merge_options import MergeOptions
from rawmerge.merge_plan import AdapterUse, Update
from rawmerge.methods import ADAPTER_KINDS
from rawmerge.methods.interface import AdapterKind

_STORED = frozenset({"stored", "stored_base", "saved_copy", "original_copy"})


@dataclass(frozen=True, slots=True)
class Matches:
    """Where the adapter's tensors go.

    Attributes:
        updates: output tensor name to the updates it gets, in order.
        replacements: base tensor name to the adapter tensor that replaces it.
        overlays: base tensor name to the adapter tensor that takes the place of its first rows.
        additions: output tensors that the base lacks.
        columns: tensor name to the columns of its matrix view, where that is not the default.
        cuts: tensor name to the rows of that view at which a product begins.
        is_untied: whether a tie of input and output embedding is undone.
        uses: every adapter tensor, in file order.
        notes: what a user may want to know.
    """

    updates: Mapping[str, tuple[Update, ...]]
    replacements: Mapping[str, TensorSource]
    overlays: Mapping[str, TensorSource]
    additions: Mapping[str, Addition]
    columns: Mapping[str, int]
    cuts: Mapping[str, tuple[int, ...]]
    is_untied: bool
    uses: tuple[AdapterUse, ...]
    notes: tuple[str, ...]


def grammar_of(kind: AdapterKind) -> Grammar:
    """Return how a kind names its tensors."""
    return Grammar(kind.parts, kind.shared, has_pairs=kind.peft_type == LORA, is_foreign=kind.is_foreign)


def match_adapter(base: BaseCheckpoint, adapter: Adapter, options: MergeOptions) -> Matches:
    """Return where each adapter tensor goes.

    Raises:
        PlanError, AdapterError, UnsupportedAdapterError: with every tensor that finds no place, or does not fit.
    """
    ledger = Ledger(base, adapter)
    kind = ADAPTER_KINDS[adapter.config.kind]
    names = parse_adapter_names(adapter.tensors, grammar_of(kind))
    _check_names(ledger, names)
    ledger.notes.extend(adapter.notes)
    disk_names = DiskNames(base, adapter.config.base_model_class)
    if kind.has_flat_names:
        names = unflatten(ledger, names, disk_names)
    names = [_on_embedding(name, kind) for name in names]
    resolver, unmatched = NameResolver(disk_names), Unmatched(base, disk_names)
    tie = find_tie(base.config, disk_names)
    whole = {name.module_path for name in names if name.role == "stored_base" and name.parameter == "weight"}
    paired = whole & {name.module_path for name in names if name.role in PAIR_ROLES}
    stored = StoredMatcher(ledger, resolver, unmatched, tie, options.vocab, options.force, paired)
    stored.match(name for name in names if name.role in _STORED)
    pairs = (name for name in names if name.role not in {*_STORED, "foreign", "token_rows"})
    ModuleMatcher(ledger, resolver, unmatched, tie, options).match(pairs)
    RowMatcher(ledger, resolver, unmatched, tie).match(name for name in names if name.role == "token_rows")
    ledger.problems.raise_if_any()
    needs_all = kind.needs_all_targets(adapter.config.values)
    if note := untouched_note(disk_names, adapter.config, ledger.updates.keys(), is_exact=needs_all):
        _settle_untouched(ledger, kind, note)
    if note := absent_note(adapter.config, {name.module_path for name in names if name.role in _STORED}):
        ledger.notes.append(note)
    check_unknown_tie(base.config, tie, ledger)
    is_untied = bool(tie and TieSettlement(tie, ledger).settle())
    check_vocabulary(ledger)
    ledger.problems.raise_if_any()
    return _matches(ledger, is_untied)


def _settle_untouched(ledger: Ledger, kind: AdapterKind, note: str) -> None:
    """Tell of targets without tensors, or refuse where the others' numbers were drawn with them."""
    if not kind.needs_all_targets(ledger.adapter.config.values):
        ledger.notes.append(note)
        return
    expected = f"tensors for every module that target_modules fits: {kind.title} draws numbers for all of them together"
    problem = Problem(str(ledger.adapter.weights.path), expected, note, "the file is incomplete; save it again")
    ledger.problems.add(PlanError, [problem])


def _matches(ledger: Ledger, is_untied: bool) -> Matches:
    order = {name: place for place, name in enumerate(ledger.adapter.tensors)}
    return Matches(
        updates={name: tuple(updates) for name, updates in ledger.updates.items() if updates},
        replacements=ledger.replacements,
        overlays=ledger.overlays,
        additions=ledger.additions,
        columns=ledger.columns,
        cuts={name: tuple(sorted(cuts)) for name, cuts in ledger.cuts.items()},
        is_untied=is_untied,
        uses=tuple(sorted(ledger.uses, key=lambda use: order[use.name])),
        notes=tuple(ledger.notes),
    )


def _on_embedding(name: AdapterTensorName, kind: AdapterKind) -> AdapterTensorName:
    """Return the name with the role that it has on an embedding, where the module's name says that it is one."""
    role = kind.embedding_roles.get(name.role)
    return replace(name, role=role) if role and module_of(name.target) in INPUT_EMBEDDINGS else name


def _check_names(ledger: Ledger, names: Iterable[AdapterTensorName]) -> None:
    """Refuse what is not the kind's own, names that mean the same, and files of several adapters."""
    names = list(names)
    if not names:
        expected = f"tensors of an adapter of kind {ledger.adapter.config.kind}"
        problem = Problem(str(ledger.adapter.weights.path), expected, "no tensor at all")
        raise PlanError(problem)
    kind = ADAPTER_KINDS[ledger.adapter.config.kind]
    foreign = (foreign_problem(name.text, kind) for name in names if name.role == "foreign")
    ledger.problems.add(UnsupportedAdapterError, foreign)
    twice = (
        Problem(second, "each tensor once", f"{quote(first)}, which means the same")
        for first, second in find_duplicates(names)
    )
    ledger.problems.add(AdapterError, twice)
    if len(kept := sorted(adapter_names(names))) > 1:
        found = f"those of {len(kept)}: {', '.join(map(quote, kept[:10]))}"
        problem = Problem(str(ledger.adapter.weights.path), "the tensors of one adapter", found, "save each on its own")
        ledger.problems.add(AdapterError, [problem])


def foreign_problem(name: str, kind: AdapterKind) -> Problem:
    """Return why a tensor of this name is not merged."""
    own = "a tensor of a LoRA pair" if kind.peft_type == LORA else f"a tensor of {kind.title}"
    expected = f"{own}, or of a module in modules_to_save"
    return Problem(name, expected, describe_foreign(name), "this version does not merge it")
