"""How an adapter kind names its own tensors, as data, and how such names are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple


@dataclass(frozen=True, slots=True)
class Grammar:
    """How an adapter kind names its tensors.

    Attributes:
        parts: what stands behind a module's path, to the tensor's role; `*` is a number, and stands in the role for it.
        shared: the same for tensors of the whole adapter, behind `base_model` alone.
        has_pairs: whether LoRA's own pairs are part of it.
        is_foreign: whether the names are not PEFT's: then nothing else is followed, and PEFT's segments mean nothing.
    """

    parts: Mapping[str, str] = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)
    has_pairs: bool = False
    is_foreign: bool = False


#: LoRA without its variants.
PLAIN_LORA: Final = Grammar(has_pairs=True)


class OwnName(NamedTuple):
    """A name of the kind's own grammar.

    Attributes:
        role: what the tensor is for the module; module: segments of the module's path, none for a shared tensor.
        parameter: the module's parameter that it is about.
        adapter_name: the adapter's own name, where it was left in; else empty.
    """

    role: str
    module: list[str]
    parameter: str
    adapter_name: str


def read_own(segments: list[str], grammar: Grammar) -> OwnName | None:
    """Return what `<module>.<part>` or `base_model.<part>` is in a grammar, None where it is not of it.

    The adapter's name may stand behind the part's first segment; some write it twice.
    """
    is_shared = segments[0] == "base_model"
    for pattern, role in (grammar.shared if is_shared else grammar.parts).items():
        for place, names, numbers in _ways(segments, pattern.split(".")):
            if not is_shared or place == 1:
                filled, _, parameter = role.replace("*", "{}").format(*numbers).partition(":")
                module = [] if is_shared else segments[:place]
                return OwnName(filled, module, parameter or "weight", names[0] if names else "")
    return None


def _ways(segments: list[str], wanted: list[str]) -> Iterator[tuple[int, list[str], list[str]]]:
    """Yield each way in which a name may end in a part: (segments before it, adapter's name, numbers at its `*`)."""
    if wanted[0] not in segments:
        return
    for extra in range(3):
        place = len(segments) - len(wanted) - extra
        if place < 1:
            return
        found = segments[place:]
        names, tail = found[1 : 1 + extra], found[:1] + found[1 + extra :]
        numbers = _matched_numbers(tail, wanted)
        if numbers is not None and len(set(names)) <= 1 and not any(map(str.isdigit, names)):
            yield place, names, numbers


def _matched_numbers(segments: list[str], wanted: list[str]) -> list[str] | None:
    """Return the numbers at the `*` of a part's pattern; None where the segments are not that part."""
    pairs = list(zip(segments, wanted, strict=True))
    if any(segment != want and not (want == "*" and segment.isdigit()) for segment, want in pairs):
        return None
    return [segment for segment, want in pairs if want == "*"]
