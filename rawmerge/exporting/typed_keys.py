"""The keys of a merge file: each asked for by its type; whatever is wrong of any is told at once."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

from rawmerge.errors import Problem, RefusedError, quote
from rawmerge.exporting.yaml_file import kind_of

#: What no message may show.
_SECRET: Final = ("token", "api_key", "secret", "webhook_url")


class TypedKeys:
    """Reads keys, and gathers what is wrong of them.

    Attributes:
        problems: what was found so far; `raise_problems` raises them together.
    """

    def __init__(self, table: Mapping[str, Any], shown: Mapping[str, str] | None = None) -> None:
        """Take a table of keys.

        Args:
            table: key to value; a value of None is a key that is not set.
            shown: key to its name in the file, where that is another.
        """
        self._table = {key: value for key, value in table.items() if value is not None}
        self._shown = shown or {}
        self.problems: list[Problem] = []

    @property
    def names(self) -> tuple[str, ...]:
        """The keys that are set."""
        return tuple(self._table)

    def shown(self, key: str) -> str:
        """Return what the file calls a key."""
        return self._shown.get(key, key)

    def value(self, key: str) -> Any:
        """Return a key's value as it stands, None where it is not set."""
        return self._table.get(key)

    def refuse(self, key: str, expected: str, hint: str = "") -> None:
        """Record that a key's value is another than expected."""
        self.problems.append(Problem(self.shown(key), expected, self._found(key), hint))

    def raise_problems(self) -> None:
        """Raise what was found.

        Raises:
            RefusedError: something was.
        """
        if self.problems:
            raise RefusedError(*self.problems)

    def text(self, key: str) -> str:
        """Return a text, an empty one where it is not set or wrong."""
        value = self._table.get(key, "")
        if isinstance(value, str) and "\0" not in value:
            return value
        self.refuse(key, "text", "put a name that looks like a number in quotes")
        return ""

    def required(self, key: str, expected: str, hint: str = "") -> str:
        """Return a text that must be there."""
        if not (text := self.text(key)) and (key not in self._table or self._table[key] == ""):
            self.refuse(key, expected, hint)
        return text

    def choice(self, key: str, choices: Collection[str], default: str, hint: str = "") -> str:
        """Return one of some texts."""
        value = self._table.get(key, default)
        if isinstance(value, str) and value in choices:
            return value
        self.refuse(key, f"one of {', '.join(choices)}", hint)
        return default

    def switch(self, key: str) -> bool:
        """Return a switch, off where it is not set."""
        value = self._table.get(key, False)
        if isinstance(value, bool):
            return value
        self.refuse(key, "true or false")
        return False

    def whole(self, key: str, expected: str, hint: str = "") -> int | None:
        """Return a positive whole number, None where it is not set."""
        value = self._table.get(key)
        if value is None or (type(value) is int and 0 < value < 10**9):
            return value
        self.refuse(key, expected, hint)
        return None

    def texts(self, key: str) -> tuple[str, ...]:
        """Return texts, of a real list or between commas."""
        value = self._table.get(key, "")
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list) or not all(isinstance(part, str) and "\0" not in part for part in parts):
            self.refuse(key, "names between commas, or a list of them")
            return ()
        stripped = tuple(part.strip() for part in parts)
        if len(stripped) > 1 and "" in stripped:
            self.refuse(key, "a name before and after each comma")
        return tuple(filter(None, stripped))

    def _found(self, key: str) -> str:
        if key not in self._table:
            return "none"
        value = self._table[key]
        if self._is_secret(key) or isinstance(value, dict | list):
            return kind_of(value)
        return f"{kind_of(value)}: {quote(str(value).lower() if isinstance(value, bool) else value)}"

    @staticmethod
    def _is_secret(key: str) -> bool:
        return key.endswith(_SECRET)
