"""The commands that are timed against each other."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from benchmarks.baseline_peers import PEERS

REFERENCE_ROW: Final = "cp -r, sync"
MERGE_ROW: Final = "rawmerge"
OFFLINE: Final = {"HF_HUB_OFFLINE": "1"}
_SEVERAL: Final = (1.0, 0.5, -0.25)


@dataclass(frozen=True, slots=True)
class Row:
    """One way to make an output directory from a base and an adapter.

    Attributes:
        name: what the table calls it.
        command: makes the output, and does not return before it is on the disk.
        compute_dtype: the arithmetic that its output is checked against; None for a row that is not checked.
        weights: of the adapter, which is merged once with each; is_once: all in one sum, rounded once.
        is_foreign: another project's tool: its values may be off by one rounding, and where it fails, the benchmark
            goes on without it.
        environment: variables the command needs.
        copies_in_memory: how many times the base's size it fills: once the page cache with the output, and the
            model where one is loaded.
        copies_on_disk: how many times the base's size it writes.
    """

    name: str
    command: Sequence[str]
    compute_dtype: str | None = None
    weights: tuple[float, ...] = (1.0,)
    is_once: bool = False
    is_foreign: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    copies_in_memory: int = 1
    copies_on_disk: int = 1


@dataclass(frozen=True, slots=True)
class Places:
    """Where the rows of one benchmark read and write.

    Attributes:
        checkpoint: directory with base/ and adapter/.
        output: directory that every run makes anew.
    """

    checkpoint: Path
    output: Path

    @property
    def arguments(self) -> list[str]:
        """Base, adapter and output, as scripts take them."""
        return [str(self.checkpoint / "base"), str(self.checkpoint / "adapter"), str(self.output)]

    def copy_row(self) -> Row:
        """Return the reference: the least that writing a checkpoint of this size can cost with plain tools."""
        base, _, output = self.arguments
        return Row(REFERENCE_ROW, _then_sync(["cp", "-r", base, output]))

    def rawmerge_row(self, name: str = MERGE_ROW, *options: str, compute_dtype: str = "float32") -> Row:
        """Return rawmerge's row; it syncs its files itself before it publishes them."""
        base, adapter, output = self.arguments
        merge = [sys.executable, "-m", "rawmerge", "merge", base, adapter, "--output", output]
        return Row(name, [*merge, "--compute-dtype", compute_dtype, *options], compute_dtype)

    def several_row(self, order: str) -> Row:
        """Return the row that merges the adapter three times, with other weights, in one pass over the base."""
        row = self.rawmerge_row(f"rawmerge, three adapters, {order}", "--order", order)
        _, adapter, _ = self.arguments
        others = [f"{adapter}:{weight}" for weight in _SEVERAL[1:]]
        place = list(row.command).index(adapter) + 1
        command = [*row.command[:place], *others, *row.command[place:]]
        return replace(row, command=command, weights=_SEVERAL, is_once=order == "once")

    def shards_row(self) -> Row:
        """Return the row that loads and saves each shard whole."""
        return Row("shard by shard, sync", self._script("baseline_shards"), "float32")

    def peft_row(self) -> Row:
        """Return the row that goes through transformers and PEFT; its arithmetic is rawmerge's default."""
        command = self._script("baseline_peft")
        return Row("PEFT load, merge, save, sync", command, "float32", environment=OFFLINE, copies_in_memory=2)

    def peer_rows(self, peers: Collection[str] = tuple(PEERS)) -> Iterator[Row]:
        """Yield a row for each of `peers` that can be imported."""
        for peer in peers:
            if find_spec(peer):
                yield Row(
                    f"{peer}, sync",
                    self._script("baseline_peers", peer),
                    "float32",
                    is_foreign=True,
                    environment=OFFLINE,
                    copies_in_memory=2,
                    copies_on_disk=2,
                )

    def _script(self, module: str, *arguments: str) -> list[str]:
        return _then_sync([sys.executable, "-m", f"benchmarks.{module}", *arguments, *self.arguments])


def choose_rows(
    places: Places, *, with_float64: bool, with_peft: bool, with_peers: bool, with_several: bool = False
) -> Iterator[Row]:
    """Yield the rows of one benchmark, the reference first; the peers are those that are installed."""
    yield places.copy_row()
    yield places.rawmerge_row()
    if with_float64:
        yield places.rawmerge_row("rawmerge, float64", compute_dtype="float64")
    if with_several:
        yield places.several_row("serial")
        yield places.several_row("once")
    if with_peers:
        yield places.shards_row()
    if with_peft or (with_peers and find_spec("peft") and find_spec("transformers")):
        yield places.peft_row()
    if with_peers:
        yield from places.peer_rows()


def _then_sync(command: Sequence[str]) -> list[str]:
    return ["sh", "-c", f"{shlex.join(command)} && sync"]
