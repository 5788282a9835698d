"""From the adapter's names to the base's: exact, by prefix, by family, by a unique suffix; one hit, or none.

Source of the order: transformers 5.23 `core_model_loading.rename_source_key` (renames, then the base-model prefix);
the suffix rule is rawmerge's own, for classes that neither side names.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from rawmerge.families import FusedPlace, base_prefixes
from rawmerge.matching.disk_names import INTERLEAVED_EXPERTS, TRANSPOSED_EXPERTS, DiskNames, expert_slices
from rawmerge.matching.places import Place, whole

#: Segments that say which class wrapped the text model, not which tower of a model is meant.
_NEUTRAL: Final = frozenset({"base_model", "model", "module", "language_model", "thinker", "llm"})
#: On disk this one names the text tower as well; in an adapter it may be that of a model with an image tower.
_NEUTRAL_ON_DISK: Final = frozenset({"text_model"})
_USUAL_PREFIXES: Final = frozenset({"model", "transformer"})


@dataclass(frozen=True, slots=True)
class Target:
    """A name of the trained model, and what could hold it.

    Attributes:
        name: the tensor's name in the trained model.
        fits: whether a place has a shape that the adapter's tensors can go to.
    """

    name: str
    fits: Callable[[Place], bool]


@dataclass(frozen=True, slots=True)
class Resolution:
    """Where a name leads.

    Attributes:
        place: the one place; None where there is none or several.
        candidates: disk tensors of all places where there are several.
    """

    place: Place | None
    candidates: tuple[str, ...] = ()


class NameResolver:
    """Finds the one place on disk that each name of an adapter means."""

    def __init__(self, names: DiskNames) -> None:
        self.names = names
        own = base_prefixes([names.model_type])
        self._prefixes = sorted(own or _USUAL_PREFIXES)
        self._inner_prefixes = sorted(base_prefixes(names.model_types))
        self._neutral = _NEUTRAL | own

    def resolve(self, targets: Sequence[Target]) -> dict[str, Resolution]:
        """Return the resolution of each target's name."""
        found: dict[str, Resolution] = {}
        open_targets = []
        for target in targets:
            if resolution := self._by_rule(target):
                found[target.name] = resolution
            else:
                open_targets.append(target)
        return found | self._by_suffix(open_targets)

    def _by_rule(self, target: Target) -> Resolution | None:
        for rule in (self._exact, self._by_prefix, self._by_family, self._by_expert):
            places = list(dict.fromkeys(rule(target)))
            if len(places) > 1:
                places = [place for place in places if target.fits(place)] or places
            if len(places) == 1:
                return Resolution(places[0])
            if places:
                return Resolution(None, tuple(dict.fromkeys(place.name for place in places)))
        return None

    def _exact(self, target: Target) -> Iterator[Place]:
        if source := self.names.tensors.get(target.name):
            yield whole(target.name, source.shape)

    def _by_prefix(self, target: Target) -> Iterator[Place]:
        for name in self._with_and_without_prefix(target.name):
            if source := self.names.tensors.get(name):
                yield whole(name, source.shape)

    def _by_family(self, target: Target) -> Iterator[Place]:
        family = self.names.family
        canonical = family.canonical(target.name)
        for name in (canonical, *map(family.canonical, self._with_and_without_prefix(canonical))):
            if places := self.names.places.get(name):
                yield from places
                return

    def _by_expert(self, target: Target) -> Iterator[Place]:
        """Yield an expert's part of a parameter that the disk holds fused."""
        fused = self.names.fused_place(self.names.family.canonical(target.name))
        if fused is None:
            return
        for name in (fused.parameter, *self._with_and_without_prefix(fused.parameter)):
            for place in self.names.places.get(name, ()):
                if place.is_whole and len(place.shape) == 3:
                    yield from self._fitting_slices(target, list(self._slices(place, fused)))

    def _slices(self, place: Place, fused: FusedPlace) -> Iterable[Place]:
        is_interleaved = fused.parts > 1 and bool(self.names.model_types & INTERLEAVED_EXPERTS)
        return expert_slices(place, fused, is_interleaved)

    def _fitting_slices(self, target: Target, slices: list[Place]) -> Iterable[Place]:
        fitting = [place for place in slices if target.fits(place)]
        if len(fitting) > 1 and self.names.model_types & TRANSPOSED_EXPERTS:
            return [place for place in fitting if place.is_transposed]
        if len(fitting) > 1 and self.names.is_known_family:
            return [place for place in fitting if not place.is_transposed]
        return fitting or slices[:1]

    def _with_and_without_prefix(self, name: str) -> Iterator[str]:
        for prefix in self._prefixes:
            yield f"{prefix}.{name}"
            if name.startswith(f"{prefix}."):
                yield name.removeprefix(f"{prefix}.")
        for prefix in self._inner_prefixes:
            if f".{prefix}." in name:  # a model inside another, which the disk holds without its wrapper
                yield name.replace(f".{prefix}.", ".", 1)

    def _by_suffix(self, targets: Iterable[Target]) -> dict[str, Resolution]:
        return _SuffixSearch(self.names, self._neutral).resolve(targets)


class _SuffixSearch:
    """Fits names by their ends: all tensors of one stack of layers together, so that no layer goes astray alone."""

    def __init__(self, names: DiskNames, neutral: frozenset[str]) -> None:
        self._names = names
        self._neutral = neutral
        self._plain = neutral | _NEUTRAL_ON_DISK
        #: What was put in front, in place of what was taken away, where a stack of layers was found.
        self._learned: dict[tuple[str, ...], set[tuple[str, ...]]] = defaultdict(set)

    def resolve(self, targets: Iterable[Target]) -> dict[str, Resolution]:
        stacks: dict[tuple[str, ...], list[Target]] = defaultdict(list)
        singles: list[Target] = []
        for target in targets:
            stem = _stem(self._canonical(target))
            if stem:
                stacks[stem].append(target)
            else:
                singles.append(target)
        found: dict[str, Resolution] = {}
        for stem, group in stacks.items():
            found |= self._resolve_group(stem, group)
        for target in singles:
            found |= self._resolve_group(tuple(self._canonical(target).split(".")[:-1]), [target])
        return found

    def _canonical(self, target: Target) -> str:
        return self._names.family.canonical(target.name)

    def _resolve_group(self, stem: tuple[str, ...], group: list[Target]) -> dict[str, Resolution]:
        rests = [self._canonical(target).split(".")[len(stem) :] for target in group]
        for count in range(len(stem)):
            if count and stem[count - 1] not in self._neutral:
                break
            everywhere = self._fronts(stem[count:], rests[0])
            fronts = {front for front in everywhere if self._takes(front, stem[count:], group, rests)}
            fronts = fronts & self._learned[stem[:count]] or fronts
            is_tower = count == 0 and len(everywhere) == 1 and not set(stem[:-1]) <= self._plain
            if len(fronts) == 1 and not is_tower and not all(set(front) <= self._plain for front in fronts):
                break  # the only place that fits is in a tower that the adapter does not name
            if fronts:
                if len(group) > 1 and len(fronts) == 1:
                    self._learned[stem[:count]] |= fronts
                ends = [(*stem[count:], *rest) for rest in rests]
                return {target.name: self._choose(fronts, end, target) for target, end in zip(group, ends, strict=True)}
        return {target.name: Resolution(None) for target in group}

    def _choose(self, fronts: set[tuple[str, ...]], end: tuple[str, ...], target: Target) -> Resolution:
        if len(fronts) == 1:
            return Resolution(self._place((*next(iter(fronts)), *end), target))
        places = [self._place((*front, *end), target) for front in sorted(fronts)]
        return Resolution(None, tuple(place.name for place in places if place))

    def _fronts(self, stem: tuple[str, ...], rest: list[str]) -> set[tuple[str, ...]]:
        """Return all that stands before `stem` and `rest` on disk, whatever the shapes."""
        tail = ".".join((*stem, *rest))
        fronts = {_front(name, tail) for name in self._names.places if name == tail or name.endswith(f".{tail}")}
        if not _stem(tail):  # a head of another tower is not the text model's
            fronts = {front for front in fronts if set(front) <= self._plain}
        return fronts

    def _takes(
        self, front: tuple[str, ...], stem: tuple[str, ...], group: list[Target], rests: list[list[str]]
    ) -> bool:
        """Whether every tensor of the group has a place that fits behind `front`."""
        return all(self._place((*front, *stem, *rest), target) for target, rest in zip(group, rests, strict=True))

    def _place(self, segments: tuple[str, ...], target: Target) -> Place | None:
        fitting = [place for place in self._names.places.get(".".join(segments), ()) if target.fits(place)]
        return fitting[0] if len(fitting) == 1 else None


def _stem(name: str) -> tuple[str, ...]:
    """Return the segments before the first number, empty where the name has none behind a segment."""
    segments = name.split(".")
    first = next((place for place, segment in enumerate(segments) if segment.isdigit()), 0)
    return tuple(segments[:first])


def _front(name: str, tail: str) -> tuple[str, ...]:
    front = name.removesuffix(tail).removesuffix(".")
    return tuple(front.split(".")) if front else ()
