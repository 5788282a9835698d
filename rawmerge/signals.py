"""Signals that end a program: when they are handled, and for a command, as exceptions."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Final, TypeAlias

#: What is sent to end a program; some systems lack some.
_ENDING: Final = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_Handler: TypeAlias = Callable[[int, FrameType | None], object] | int


class Ended(KeyboardInterrupt):
    """A signal that ends the command, and the exit code that tells so."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number


def end_by_signals() -> None:
    """Let SIGTERM and SIGHUP end this process as Ctrl-C does: cleaned up, nothing published. A second changes nothing.

    What whoever started the process lets it ignore (`nohup`, a shell's background) stays ignored.
    """
    ended: list[int] = []

    def end(number: int, _: FrameType | None) -> None:
        ended.append(number)
        if len(ended) == 1:
            raise Ended(number)

    for number in _ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end)


class HeldSignals:
    """A block in which SIGINT, SIGTERM and SIGHUP wait, and are handled where the block lets them through.

    Python runs a handler between any two instructions of the main thread. One that raises there may do so inside the
    import system, whose lock then stays held (as of CPython 3.14): every thread that imports waits for ever, and who
    waits for the thread does too. Between two renames, it would leave half of a whole.

    In other threads than the main one nothing is held, for signals are not handled there.

    Attributes:
        note: told by what handlers raise when the block is left.
    """

    def __init__(self) -> None:
        self.note = ""
        self._received: list[int] = []
        self._is_over = False
        self._before: dict[int, _Handler] = {}

    def __enter__(self) -> HeldSignals:
        if threading.current_thread() is threading.main_thread():
            for number in _ENDING:
                handler = signal.getsignal(number)
                # None: a handler that Python did not set, and could not put back
                if handler is not None and handler is not signal.SIG_IGN:
                    self._before[number] = handler
                    signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over = True
        if error is not None:
            with suppress(BaseException):  # the block is ending anyway, and its error knows what became of it
                self._end()
            return
        try:
            self._end()
        except BaseException as raised:
            if self.note:
                raised.add_note(self.note)
            raise

    def let_through(self) -> None:
        """Handle now what has come: as it would have been handled before the block, which may raise."""
        while self._received:
            self._handle(self._received.pop(0))

    def _handle(self, number: int) -> None:
        handler = self._before[number]
        if callable(handler):
            handler(number, None)
        else:
            signal.signal(number, handler)
            signal.raise_signal(number)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self._is_over:  # its handler is not put back yet
            self._handle(number)
        else:
            self._received.append(number)

    def _end(self) -> None:
        try:
            self._put_back(list(self._before.items()))
        finally:
            self.let_through()

    def _put_back(self, handlers: list[tuple[int, _Handler]]) -> None:
        """Put back all handlers, although one that is back already may raise meanwhile."""
        if handlers:
            try:
                signal.signal(*handlers[0])
            finally:
                self._put_back(handlers[1:])
