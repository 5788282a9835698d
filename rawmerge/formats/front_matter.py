"""The YAML front matter of a model card: what a stranger's card states, read with care, and the text of our own.

Of a card only its top level is read, texts and lists of texts, from the parser's events: no object is made by a tag, no
alias is followed, and nesting has an end. Every value is a text, so that the language `no` stays Norwegian.

Source: huggingface_hub 2.4 `repocard.py` (`REGEX_YAML_BLOCK`, the hub server's own); YAML 1.1, which PyYAML reads, and
YAML 1.2 section 10.2: JSON is YAML.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias

#: A card's model index, results of a hundred benchmarks, takes some 200 KB.
MAX_FRONT_MATTER_BYTES: Final = 2 * 2**20
#: The most levels of nesting that are followed, and items of a list that are kept.
_MAX_DEPTH: Final = 32
_MAX_ITEMS: Final = 1000

Field: TypeAlias = str | tuple[str, ...]

_BLOCK: Final = re.compile(r"\s*---(?:\r\n|\r|\n)(?P<yaml>[\S\s]*?)(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|$)")
#: What YAML reads as the very text without quotes, whatever the version.
_PLAIN: Final = re.compile(r"[A-Za-z][A-Za-z0-9./_-]*")
_WORDS: Final = frozenset(["y", "n", "yes", "no", "on", "off", "true", "false", "null"])
_NULLS: Final = frozenset({"", "~", "null", "Null", "NULL"})


def parse_front_matter(raw: bytes) -> dict[str, Field]:
    """Return the fields of a card's front matter that are texts or lists of texts; none where it has no front matter.

    A field without a value, of another kind, or in a YAML alias counts as absent. Of a name that is there twice the
    last counts, as on the hub.

    Raises:
        ValueError: it is no UTF-8, no YAML, too large, or nested too deeply.
    """
    match = _BLOCK.match(raw.decode("utf-8-sig"))
    if match is None:
        return {}
    if len(match["yaml"].encode()) > MAX_FRONT_MATTER_BYTES:
        raise ValueError(f"more than {MAX_FRONT_MATTER_BYTES} bytes of YAML")
    return dict(_top_level(match["yaml"]))


def format_front_matter(fields: Mapping[str, Field | Sequence[str]]) -> str:
    """Return front matter with its two lines of dashes, fields in their order, those that are empty left out.

    Args:
        fields: names, which are plain words, to texts or lists of texts; any text of printable characters.
    """
    lines = ["---"]
    for name, value in fields.items():
        if isinstance(value, str):
            lines += [f"{name}: {_scalar(value)}"] * bool(value)
        elif value:
            lines += [f"{name}:", *(f"- {_scalar(item)}" for item in value)]
    return "\n".join([*lines, "---", ""])


def _scalar(text: str) -> str:
    # quoted as JSON, which YAML reads; only what cannot be printed would be read otherwise
    is_plain = _PLAIN.fullmatch(text) and text.lower() not in _WORDS
    return text if is_plain else json.dumps(text, ensure_ascii=False)


class _Collection(list["str | _Collection | None"]):
    """A mapping's keys and values in turn, or a sequence's items; None for what is no text."""

    def __init__(self, *, is_mapping: bool) -> None:
        super().__init__()
        self.is_mapping = is_mapping


def _top_level(text: str) -> Iterator[tuple[str, Field]]:
    """Yield the fields of a YAML document's mapping."""
    root = _document(text)
    pairs = zip(root[::2], root[1::2], strict=True) if root is not None and root.is_mapping else ()
    for name, value in pairs:
        if isinstance(name, str) and isinstance(value, str):
            yield name, value
        elif isinstance(name, str) and isinstance(value, _Collection) and not value.is_mapping:
            yield name, tuple(item for item in value[:_MAX_ITEMS] if isinstance(item, str))


def _document(text: str) -> _Collection | None:
    """Return the first YAML document's mapping or sequence, None where it is neither.

    Raises:
        ValueError: it is no YAML, or nested too deeply.
    """
    import yaml  # a fiftieth of a second, which a merge without cards is spared

    holder = _Collection(is_mapping=False)
    stack = [holder]
    try:
        for event in yaml.parse(text, Loader=getattr(yaml, "CBaseLoader", yaml.BaseLoader)):
            if isinstance(event, yaml.DocumentEndEvent):
                break
            if isinstance(event, yaml.CollectionStartEvent):
                opened = _Collection(is_mapping=isinstance(event, yaml.MappingStartEvent))
                stack[-1].append(opened)
                stack.append(opened)
            elif isinstance(event, yaml.CollectionEndEvent):
                stack.pop()
            elif isinstance(event, yaml.NodeEvent):
                stack[-1].append(_text(event))
            if len(stack) > _MAX_DEPTH:
                raise ValueError(f"more than {_MAX_DEPTH} levels of nesting")
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "no YAML"
        raise ValueError(str(problem)) from error
    return next((item for item in holder if isinstance(item, _Collection)), None)


def _text(event: Any) -> str | None:
    """Return a scalar's text, None for an alias and for nothing."""
    value = getattr(event, "value", None)
    is_null = value is None or (value in _NULLS and not event.style)
    return None if is_null else str(value)
