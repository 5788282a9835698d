"""Names as transformers' model classes use them, and how the tensors on disk lie in those classes' parameters.

A checkpoint bears the names that its author's code used; an adapter bears those of the transformers version that
trained it. transformers renames the former when it loads them, by tables that `scripts/make_families.py` copied into
families.json. The same tables also know the names that older versions used in memory, because those versions saved
them to disk. So both sides are renamed forward, into the names of the recorded version, and compared there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, TypeAlias

#: Renames that feed each other end after two passes; more would be a circle.
_MOST_PASSES: Final = 4
#: No model has longer names, and some patterns take time that grows with the square of the length.
_LONGEST_NAME: Final = 1000
#: Classes that stand inside another model. A head such as ViTForImageClassification never does.
_INNER_CLASS: Final = re.compile(r"(Model|Backbone)$")
_COMPOSITE_CLASS: Final = "ForConditionalGeneration"


@dataclass(frozen=True, slots=True)
class FusedPlace:
    """Where one expert's disk tensor lies in the parameter that holds all experts of a layer.

    The parameter has shape (experts, parts * rows, columns); the disk tensor (rows, columns) is
    `parameter[expert].chunk(parts)[part]`.
    """

    parameter: str
    expert: int
    part: int
    parts: int


@dataclass(frozen=True, slots=True)
class _Rename:
    pattern: re.Pattern[str]
    replacement: str
    #: One of these is set aside before the pattern is tried, as transformers does for the inner bare model.
    prefixes: tuple[str, ...] = ()

    def __call__(self, name: str) -> str:
        prefix = next((prefix for prefix in self.prefixes if name.startswith(prefix)), "")
        text = name.removeprefix(prefix)
        match = self.pattern.search(text)
        if match is None:
            return name
        new = self.replacement.replace(r"\1", match[1]) if r"\1" in self.replacement else self.replacement
        return name if _stands_already(text, match, new) else prefix + text[: match.start()] + new + text[match.end() :]


@dataclass(frozen=True, slots=True)
class _Layout:
    """Disk tensors that become one parameter (`fuse`, `concat`), or a disk tensor that becomes several (`chunk`)."""

    kind: str
    sources: tuple[re.Pattern[str], ...]
    targets: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Refusal:
    """What transformers does to disk tensors and rawmerge does not follow."""

    operations: str
    sources: tuple[re.Pattern[str], ...]


_Row: TypeAlias = list[Any]
_Rule: TypeAlias = _Rename | _Layout | _Refusal


class Family:
    """The renames and layouts that hold for one checkpoint. Make one with `family_of`."""

    def __init__(self, rules: Sequence[_Rule], *, has_transposed_experts: bool = False) -> None:
        self.has_transposed_experts = has_transposed_experts
        self._rules = tuple(rules)
        self._renames = tuple(rule for rule in rules if isinstance(rule, _Rename))
        self._known: dict[str, str] = {}

    def canonical(self, name: str) -> str:
        """Return the tensor name in memory; of an expert's own tensor, the disk name with all renames done.

        Args:
            name: full tensor name, from disk or from memory, of whatever transformers version.
        """
        found = self._known.get(name)
        if found is None:
            found = self._known[name] = self._settled(name)
        return found

    def fused_place(self, canonical_name: str) -> FusedPlace | None:
        """Return where an expert's own tensor lies in memory, or None for any other tensor."""
        for layout, part, match in self._layouts("fuse", canonical_name):
            return FusedPlace(_put(layout.targets[0], match), int(match[1]), part, len(layout.sources))
        return None

    def chunks(self, canonical_name: str) -> tuple[str, ...]:
        """Return the names in memory of the equal row chunks of a disk tensor, or () if it stays whole."""
        for layout, _, match in self._layouts("chunk", canonical_name):
            return tuple(_put(target, match) for target in layout.targets)
        return ()

    def stacked(self, canonical_name: str) -> tuple[str, int, int] | None:
        """Return (name in memory, place, count) of a disk tensor that is stacked with others along dimension 0."""
        for layout, place, match in self._layouts("concat", canonical_name):
            return _put(layout.targets[0], match), place, len(layout.sources)
        return None

    def unsupported(self, name: str) -> str:
        """Return what transformers does to this disk tensor that rawmerge cannot follow, or "".

        Args:
            name: best the name as it is on disk: other submodels' renames may hide what a canonical name was.
        """
        for rule in self._rules:
            if isinstance(rule, _Rename):
                name = rule(name)
            elif isinstance(rule, _Refusal) and any(source.search(name) for source in rule.sources):
                return f"transformers changes this tensor by {rule.operations}"
        return ""

    def _layouts(self, kind: str, name: str) -> Iterator[tuple[_Layout, int, re.Match[str]]]:
        """Yield the layouts whose nth source is this tensor; transformers follows the first."""
        for layout in self._rules:
            if isinstance(layout, _Layout) and layout.kind == kind:
                found = ((place, source.search(name)) for place, source in enumerate(layout.sources))
                yield from ((layout, place, match) for place, match in found if match)

    def _settled(self, name: str) -> str:
        for _ in range(_MOST_PASSES if len(name) < _LONGEST_NAME else 0):
            before = name
            for rename in self._renames:
                name = rename(name)
            if name == before:
                break
        return name


def family_of(identifiers: Sequence[str], nested: Sequence[str] = ()) -> Family:
    """Return the rules for a checkpoint.

    Args:
        identifiers: class names (the config's `architectures`, the adapter's `base_model_class`), then the root
            config's model type. The first that has rules gives those of the whole model.
        nested: model types of nested configs. Their auto classes may be among them; they are known here anyway.
    """
    table = _table().rules
    root = next((key for key in identifiers if key in table), _only_head(identifiers))
    prefixes = sorted(base_prefixes(identifiers)) or ["model"]
    rules = [_whole(row) for row in table.get(root or "", ())]
    rules += [_under(prefixes, row) for key in _bare_classes(identifiers, root) for row in table[key]]
    inner = [row for key in _inner_keys(identifiers, nested) for row in table[key]]
    two_towers = len({row[1] for row in inner if row[0] == "remove"}) > 1
    rules += [rule for row in inner if (rule := _inner(row, prefixes, two_towers=two_towers))]
    rules += map(_whole, table["legacy"])
    transposed = _table().transposed_experts.intersection((*identifiers, *nested))
    return Family(rules, has_transposed_experts=bool(transposed))


def base_prefixes(model_types: Iterable[str]) -> frozenset[str]:
    """Return the attributes under which the classes of these types hold their bare model: `model`, `bert`, ..."""
    known = _table().base_prefixes
    return frozenset(prefix for model_type in model_types for prefix in known.get(model_type, ()))


def auto_classes(model_type: str) -> tuple[str, ...]:
    """Return the classes of a model type that have rules of their own, from transformers' auto classes."""
    return _table().auto_classes.get(model_type, ())


def transformers_version() -> str:
    """Return the version whose names are the canonical ones."""
    return _table().version


@dataclass(frozen=True, slots=True)
class _Table:
    """families.json: rules by key, and what only transformers' source says."""

    version: str
    rules: dict[str, list[_Row]]
    auto_classes: dict[str, tuple[str, ...]]
    base_prefixes: dict[str, tuple[str, ...]]
    transposed_experts: frozenset[str]


@lru_cache(maxsize=1)
def _table() -> _Table:
    data = json.loads(Path(__file__).with_name("families.json").read_bytes())
    return _Table(
        data["transformers"],
        {key: family["rules"] for family in data["families"] for key in family["keys"]},
        {key: tuple(names) for key, names in data["auto_classes"].items()},
        {key: tuple(names) for key, names in data["base_prefixes"].items()},
        frozenset(data["transposed_experts"]),
    )


def _only_head(identifiers: Sequence[str]) -> str | None:
    """Return the one head that has rules, where only model types are known; a bare class is looked up elsewhere."""
    heads = [name for key in identifiers for name in auto_classes(key) if not _INNER_CLASS.search(name)]
    return heads[0] if len(heads) == 1 and all(key.islower() for key in identifiers) else None


def _bare_classes(identifiers: Sequence[str], root: str | None) -> list[str]:
    """Return the bare classes inside the root class: LlavaModel in LlavaForConditionalGeneration."""
    names = [name for identifier in identifiers for name in auto_classes(identifier) if name.endswith("Model")]
    return [name for name in dict.fromkeys(names) if name != root]


def _inner_keys(identifiers: Sequence[str], nested: Sequence[str]) -> list[str]:
    """Return what the models below the root are known by, as far as it has rules."""
    keys: list[str] = []
    derived = {name for model_type in (*identifiers, *nested) for name in auto_classes(model_type)}
    for model_type in nested:
        if model_type not in derived.union(identifiers):  # the choice among a type's classes is made here
            names = auto_classes(model_type)
            whole = [name for name in names if name.endswith(_COMPOSITE_CLASS)]
            keys += [*(whole or filter(_INNER_CLASS.search, names)), model_type]
    return [key for key in dict.fromkeys(keys) if key in _table().rules]


def _whole(row: _Row) -> _Rule:
    """Return a rule for the whole model."""
    return _MAKERS[row[0]](*row[1:])


def _under(prefixes: Sequence[str], row: _Row) -> _Rule:
    """Return a rule for the bare model below one of the prefixes, or at the root where the checkpoint has none."""
    rule = _whole(row)
    return replace(rule, prefixes=tuple(f"{prefix}." for prefix in prefixes)) if isinstance(rule, _Rename) else rule


def _inner(row: _Row, prefixes: Sequence[str], *, two_towers: bool) -> _Rule | None:
    """Return a rule for a model at some path below the root, which transformers knows and a checkpoint does not tell.

    A start of name becomes any start of segment but those at which no inner model can start: the root's own, and the
    bare model's. Two towers side by side, as in CLIP, would become one if their own names were dropped; there only a
    name that stands twice loses one.
    """
    rule = _whole(row)
    if not isinstance(rule, _Rename) or not rule.pattern.pattern.startswith("^"):
        return rule
    rest = rule.pattern.pattern[1:]
    if (row[0] == "add" and not row[2]) or re.match(rest, ""):
        return None  # would rename every tensor of every model
    start = r"(?<=\.)" + "".join(rf"(?<!^{re.escape(prefix)}\.)" for prefix in prefixes)
    if row[0] == "remove" and two_towers:
        start = rf"(?<=\b{re.escape(row[1])}\.)"
    return replace(rule, pattern=re.compile(start + rest))


def _remove(prefix: str, within: str) -> _Rename:
    outer = f"{within}." if within else ""
    return _Rename(re.compile(rf"^{re.escape(f'{outer}{prefix}.')}(.+)"), rf"{outer}\1")


def _add(prefix: str, within: str) -> _Rename:
    outer = f"{within}." if within else ""
    return _Rename(re.compile(rf"^{re.escape(outer)}(?!{re.escape(prefix)}\.)(.+)"), rf"{outer}{prefix}.\1")


def _fuse(sources: Sequence[str], target: str) -> _Layout:
    patterns = (re.escape(source).replace(r"\*", r"([0-9]{1,9})") + r"(?!\w)" for source in sources)
    return _Layout("fuse", tuple(map(re.compile, patterns)), (target,))


#: By the first field of a row of families.json; the others are the arguments.
_MAKERS: Final[dict[str, Callable[..., _Rule]]] = {
    "rename": lambda pattern, replacement: _Rename(re.compile(pattern), replacement),
    "remove": _remove,
    "add": _add,
    "fuse": _fuse,
    "chunk": lambda sources, targets: _Layout("chunk", tuple(map(re.compile, sources)), tuple(targets)),
    "concat": lambda sources, target: _Layout("concat", tuple(map(re.compile, sources)), (target,)),
    "same": lambda name: _Layout("same", (), (name,)),
    "unsupported": lambda operations, sources, _: _Refusal(operations, tuple(map(re.compile, sources))),
}


def _put(target: str, match: re.Match[str]) -> str:
    """Return the name with `target` in place of the match."""
    return match.string[: match.start()] + target + match.string[match.end() :]


def _stands_already(text: str, match: re.Match[str], new: str) -> bool:
    """Tell whether the rule has been applied: `norm.` to `mlp.norm.` must not make `mlp.mlp.norm.` of it."""
    place = new.find(match[0])
    before, after = new[: max(place, 0)], new[place + len(match[0]) :]
    return place >= 0 and text[: match.start()].endswith(before) and text[match.end() :].startswith(after)
