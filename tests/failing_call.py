"""One call of the system that fails, as the system would let it fail, and what is synced after it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

#: Calls that know a path; all others know a descriptor only.
BY_PATH = ("mkdir", "rename")
SYNCS = ("fsync", "fdatasync")


def path_of(descriptor: int) -> Path:
    return Path(os.readlink(f"/proc/self/fd/{descriptor}"))  # noqa: PTH115  # no path


@dataclass
class FailingCall:
    """Lets one call of one kind fail below a folder, as the system would; and watches what is synced after it.

    Attributes:
        name: of `os`.
        error: its number.
        left: how many calls come before it works no more; negative once it has failed.
        path: the file or folder of the call that failed.
        held: a descriptor of what could not be synced, so that no other file gets its inode.
        synced_again: files that were synced after a sync of them had failed.
    """

    name: str
    error: int
    left: int
    root: Path
    path: Path | None = None
    held: int = -1
    synced_again: list[Path] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def patch(self, patch: pytest.MonkeyPatch) -> None:
        for name in {self.name, *SYNCS}:
            patch.setattr(os, name, self._wrapped(name, getattr(os, name)))

    def close(self) -> None:
        if self.held >= 0:
            os.close(self.held)

    def _wrapped(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(subject: Any, *arguments: Any, **named: Any) -> Any:
            path = Path(subject) if name in BY_PATH else path_of(subject)
            if name in SYNCS and self.held >= 0 and os.path.sameopenfile(self.held, subject):
                self.synced_again.append(path)
            if name == self.name and path.is_relative_to(self.root) and self._fails(path):
                self.held = os.open(path, os.O_RDONLY) if name in SYNCS else -1
                shown = (str(subject),) if name in BY_PATH else ()
                raise OSError(self.error, os.strerror(self.error), *shown)
            return call(subject, *arguments, **named)

        return run

    def _fails(self, path: Path) -> bool:
        if self.name == "mkdir" and path.exists():  # which the system says first, and nobody minds
            return False
        with self._lock:
            self.left -= 1
            if self.left == 0:
                self.path = path
        return self.left == 0
