"""The model card of an output: its `README.md`, from the plan and from what the cards of base and adapters state.

Names and values come from strangers: in the front matter they are quoted as YAML, in the text they are code spans, and
nothing of them is printed that a line cannot hold. There is no date and no path in it, so that the same inputs and
options give the same card.

Source: the hub's documentation, "Model Cards": `base_model` holds hub ids, of a merge all that it was made of, with
`base_model_relation: merge`.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from rawmerge._version import __version__
from rawmerge.byte_sizes import size_text
from rawmerge.errors import printable
from rawmerge.formats.card_metadata import OTHER, CardMetadata, Licence
from rawmerge.formats.front_matter import format_front_matter
from rawmerge.inputs.identity import RECORD_NAME
from rawmerge.merge_options import ONCE, MergeOptions
from rawmerge.merge_plan import MergePlan
from rawmerge.output.outcome import count_steps

_HUB: Final = "https://huggingface.co"
_MAX_LENGTH: Final = 200
_MAX_NAMES: Final = 20


@dataclass(frozen=True, slots=True)
class CardSource:
    """A base or an adapter, as a card names it.

    Attributes:
        name: its hub id, else the last name of its folder or file.
        is_on_hub: whether that is a hub id.
        commit: the hub's commit, or empty.
        metadata: what its own card states.
    """

    name: str
    is_on_hub: bool = False
    commit: str = ""
    metadata: CardMetadata = field(default_factory=CardMetadata)

    @property
    def argument(self) -> str:
        """What names it on a command line."""
        return f"{self.name}@{self.commit}" if self.commit else self.name

    @property
    def short_name(self) -> str:
        """The last part of its name."""
        return self.name.rpartition("/")[2]


@dataclass(frozen=True, slots=True)
class CardAdapter:
    """An adapter in a card.

    Attributes:
        source: how it is named.
        title: its kind, as people call it; tags: the same for the hub.
        ranks: the ranks of its products, smallest first; none for kinds without.
        targets: modules that it was to change, or a pattern of them.
        replaced: modules that it replaces whole.
        bits: "equal" to those of PEFT's merge, or what is known of them.
        is_foreign: whether its file is none of PEFT's.
        weight: the factor on what it adds.
    """

    source: CardSource
    title: str
    tags: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()
    targets: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    bits: str = "equal"
    is_foreign: bool = False
    weight: float = 1.0

    @property
    def argument(self) -> str:
        """What names it, with its weight, on a command line."""
        return self.source.argument if self.weight == 1 else f"{self.source.argument}:{self.weight!r}"


def card_text(plan: MergePlan, base: CardSource, adapters: Sequence[CardAdapter], kept_cards: Sequence[str]) -> str:
    """Return the card.

    Args:
        plan: the merge, all of it but the card.
        base: the base.
        adapters: the adapters in the order in which they are applied.
        kept_cards: names in the output of cards that the base brought.
    """
    licence = merged_licence(base, adapters, {file.name for file in plan.side_files})
    metadata = _front_matter(plan, base, adapters, licence)
    parts = [_origin(base, adapters, kept_cards), _making(plan, base, adapters), _checking(base, adapters)]
    return "\n".join([metadata, *parts, _licence_text(licence, base, adapters)])


def merged_licence(base: CardSource, adapters: Sequence[CardAdapter], files: Iterable[str]) -> Licence:
    """Return the licence that the front matter states: the base's, or none of them alone where cards contradict it.

    An adapter's licence is never stated for the base's weights.

    Args:
        base: the base.
        adapters: the adapters.
        files: files that a link may name.
    """
    own = base.metadata.licence
    if own.is_told and (others := differing_licences(base, adapters)):
        slugs = (re.sub(r"[^a-z0-9.+]+", "-", label.lower()).strip("-") for label in (own.label, *others))
        return Licence(OTHER, "-and-".join(slugs))
    is_there = own.link.startswith(("https://", "http://")) or own.link in set(files)
    return own if is_there else dataclasses.replace(own, link="")


def differing_licences(base: CardSource, adapters: Iterable[CardAdapter]) -> list[str]:
    """Return what adapters' cards state beside the base's licence, each once, where they say which terms hold."""
    stated = (adapter.source.metadata.licence for adapter in adapters)
    labels = dict.fromkeys(licence.label for licence in stated if licence.is_told)
    return [label for label in labels if label.lower() != base.metadata.licence.label.lower()]


def _front_matter(plan: MergePlan, base: CardSource, adapters: Sequence[CardAdapter], licence: Licence) -> str:
    cards = [base.metadata, *(adapter.source.metadata for adapter in adapters)]
    models = [source.name for source in (base, *(adapter.source for adapter in adapters)) if source.is_on_hub]
    return format_front_matter(
        {
            # an adapter's model it is not: without the base, nothing
            "base_model": "" if not base.is_on_hub else models if len(models) > 1 else models[0],
            "base_model_relation": "merge" if base.is_on_hub else "",
            "language": next((card.languages for card in cards if card.languages), ()),
            "library_name": base.metadata.library_name or ("transformers" if plan.base_config_sha256 else ""),
            "license": licence.identifier,
            "license_name": licence.name,
            "license_link": licence.link,
            "pipeline_tag": next((card.pipeline_tag for card in cards if card.pipeline_tag), ""),
            "tags": list(dict.fromkeys(["merge", "rawmerge", *(tag for one in adapters for tag in one.tags)])),
        }
    )


def _origin(base: CardSource, adapters: Sequence[CardAdapter], kept_cards: Sequence[str]) -> str:
    with_what = _code(adapters[0].source.short_name) if len(adapters) == 1 else f"{len(adapters)} adapters"
    whose = "the adapter's changes are" if len(adapters) == 1 else "the adapters' changes are"
    lines = [
        f"# {_code(base.short_name)} with {with_what}",
        "",
        f"A merge by rawmerge {__version__}: {whose} part of the weights. It loads as the base does, without PEFT.",
        "",
        f"- Base: {_link(base)}",
        *(f"- Adapter: {'; '.join(_facts(adapter))}" for adapter in adapters),
        "",
        *(f"The base's own card is [{name}]({name}).\n" for name in kept_cards),
    ]
    return "\n".join(lines)


def _facts(adapter: CardAdapter) -> Iterator[str]:
    """Yield what is worth knowing of an adapter, in a few words each."""
    yield _link(adapter.source)
    ranks = adapter.ranks
    rank = f", rank {ranks[0]}" if len(ranks) == 1 else f", ranks {ranks[0]} to {ranks[-1]}" if ranks else ""
    on = f", on {_names(adapter.targets)}" if adapter.targets else ""
    yield f"{adapter.title}{rank}{on}"
    if adapter.replaced:
        yield f"{_names(adapter.replaced)} replaced whole"
    if adapter.weight != 1:
        yield f"weight {adapter.weight!r}"


def _making(plan: MergePlan, base: CardSource, adapters: Sequence[CardAdapter]) -> str:
    arguments = [base.argument, *(adapter.argument for adapter in adapters), "--output", "merged"]
    counts = count_steps(plan)
    told = {"cast": "stored in another dtype", "replaced": "replaced", "added": "added"}
    others = "".join(f", {counts[what]} {text}" for what, text in told.items() if counts[what])
    kept = f", {counts['kept']} are the base's, byte for byte" if counts["kept"] else ""
    lines = [
        "## How it was made",
        "",
        _command("merge", *arguments, *_given(plan.options)),
        f"Of {sum(counts.values())} tensors {counts['updated']} are updated{others}{kept}.",
        *_arithmetic(plan.options, adapters),
        f"It was computed on a CPU, unless `{RECORD_NAME}` names another device.",
        "",
    ]
    return "\n".join(lines)


def _given(options: MergeOptions) -> Iterator[str]:
    """Yield the options of a command line that are not the usual ones.

    `--force` is not among them: it changes no byte, and a verification makes the plan with it. `--combine` decides the
    order.
    """
    untold = {"force", "order"} if options.combine else {"force"}
    for choice in dataclasses.fields(options):
        value, flag = getattr(options, choice.name), f"--{choice.name.replace('_', '-')}"
        if value == choice.default or choice.name in untold:
            continue
        yield flag
        if not isinstance(value, bool):
            yield size_text(value) if choice.name == "max_shard_size" else f"{value}"


def _arithmetic(options: MergeOptions, adapters: Sequence[CardAdapter]) -> Iterator[str]:
    """Yield sentences on how values were computed and rounded."""
    is_once = options.order == ONCE and len(adapters) > 1
    if options.dtype:
        yield f"All float tensors are stored in {options.dtype}."
    if len(adapters) > 1:
        how = f"combined by `{options.combine}`" if options.combine else "summed"
        yield f"What the adapters add is {how}." if is_once else "The adapters are merged one after the other."
    exceptions = {adapter.title: adapter.bits for adapter in adapters if adapter.bits != "equal"}
    if options.compute_dtype != "float32" or options.dtype or is_once:
        yield f"Updates were computed in {options.compute_dtype} and rounded to the stored dtype."
    elif not exceptions:
        yield "Updates were computed in float32 and rounded as PEFT's `merge_and_unload()` does:"
        yield "on the same CPU the bits are the same."
    else:
        whose = "" if all(adapter.is_foreign for adapter in adapters) else ", beside PEFT's on the same CPU"
        yield "Updates were computed in float32."
        yield from (f"Bits of {title}{whose}: {bits}." for title, bits in exceptions.items())


def _checking(base: CardSource, adapters: Sequence[CardAdapter]) -> str:
    given = [text for adapter in adapters for text in ("--adapter", adapter.argument)]
    lines = [
        "## How to check it",
        "",
        _command("verify", ".", "--base", base.argument, *given),
        "This computes every tensor again and compares it bit for bit.",
        f"`{RECORD_NAME}` has versions, options, checksums, and what became of every tensor of the adapter.",
        "",
    ]
    return "\n".join(lines)


def _licence_text(licence: Licence, base: CardSource, adapters: Sequence[CardAdapter]) -> str:
    own, others = base.metadata.licence, differing_licences(base, adapters)
    lines = ["## Licence", ""]
    if own.is_told:
        link = f" ([terms](<{licence.link}>))" if licence.link else ""
        lines.append(f"The base's card states {_code(own.label)}{link}.")
    else:
        lines.append("No card of the base states a licence that could be read here; its terms hold all the same.")
    for adapter in adapters:
        if adapter.source.metadata.licence.label in others:
            stated = _code(adapter.source.metadata.licence.label)
            lines.append(f"The card of the adapter {_code(adapter.source.short_name)} states {stated}.")
    if others:
        lines.append("The terms of each may hold for this checkpoint." if own.is_told else "That is not the base's.")
    return "\n".join([*lines, ""])


def _command(*words: str) -> str:
    return f"{_fenced(shlex.join(['rawmerge', *map(printable, words)]))}\n"


def _fenced(text: str) -> str:
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}shell\n{text}\n{fence}"


def _code(text: str) -> str:
    """Return a code span, in which nothing of a text is Markdown or HTML."""
    shown = printable(text)[:_MAX_LENGTH] or "?"
    ticks = "`" * (_longest_run(shown) + 1)
    pad = " " if "`" in shown or shown != shown.strip() else ""
    return f"{ticks}{pad}{shown}{pad}{ticks}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(map(_code, names[:_MAX_NAMES])) + more


def _link(source: CardSource) -> str:
    if not source.is_on_hub:
        return _code(source.name)
    at = f" at commit {_code(source.commit)}" if source.commit else ""
    return f"[{_code(source.name)}]({_HUB}/{source.name}){at}"
