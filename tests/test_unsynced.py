"""A loss of power at any moment of a merge, whatever of the un-synced writes reached the disk."""

from __future__ import annotations

import errno
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias
from uuid import uuid4

import pytest

import rawmerge
from rawmerge.output import staging_directory
from tests.builders import folder_bytes, layered_merge, lora_pair, write_adapter
from tests.disk_record import DiskRecorder, Vault
from tests.disk_states import State, states

Files = dict[str, bytes]
LONG_AGO = 1_600_000_000


@dataclass
class Merge:
    """One command, what it starts from, and what it must give.

    Attributes:
        place: holds base, adapter and output, and is what loses its power.
        options: of the command.
        before: the output that stands there; None for none.
        golden: the output of a merge that is left alone.
        inputs: the files of base and adapter.
        exchanges: whether the system can exchange two names at once.
    """

    place: Path
    options: dict[str, Any]
    before: Files | None = None
    golden: Files = field(default_factory=dict)
    inputs: dict[str, Files] = field(default_factory=dict)
    exchanges: bool = True

    @property
    def output(self) -> Path:
        return self.place / "out"

    @property
    def consumes(self) -> bool:
        return bool(self.options.get("consume_base"))

    def run(self, output: Path | None = None, **options: Any) -> rawmerge.MergeSummary:
        """Merge; finding out what the kernel may do takes longer than all else."""
        options = {"threads": 1, **options}
        inputs = self.place / "base", self.place / "adapter"
        return rawmerge.merge_adapter(*inputs, output or self.output, without=["kernel"], **options)

    def found(self) -> Files | None:
        return folder_bytes(self.output) if self.output.exists() else None

    def prepare(self, beside: Path, before: dict[str, Any] | None = None, trains_on: bool = False) -> None:
        """Make the inputs and what is expected, and with options `before` the output that stands there.

        Args:
            beside: a folder for what is only compared.
            before: options of the merge that made that output.
            trains_on: whether its adapter was another one in one layer.
        """
        layered_merge(self.place)
        for path in self.place.rglob("*"):  # what is written just now could be written again without another time
            os.utime(path, (LONG_AGO, LONG_AGO))
        if before is not None:
            self.run(**before)
            self.before = self.found()
        if trains_on:
            pairs = [lora_pair(f"model.layers.{layer}.q_proj", 12, 8, seed=seed) for layer, seed in ((0, 7), (1, 1))]
            write_adapter(self.place / "adapter", pairs[0] | pairs[1])
        alone = {name: value for name, value in self.options.items() if name == "checksum"}
        self.run(beside / "golden", **alone)
        self.golden = folder_bytes(beside / "golden")
        time.sleep(0.06)  # longer than a tick of the system's clock
        self.inputs = {name: folder_bytes(self.place / name) for name in ("base", "adapter")}


@dataclass
class Tally:
    """What came of the states."""

    tried: int = 0
    published: int = 0
    faults: list[str] = field(default_factory=list)


def record(merge: Merge, vault: Vault, interruption: str = "") -> DiskRecorder:
    """Record a merge, with an interruption one that fails before and is run again, after a restart where it says so."""
    recorder = DiskRecorder(merge.place, vault)
    with recorder.recording(), pytest.MonkeyPatch.context() as patch:
        if interruption:
            with pytest.MonkeyPatch.context() as fault:
                let_last_sync_fail(fault)
                with pytest.raises(rawmerge.MergeError):
                    merge.run(**merge.options)
        if "restart" in interruption:
            restart(patch)
        summary = merge.run(**merge.options)
    assert merge.found() == merge.golden
    assert not interruption or summary.resumed == 2
    return recorder


def let_last_sync_fail(patch: pytest.MonkeyPatch) -> None:
    sync = os.fsync

    def fail(descriptor: int) -> None:
        if "00003-of" in os.readlink(f"/proc/self/fd/{descriptor}"):  # noqa: PTH115  # no path
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(descriptor)

    patch.setattr(os, "fsync", fail)


def replay(merge: Merge, recorder: DiskRecorder, every: int = 1, most_faults: int = 20, **choices: Any) -> Tally:
    """Put states on the disk, each with the same command after it, and judge what is found."""
    tally = Tally()
    for number, state in enumerate(states(recorder, **choices)):
        if len(tally.faults) >= most_faults:
            break
        if number % every == 0:
            state.put(merge.place, recorder.vault)
            tally.tried += 1
            tally.published += merge.found() == merge.golden
            with pytest.MonkeyPatch.context() as patch:
                recorder.vault.patch(patch)
                restart(patch)
                tally.faults += [f"{state.kind} after event {state.point}: {fault}" for fault in judge(merge, state)]
    return tally


def restart(patch: pytest.MonkeyPatch) -> None:
    """Let the system say that it was started anew."""
    read_text = Path.read_text

    def read(path: Path, *arguments: Any, **named: Any) -> str:
        return f"{uuid4()}\n" if path.name == "boot_id" else read_text(path, *arguments, **named)

    patch.setattr(Path, "read_text", read)


def judge(merge: Merge, state: State) -> list[str]:
    """Return what is wrong with a state, and with what the same command makes of it."""
    found = merge.found()
    whole = (merge.before, merge.golden) if merge.exchanges else (merge.before, merge.golden, None)
    faults = [] if found in whole else ["the output is neither absent nor complete"]
    faults += lost_shards(merge, state) if merge.consumes else changed_inputs(merge)
    refused = run_again(merge, found)
    is_done = found == merge.golden and (merge.consumes or not merge.options.get("overwrite"))
    if refused and not is_done:
        faults.append(f"the same command ends with {refused}")
    if merge.found() != merge.golden:
        faults.append("the same command gives another output")
    left = {path.name for path in merge.place.iterdir()} - {"adapter", "base", "cache", "out"}
    if left and not refused and not merge.consumes:  # who consumes may leave a hidden folder, once it is of no use
        faults.append(f"{left} is left")
    return faults if merge.consumes else [*faults, *changed_inputs(merge)]


def run_again(merge: Merge, found: Files | None) -> str:
    """Run the same command; return why it did not work."""
    try:
        merge.run(**merge.options)
    except rawmerge.RawmergeError as error:
        if found is None and "it has its name again" in str(error) and merge.found() in (merge.before, merge.golden):
            return run_again(merge, merge.found())  # where names cannot be exchanged, it says so first
        return str(error)
    return ""


def changed_inputs(merge: Merge) -> list[str]:
    now = {name: folder_bytes(merge.place / name) for name in merge.inputs}
    return [] if now == merge.inputs else ["an input has changed"]


def lost_shards(merge: Merge, state: State) -> list[str]:
    """Return the shards that are neither in the base as they were nor, merged, anywhere else."""
    held = {(Path(path).name, version.content) for path, (_, version) in state.files.items()}
    shards = {name: raw for name, raw in merge.inputs["base"].items() if name.endswith(".safetensors")}
    return [f"{name} is lost" for name, raw in shards.items() if not held & {(name, raw), (name, merge.golden[name])}]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that holds all that rawmerge writes, its memory of outputs too."""
    (tmp_path / "place").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "place/cache"))
    return tmp_path / "place"


#: The command's options, those of the merge before it, and whether the adapter was trained further in between.
Case: TypeAlias = tuple[dict[str, Any], dict[str, Any] | None, bool]
CASES: dict[str, Case] = {
    "new": ({}, None, False),
    "overwrite": ({"overwrite": True}, {"dtype": "float32"}, False),
    "consume": ({"consume_base": True}, None, False),
    "threads": ({"threads": 2, "checksum": True}, None, False),
    "link": ({"link": True}, None, False),
    "reuse": ({"overwrite": True}, {}, True),
    "renames": ({"overwrite": True}, {"dtype": "float32"}, False),
    "resumed": ({}, None, False),
    "resumed after a restart": ({}, None, False),
    "consume and overwrite": ({"consume_base": True, "overwrite": True}, {"dtype": "float32"}, False),
}


def prepared(place: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Merge:
    options, before, trains_on = CASES[name]
    merge = Merge(place, options, exchanges=name not in ("renames", "consume and overwrite"))
    if not merge.exchanges:
        monkeypatch.setattr(staging_directory, "exchange", lambda *_: False)
    merge.prepare(place.parent, before, trains_on)
    return merge


#: Where one sector of a line of the journal may be there without another: see the last test.
WHOLE = ("consume", "consume and overwrite")
QUICK = ("new", "overwrite", "consume")


def recorded(merge: Merge, case: str) -> DiskRecorder:
    return record(merge, Vault(merge.place.parent / "vault"), case if case.startswith("resumed") else "")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc/self/fd")
@pytest.mark.parametrize("case", [*QUICK, "resumed"])
def test_after_a_loss_of_power_the_output_is_whole_and_the_same_command_makes_it(
    place: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = prepared(place, case, monkeypatch)
    recorder = recorded(merge, case)
    tally = replay(merge, recorder, every=3, seeds=[1, 2], tears=case not in WHOLE)
    assert not tally.faults, "\n".join(tally.faults)
    assert tally.tried > 20
    assert 2 < tally.published < tally.tried - 10


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_whatever_part_of_the_unsynced_writes_is_there(place: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    merge = prepared(place, case, monkeypatch)
    recorder = recorded(merge, case)
    tally = replay(merge, recorder, seeds=range(20), singles=True, tears=case not in WHOLE)
    assert not tally.faults, "\n".join(tally.faults)
    assert tally.tried > 80
    assert 10 < tally.published < tally.tried - 20


@pytest.mark.parametrize("case", QUICK)
@pytest.mark.parametrize("of_folders", [False, True])
def test_a_merge_that_did_not_sync_would_be_found(
    place: Path, case: str, of_folders: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = prepared(place, case, monkeypatch)
    recorder = DiskRecorder(place, Vault(place.parent / "vault"))
    recorder.syncs = lambda is_folder: is_folder != of_folders
    with recorder.recording():
        merge.run(**merge.options)
    assert replay(merge, recorder, most_faults=1, seeds=range(4)).faults


@pytest.mark.slow
def test_of_a_line_of_the_journal_one_sector_is_there_and_another_not(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is no loss: what the line allows is not done before it is durable."""
    merge = prepared(place, "consume", monkeypatch)
    recorder = record(merge, Vault(place.parent / "vault"))
    tally = replay(merge, recorder, most_faults=1, seeds=range(20))
    assert not tally.faults, "\n".join(tally.faults)
