"""What a model card states of licence, language and task, checked: only what the hub knows how to read is taken over.

Source: the hub's documentation, "Model Cards" (metadata) and "Licenses": `license` is an identifier; of `other` the
name is in `license_name` and the terms are in `license_link`, a file of the repo or a URL.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from rawmerge.formats.front_matter import Field, parse_front_matter

CARD_NAME: Final = "README.md"
OTHER: Final = "other"
_MAX_NAME_LENGTH: Final = 100

_IDENTIFIER: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,95}")
_LANGUAGE: Final = re.compile(r"[A-Za-z]{2,16}([-_][A-Za-z0-9]{1,16}){0,3}")
#: What may stand between a Markdown link's angle brackets.
_LINK: Final = re.compile(
    r"https?://[A-Za-z0-9:/?#\[\]@!$&'()*+,;=%._~-]{1,500}|(?!.*\.\.)[A-Za-z0-9_][A-Za-z0-9._/-]{0,200}"
)


@dataclass(frozen=True, slots=True)
class Licence:
    """A licence as cards state it.

    Attributes:
        identifier: the hub's, such as `apache-2.0`, or empty.
        name: what one is called that has none of its own (`other`), else empty.
        link: a URL, or a file beside the card, or empty.
    """

    identifier: str = ""
    name: str = ""
    link: str = ""

    @property
    def label(self) -> str:
        """What it is called."""
        return self.name if self.identifier == OTHER and self.name else self.identifier

    @property
    def is_told(self) -> bool:
        """Whether it says which terms hold: neither `unknown`, nor another one without a name."""
        return self.label not in {"", OTHER, "unknown"}


@dataclass(frozen=True, slots=True)
class CardMetadata:
    """What a card states that a merged model may inherit.

    Attributes:
        licence: its licence.
        languages: codes or names of languages.
        pipeline_tag: what the model is for, such as `text-generation`, or empty.
        library_name: what loads it, or empty.
        unread: fields that are there and of which nothing, or not all, could be taken over.
    """

    licence: Licence = Licence()
    languages: tuple[str, ...] = ()
    pipeline_tag: str = ""
    library_name: str = ""
    unread: tuple[str, ...] = ()


def parse_card_metadata(raw: bytes) -> CardMetadata:
    """Return what a card states; nothing where it has no front matter.

    Raises:
        ValueError: its front matter cannot be read.
    """
    return _Fields(parse_front_matter(raw)).metadata()


class _Fields:
    """The fields of a front matter, and which of them could not be taken over."""

    def __init__(self, fields: Mapping[str, Field]) -> None:
        self._fields = fields
        self._unread: list[str] = []

    def metadata(self) -> CardMetadata:
        return CardMetadata(
            licence=Licence(
                self._identifier("license"), self._one("license_name", _is_name), self._one("license_link", _is_link)
            ),
            languages=self._all("language"),
            pipeline_tag=self._identifier("pipeline_tag"),
            library_name=self._identifier("library_name"),
            unread=tuple(self._unread),
        )

    def _identifier(self, name: str) -> str:
        return self._one(name, lambda value: bool(_IDENTIFIER.fullmatch(value)))

    def _one(self, name: str, is_fit: Callable[[str], bool]) -> str:
        values = self._values(name)
        if len(values) == 1 and is_fit(values[0]):
            return values[0]
        self._unread += [name] * bool(values)
        return ""

    def _all(self, name: str) -> tuple[str, ...]:
        fit = [value for value in self._values(name) if _LANGUAGE.fullmatch(value)]
        self._unread += [name] * (len(fit) < len(self._values(name)))
        return tuple(dict.fromkeys(fit))

    def _values(self, name: str) -> tuple[str, ...]:
        value = self._fields.get(name, ())
        return (value,) if isinstance(value, str) else value


def _is_name(text: str) -> bool:
    return text.isprintable() and len(text) <= _MAX_NAME_LENGTH


def _is_link(text: str) -> bool:
    return bool(_LINK.fullmatch(text))
