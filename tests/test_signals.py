"""Signals wait while a merge runs, and end it only where it can end cleanly."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import rawmerge
from rawmerge.signals import HeldSignals

Paths = tuple[Path, Path]
pytestmark = pytest.mark.usefixtures("recorded")


class ToldError(Exception):
    pass


@pytest.fixture
def recorded() -> Iterator[list[int]]:
    """Let SIGINT be recorded, then raise; so that a test does not depend on how pytest was started."""
    received: list[int] = []

    def receive(number: int, _: FrameType | None) -> None:
        received.append(number)
        raise ToldError

    before = signal.signal(signal.SIGINT, receive)
    yield received
    signal.signal(signal.SIGINT, before)


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)  # this thread gets it now; of a kill, any thread may, and later


def test_a_signal_waits_for_the_place_that_lets_it_through(recorded: list[int]) -> None:
    with HeldSignals() as held:
        interrupt()
        assert recorded == []
        with pytest.raises(ToldError):
            held.let_through()
        assert recorded == [signal.SIGINT]
        held.let_through()
    assert recorded == [signal.SIGINT]


def test_a_signal_is_handled_when_the_block_is_left_with_its_note(recorded: list[int]) -> None:
    held = HeldSignals()
    held.note = "all was done"
    with pytest.raises(ToldError) as caught, held:
        interrupt()
    assert caught.value.__notes__ == ["all was done"]
    with pytest.raises(ToldError):
        interrupt()  # its handler is back
    assert len(recorded) == 2


def test_an_error_is_not_replaced_by_a_signal_that_was_held(recorded: list[int]) -> None:
    def fail() -> None:
        interrupt()
        raise ValueError("what went wrong")

    with pytest.raises(ValueError, match="what went wrong"), HeldSignals():
        fail()
    assert recorded == [signal.SIGINT]


def test_what_is_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with HeldSignals():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_an_outer_block_decides_when_an_inner_ones_signals_are_handled(recorded: list[int]) -> None:
    def nest() -> None:
        with HeldSignals():
            interrupt()
        assert recorded == []

    with pytest.raises(ToldError), HeldSignals():
        nest()
    assert recorded == [signal.SIGINT]


def test_other_threads_hold_nothing(recorded: list[int]) -> None:
    def hold() -> None:
        with HeldSignals():
            entered.append(signal.getsignal(signal.SIGINT))

    entered: list[object] = []
    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=hold)
    thread.start()
    thread.join()
    assert entered == [before]
    assert recorded == []


@pytest.mark.parametrize("consume", [False, True])
def test_a_signal_ends_a_merge_where_it_tells_its_progress(
    tiny: Paths, tmp_path: Path, recorded: list[int], *, consume: bool
) -> None:
    told: list[rawmerge.Progress] = []

    def progress(at: rawmerge.Progress) -> None:
        told.append(at)
        interrupt()
        assert recorded == []

    with pytest.raises(ToldError):
        rawmerge.merge_adapter(*tiny, tmp_path / "out", progress=progress, consume_base=consume)
    assert len(told) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
    rawmerge.merge_adapter(*tiny, tmp_path / "out")


SIGNALS = """
import os, signal, sys, threading, time
for name in sys.argv.pop(1).split(","):
    signal.signal(getattr(signal, name), signal.SIG_IGN)
from rawmerge import cli
def send():
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
        time.sleep(0.01)
run = cli.rawmerge.run_plan
def sent(plan, output, *, progress, **choices):
    at = iter([threading.Thread(target=send).start])
    return run(plan, output, progress=lambda _: [start() for start in at] and time.sleep(0.1), **choices)
cli.rawmerge.run_plan = sent
from rawmerge.__main__ import main
main()
"""


@pytest.mark.parametrize(("ignored", "code"), [("SIGUSR1", 129), ("SIGHUP", 143), ("SIGHUP,SIGTERM,SIGINT", 0)])
def test_several_signals_end_the_command_once(tiny: Paths, tmp_path: Path, ignored: str, code: int) -> None:
    command = [sys.executable, "-c", SIGNALS, ignored, "merge", *map(str, tiny), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "out").exists() == (code == 0)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("of the elements" if code == 0 else "rawmerge: interrupted"), done.stderr
    assert "Traceback" not in done.stderr


def test_a_signal_while_the_command_is_imported_is_told_without_a_traceback() -> None:
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Sends:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'click': signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Sends())\n"
        "from rawmerge.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "rawmerge: interrupted; nothing was published\n"


AFTER = """
import signal, sys
from rawmerge import cli, {module}
original = {module}.{name}
def sent(*arguments):
    signal.raise_signal(signal.SIGTERM)
    return original(*arguments)
{module}.{name} = sent
from rawmerge.__main__ import main
main()
"""


@pytest.mark.parametrize("consume", [(), ("--consume-base",)])
@pytest.mark.parametrize(("module", "name"), [("run", "count_steps"), ("summary_report", "summary_text")])
def test_a_signal_after_publishing_never_says_that_nothing_was(
    tiny: Paths, tmp_path: Path, module: str, name: str, consume: tuple[str, ...]
) -> None:
    code = AFTER.format(module=module, name=name)
    command = [sys.executable, "-c", code, "merge", *map(str, tiny), "--output", str(tmp_path / "out"), *consume]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 143, done.stderr
    assert (tmp_path / "out" / "rawmerge.json").exists()
    assert done.stderr.endswith("rawmerge: interrupted; the output was published before\n")


def test_all_handlers_are_put_back_although_one_raises_at_once(recorded: list[int], monkeypatch: Any) -> None:
    put, before = signal.signal, [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    held = HeldSignals()

    def raising(number: int, handler: Any) -> Any:
        put(number, handler)
        if number == signal.SIGINT:
            interrupt()  # its handler is back already, the others' are not

    held.note = "all was done"
    held.__enter__()
    monkeypatch.setattr(signal, "signal", raising)
    with pytest.raises(ToldError) as caught:
        held.__exit__(None, None, None)
    assert caught.value.__notes__ == ["all was done"]
    assert recorded == [signal.SIGINT]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before
