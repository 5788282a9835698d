"""What the model card of a plan is made of: names and cards of base and adapters; and the plan with its card.

The base's own card is never lost: the hub shows `README.md`, which is the merge's, and the base's stands beside it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Final

from rawmerge.errors import MissingFileError, quote
from rawmerge.formats.adapter_config import AdapterConfig
from rawmerge.formats.card_metadata import CARD_NAME, CardMetadata, parse_card_metadata
from rawmerge.inputs.adapter import Adapter
from rawmerge.inputs.base_checkpoint import BaseCheckpoint
from rawmerge.inputs.identity import pinned_repo, trained_base
from rawmerge.inputs.tensor_source import read_small_file
from rawmerge.merge_plan import AdapterInput, MergePlan, UpdateTensor, WrittenFile
from rawmerge.methods import ADAPTER_KINDS
from rawmerge.output.model_card import CardAdapter, CardSource, card_text, differing_licences
from rawmerge.output.side_files import SideFile

_KEPT_STEM: Final = "README_base"


def with_card(plan: MergePlan, base: BaseCheckpoint, adapters: Iterable[Adapter]) -> MergePlan:
    """Return a plan whose output has a model card, and the base's own card under another name.

    Args:
        plan: a plan whose base is a directory.
        base: its base.
        adapters: its adapters, in any order.
    """
    if any(file.name.lower().startswith(f"{CARD_NAME.lower()}/") for file in plan.side_files):
        return replace(plan, notes=(*plan.notes, f"the base has a folder {CARD_NAME}: no card is written"))
    sides, kept = _kept_cards(plan)
    plan = replace(plan, side_files=sides)
    notes: list[str] = []
    by_path = {str(adapter.weights.path): adapter for adapter in adapters}
    merged = [(given, by_path[given.files[0].path]) for given in plan.adapters]
    own = replace(_base_source(plan, base, merged), metadata=_read_card(base.root, "the base's", notes))
    described = [_card_adapter(plan, *one, notes) for one in merged]
    notes += _licence_notes(own, described)
    card = card_text(plan, own, described, kept)
    written = (*plan.written_files, WrittenFile(CARD_NAME, card))
    return replace(plan, written_files=written, notes=(*plan.notes, *dict.fromkeys(notes)))


def _licence_notes(base: CardSource, adapters: Iterable[CardAdapter]) -> Iterator[str]:
    """Yield what the cards' licences lead to where they differ."""
    labels = differing_licences(base, adapters)
    if labels and base.metadata.licence.is_told:
        listed = ", ".join(map(quote, (base.metadata.licence.label, *labels)))
        yield f"the cards of base and adapter state different licences ({listed}): the output's card names each"


def _kept_cards(plan: MergePlan) -> tuple[tuple[SideFile, ...], list[str]]:
    """Return the side files with the base's card under a free name, and that name."""
    texts = (*(file.name for file in plan.written_files), *(shard.name for shard in plan.shards))
    taken = {name.lower() for name in (*texts, *(file.name for file in plan.side_files))}
    sides, kept = [], []
    for file in plan.side_files:
        if file.name.lower() != CARD_NAME.lower():  # some file systems know one of `readme.md` and `README.md`
            sides.append(file)
            continue
        name = next(name for name in _kept_names() if name.lower() not in taken)
        taken.add(name.lower())
        kept.append(name)
        sides.append(replace(file, name=name))
    return tuple(sides), kept


def _kept_names() -> Iterator[str]:
    yield f"{_KEPT_STEM}.md"
    yield from (f"{_KEPT_STEM}_{number}.md" for number in count(2))


def _read_card(root: Path, whose: str, notes: list[str]) -> CardMetadata:
    """Return what the card in a folder states; say so where it cannot be read."""
    path = root / CARD_NAME
    if not path.is_file():
        return CardMetadata()
    try:
        metadata = parse_card_metadata(read_small_file(path))
    except (ValueError, MissingFileError):
        notes.append(f"{whose} {CARD_NAME} has no front matter that can be read: the card inherits nothing from it")
        return CardMetadata()
    if metadata.unread:
        listed = ", ".join(metadata.unread)
        notes.append(f"{whose} {CARD_NAME}: {listed} not taken over into the card, for the hub would not read it")
    return metadata


def _base_source(plan: MergePlan, base: BaseCheckpoint, merged: Iterable[tuple[AdapterInput, Adapter]]) -> CardSource:
    if pinned := pinned_repo(base.root, plan.base_repo):
        return _on_hub(pinned)
    # one that holds adapters already, or is taken in spite of what tells against it, is not what they were trained on
    is_another = plan.history or any(note.endswith("by force") for note in plan.notes)
    names = () if is_another else [adapter.config.base_model_name for _, adapter in merged]
    if name := trained_base(base, names):
        return _on_hub(name)
    return CardSource(base.root.name or "base")


def _on_hub(pinned: str) -> CardSource:
    name, _, commit = pinned.partition("@")
    return CardSource(name, is_on_hub=True, commit=commit)


def _adapter_source(given: AdapterInput, adapter: Adapter, notes: list[str]) -> CardSource:
    is_bare = not adapter.config_text  # one file, perhaps among others: what lies beside it is not its own
    name = adapter.weights.path.name if is_bare else adapter.root.name
    pinned = pinned_repo(adapter.root, given.repo)
    source = _on_hub(pinned) if pinned else CardSource(name or "adapter")
    return source if is_bare else replace(source, metadata=_read_card(adapter.root, "the adapter's", notes))


def _card_adapter(plan: MergePlan, given: AdapterInput, adapter: Adapter, notes: list[str]) -> CardAdapter:
    kind, config = ADAPTER_KINDS[adapter.config.kind], adapter.config
    variants = list(kind.variants({**config.values, "use_rslora": config.use_rslora}))
    title = kind.title.partition(":")[0]
    return CardAdapter(
        _adapter_source(given, adapter, notes),
        title=f"{title} ({', '.join(variants)})" if variants else title,
        tags=tuple(text.lower() for text in (config.kind, *variants) if " " not in text),
        ranks=_ranks(plan, given.files[0].path),
        targets=_targets(config),
        replaced=tuple(sorted(config.modules_to_save)),
        bits=kind.bits,
        is_foreign=kind.is_foreign,
        weight=given.weight,
    )


def _targets(config: AdapterConfig) -> tuple[str, ...]:
    targets: Collection[str] = config.target_modules
    listed = (targets,) if isinstance(targets, str) else tuple(sorted(targets))
    return (*filter(None, listed), *sorted(config.target_parameters))


def _ranks(plan: MergePlan, path: str) -> tuple[int, ...]:
    """Return the ranks of all products of an adapter, by its file, smallest first."""
    updates = (update for step in plan.steps() if isinstance(step, UpdateTensor) for update in step.updates)
    own = (update for update in updates if any(source.path == path for source in update.tensors.values()))
    return tuple(sorted({update.rank for update in own if update.rank}))
