"""What no input may do to the process that reads it: take long, take much memory, or touch what is not its own."""

from __future__ import annotations

import os
import resource
import signal
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Final

#: Processor seconds for one input: wall-clock time says little on a machine that others use too.
SECONDS: Final = 4.0
#: Address space that an input may take: so many bytes, and so many times its own size.
BYTES: Final = 128 * 2**20
TIMES: Final = 100
#: Largest file that may be written, and so an output's.
FILE_BYTES: Final = 64 * 2**20
_PAGE: Final = resource.getpagesize()
#: Audit events, as Python's documentation lists them, of which the first argument is what is written.
_WRITES: Final = frozenset(
    f"os.{name}" for name in ("mkdir", "rename", "remove", "rmdir", "symlink", "link", "truncate", "chmod", "chown")
)
_NEVER: Final = frozenset(
    (*(f"os.{name}" for name in ("system", "exec", "fork", "posix_spawn", "spawn")), "subprocess.Popen")
).union(["socket.connect", "socket.getaddrinfo", "pickle.find_class"])


class Forbidden(BaseException):
    """An input made rawmerge do what none may; no handler in rawmerge catches it."""


class Limits:
    """The limits of one process; the audit hook can't be taken away again, but is idle outside of `hold`."""

    def __init__(self, folder: Path) -> None:
        """Allow writing in `folder` only, and reading there and where Python and rawmerge are."""
        self._folder = f"{folder.resolve()}{os.sep}"
        own = (str(Path(__file__).parents[2]), sysconfig.get_path("stdlib"), sys.prefix, "/proc/", "/sys/", "/dev/null")
        self._readable = (self._folder, *own)
        self._is_on = False
        self._broken = ""
        sys.addaudithook(self._look)
        signal.signal(signal.SIGPROF, _too_long)

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Hold an input of `size` bytes to the limits in the block.

        Raises:
            Forbidden: it broke one. MemoryError: it asked for too much memory.
        """
        taken = int(Path("/proc/self/statm").read_bytes().split()[0]) * _PAGE
        resource.setrlimit(resource.RLIMIT_AS, (taken + BYTES + TIMES * size, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, resource.RLIM_INFINITY))
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        self._is_on, self._broken = True, ""
        try:
            yield
        finally:
            self._is_on = False
            signal.setitimer(signal.ITIMER_PROF, 0)
            for limit in (resource.RLIMIT_AS, resource.RLIMIT_FSIZE):
                resource.setrlimit(limit, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        if self._broken:
            raise Forbidden(self._broken)

    def _look(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._is_on or self._broken:
            return
        if event in _NEVER:
            self._broken = event
        elif event == "open":
            self._look_at_open(*arguments)
        elif event in _WRITES and not self._is_within(arguments[0], (self._folder,)):
            self._broken = f"{event} {arguments[0]!r}"

    def _look_at_open(self, path: object, mode: str | None, flags: int) -> None:
        writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
        if not self._is_within(path, (self._folder,) if writes else self._readable):
            self._broken = f"open {path!r} with {mode} and {flags:#x}"

    def _is_within(self, path: object, folders: tuple[str, ...]) -> bool:
        if isinstance(path, int):  # a descriptor that is open already
            return True
        try:
            text = os.path.normpath(os.path.join(os.getcwd(), os.fsdecode(path)))  # type: ignore[arg-type]  # noqa: PTH109, PTH118
        except (TypeError, ValueError):
            return False
        return f"{text}{os.sep}".startswith(folders)


def _too_long(_signal: int, frame: FrameType | None) -> None:
    at = f" in {frame.f_code.co_qualname}" if frame else ""
    raise Forbidden(f"more than {SECONDS} processor seconds{at}")
