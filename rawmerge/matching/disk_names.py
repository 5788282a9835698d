"""Every name that a base's tensors answer to: those on disk, and those that transformers gives them in memory.

Both sides, disk and adapter, are renamed to what transformers calls them today; what meets there is the same tensor.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Final

from rawmerge.errors import quote
from rawmerge.families import Family, FusedPlace, auto_classes, family_of
from rawmerge.formats.model_config import ModelConfig
from rawmerge.inputs.base_checkpoint import BaseCheckpoint
from rawmerge.inputs.tensor_source import TensorSource
from rawmerge.matching.places import Piece, Place, whole

#: Experts in families that transformers' table does not list: projection -> (fused parameter, part, parts).
_EXPERT_PARTS: Final = {
    "gate_proj": ("gate_up_proj", 0, 2),
    "up_proj": ("gate_up_proj", 1, 2),
    "down_proj": ("down_proj", 0, 1),
    "w1": ("gate_up_proj", 0, 2),
    "w3": ("gate_up_proj", 1, 2),
    "w2": ("down_proj", 0, 1),
}
_EXPERT: Final = re.compile(rf"(.*\.experts)\.([0-9]{{1,9}})\.({'|'.join(_EXPERT_PARTS)})\.weight")
#: Families that hold an expert as (in, out); the second set has gate and up in alternating columns.
TRANSPOSED_EXPERTS: Final = frozenset(
    {"gpt_oss", "openai_privacy_filter", "llama4", "llama4_text", "aria", "aria_text"}
)
INTERLEAVED_EXPERTS: Final = frozenset({"gpt_oss"})


class DiskNames:
    """The tensors of one base under all their names.

    Attributes:
        tensors: disk name to its bytes.
        family: the renames that hold.
        model_type: of the base's config; model_types: also those nested in it.
        is_known_family: whether transformers' own classes hold the model.
        places: canonical name to the places that answer to it; more than one is an ambiguity.
        incomplete: canonical names of fused parameters of which experts are missing or unlike: name to the reason.
    """

    def __init__(self, base: BaseCheckpoint, trained_class: str) -> None:
        self.tensors = base.tensors
        self.family = _family(base.config, trained_class)
        self.model_type = base.config.model_type
        self.model_types = base.config.model_types
        self.is_known_family = base.config.is_of_transformers
        self.places: dict[str, list[Place]] = defaultdict(list)
        self.incomplete: dict[str, str] = {}
        self._experts: dict[str, dict[tuple[int, int], str]] = defaultdict(dict)
        self._parts: dict[str, int] = {}
        self._stacks: dict[tuple[str, int], dict[int, str]] = defaultdict(dict)
        for name, source in base.tensors.items():
            self._enter(name, source)
        self._enter_experts()
        self._enter_stacks()

    def fused_place(self, canonical_name: str) -> FusedPlace | None:
        """Return where an expert's own tensor lies in the parameter that a model may hold fused."""
        if place := self.family.fused_place(canonical_name):
            return place
        match = _EXPERT.fullmatch(canonical_name)
        if not match:
            return None
        parameter, part, parts = _EXPERT_PARTS[match[3]]
        return FusedPlace(f"{match[1]}.{parameter}", int(match[2]), part, parts)

    def _enter(self, name: str, source: TensorSource) -> None:
        canonical = self.family.canonical(name)
        self.places[canonical].append(whole(name, source.shape))
        chunks = self.family.chunks(canonical)
        for number, memory_name in enumerate(chunks):
            if place := _chunk(name, source.shape, number, len(chunks)):
                self.places[memory_name].append(place)
        if fused := self.fused_place(canonical):
            twin = self._experts[fused.parameter].setdefault((fused.expert, fused.part), name)
            if twin != name:
                self.incomplete[fused.parameter] = f"two tensors for one expert, {quote(twin)} and {quote(name)}"
            self._parts[fused.parameter] = fused.parts
        if stacked := self.family.stacked(canonical):
            memory_name, at, count = stacked
            self._stacks[memory_name, count][at] = name

    def _enter_experts(self) -> None:
        for parameter, names in self._experts.items():
            shapes = [self.tensors[name].shape for name in names.values()]
            count = 1 + max(expert for expert, _ in names)
            expected = count * self._parts[parameter]
            if parameter in self.incomplete:
                continue
            if len(names) != expected:
                self.incomplete[parameter] = f"{len(names)} of {expected} tensors of its {count} experts"
            elif len(set(shapes)) != 1 or len(shapes[0]) != 2:
                self.incomplete[parameter] = "experts of unlike shapes"
            else:
                self.places[parameter].append(_experts_place(names, shapes[0], count, self._parts[parameter]))

    def _enter_stacks(self) -> None:
        for (memory_name, count), names in self._stacks.items():
            shapes = {self.tensors[name].shape[1:] for name in names.values()}
            if len(names) == count and len(shapes) == 1:
                ordered = [names[number] for number in range(count)]
                self.places[memory_name].append(_stack(ordered, self.tensors))


def _family(config: ModelConfig, trained_class: str) -> Family:
    nested = [name for kind in sorted(config.model_types) for name in (kind, *auto_classes(kind))]
    roots = [*config.architectures, *filter(None, [trained_class, config.model_type])]
    return family_of(roots, [name for name in nested if name not in roots])


def _chunk(name: str, shape: tuple[int, ...], number: int, count: int) -> Place | None:
    """Return the place of one of `count` equal parts of a tensor's rows."""
    if not shape or shape[0] % count:
        return None
    rows = shape[0] // count
    return Place((rows, *shape[1:]), (Piece(name, number * rows, rows),))


def _stack(names: list[str], tensors: Mapping[str, TensorSource]) -> Place:
    at, pieces = 0, []
    for name in names:
        rows = tensors[name].shape[0]
        pieces.append(Piece(name, 0, rows, at))
        at += rows
    return Place((at, *tensors[names[0]].shape[1:]), tuple(pieces))


def _experts_place(names: Mapping[tuple[int, int], str], shape: tuple[int, ...], count: int, parts: int) -> Place:
    """Return the place of a fused parameter (experts, parts * rows, columns) whose experts are tensors of their own."""
    rows, columns = shape
    pieces = tuple(
        Piece(names[expert, part], 0, rows, (expert * parts + part) * rows, expert)
        for expert in range(count)
        for part in range(parts)
    )
    return Place((count, parts * rows, columns), pieces, view_columns=columns)


def expert_slices(fused: Place, place: FusedPlace, is_interleaved: bool) -> Iterable[Place]:
    """Yield the places that one expert's matrix may have in a fused parameter: stored (out, in), stored (in, out).

    Args:
        fused: a parameter (experts, ., .) that is one disk tensor.
        place: which expert and which part.
        is_interleaved: whether the parts alternate instead of following each other.
    """
    count, height, width = fused.shape
    if not 0 <= place.expert < count:
        return
    first = place.expert * height
    if height % place.parts == 0 and not is_interleaved:
        rows = height // place.parts
        piece = Piece(fused.name, first + place.part * rows, rows, expert=place.expert)
        yield Place((rows, width), (piece,), view_columns=width, is_transposed=False)
    if width % place.parts == 0:
        columns = width // place.parts
        start, step = (place.part, place.parts) if is_interleaved else (place.part * columns, 1)
        piece = Piece(fused.name, first, height, 0, place.expert, start, step, columns)
        yield Place((height, columns), (piece,), view_columns=width, is_transposed=True)
