"""What a name may have meant that no base tensor answers to: suggestions for a refusal, never a match."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Final

_MAX_COMPARED: Final = 2000
_LONGEST_NAME: Final = 500
#: How many leading segments two classes of one model may differ in.
_MOST_SEGMENTS: Final = 5
#: Likeness of two names below which a suggestion would only mislead.
_CLOSE: Final = 0.85


_ELSEWHERE: Final = "shapes, layers or the tower's name do not fit there: is this the base it was trained on?"


def near_misses(target: str, base_names: Collection[str]) -> list[str]:
    """Return up to three base tensors that the adapter may have meant by `target`, likeliest first."""
    if len(target) > _LONGEST_NAME:
        return []
    found = list(dict.fromkeys(_by_segments(target, base_names)))
    if not found:
        same_leaf = [name for name in base_names if _leaf(name) == _leaf(target)]
        pool = (same_leaf or list(base_names))[:_MAX_COMPARED]
        from difflib import get_close_matches  # only refusals need it

        found = get_close_matches(target, pool, n=1, cutoff=_CLOSE)
    return [name for name in found if _without_numbers(name) != _without_numbers(target)][:3]


def suggest(target: str, base_names: Collection[str]) -> str:
    """Return a hint that names what differs between `target` and the nearest base tensor."""
    misses = near_misses(target, base_names)
    if not misses:
        return "is this the base the adapter was trained on?"
    nearest = misses[0]
    if nearest.endswith(f".{target}") or target.endswith(f".{nearest}"):
        return f"did you mean {nearest!r}? {_ELSEWHERE}"
    return f"did you mean {' or '.join(repr(name) for name in misses)}?"


def _by_segments(target: str, base_names: Collection[str]) -> Iterator[str]:
    """Yield base names that equal `target` but for whole leading segments on either side."""
    yield from (name for name in base_names if name.endswith(f".{target}"))
    parts = target.split(".")
    for start in range(1, min(len(parts) - 2, _MOST_SEGMENTS)):
        shorter = ".".join(parts[start:])
        if shorter in base_names:
            yield shorter
        yield from (name for name in base_names if name.endswith(f".{shorter}"))


def _without_numbers(name: str) -> str:
    """Return the name without its numbers: another layer's tensor is no misspelling of this one's."""
    return re.sub(r"\d+", "", name)


def _leaf(name: str) -> str:
    return ".".join(name.split(".")[-2:])
