"""Folders of small files that many tests start from: made once in a process, and written anew for each test."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

#: Bytes of file contents kept; the folders used longest ago go first.
KEPT_BYTES: Final = 64 * 2**20


class _Made(NamedTuple):
    """The contents of a folder by relative path, and torch's random state after it was made."""

    files: dict[Path, bytes]
    random_state: torch.Tensor

    @property
    def byte_count(self) -> int:
        return sum(map(len, self.files.values()))


class FolderCache:
    """What folders were filled with, by a description of how. Each test gets files of its own, to change at will."""

    def __init__(self, kept_bytes: int = KEPT_BYTES) -> None:
        self._kept_bytes = kept_bytes
        self._made: OrderedDict[Hashable, _Made] = OrderedDict()

    def fill(self, folder: Path, key: Hashable, make: Callable[[], object]) -> None:
        """Let `make` fill the folder, or write what it did for an equal key; torch's random state is the same after.

        Args:
            folder: an empty or missing folder.
            key: all that the contents depend on; None to make them in any case.
            make: writes files into the folder.
        """
        made = self._made.get(key)
        if made is None or key is None:
            make()
            self._keep(key, folder)
            return
        self._made.move_to_end(key)
        for path, content in made.files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        torch.set_rng_state(made.random_state)

    def _keep(self, key: Hashable, folder: Path) -> None:
        if key is None:
            return
        files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self._made[key] = _Made(files, torch.get_rng_state())
        while sum(made.byte_count for made in self._made.values()) > self._kept_bytes:
            self._made.popitem(last=False)


def described(*parts: Any) -> Hashable:
    """Return a key that says all of the parts; None where a part's text may not, as it names an address in memory."""
    text = repr(parts)
    return None if " at 0x" in text else text
