"""The commands that are timed against each other."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

REFERENCE_ROW: Final = "cp -r, sync"


@dataclass(frozen=True, slots=True)
class Row:
    """One way to make an output directory from a base and an adapter.

    Attributes:
        name: what the table calls it.
        command: makes the output, and does not return before it is on the disk.
        compute_dtype: the arithmetic that its output is checked against; None for a row that is not checked.
        environment: variables the command needs.
        copies_in_memory: how many times the base's size it fills: once the page cache with the output, and the
            model where one is loaded.
    """

    name: str
    command: Sequence[str]
    compute_dtype: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    copies_in_memory: int = 1


def copy_row(base: Path, output: Path) -> Row:
    """Return the reference: the least that writing a checkpoint of this size can cost with plain tools."""
    return Row(REFERENCE_ROW, _then_sync(["cp", "-r", str(base), str(output)]))


def rawmerge_row(base: Path, adapter: Path, output: Path, compute_dtype: str) -> Row:
    """Return rawmerge's row; it syncs its files itself before it publishes them."""
    merge = [sys.executable, "-m", "rawmerge", "merge", str(base), str(adapter), "--output", str(output)]
    if compute_dtype == "float32":
        return Row("rawmerge", merge, compute_dtype)
    return Row(f"rawmerge, {compute_dtype}", [*merge, "--compute-dtype", compute_dtype], compute_dtype)


def peft_row(base: Path, adapter: Path, output: Path) -> Row:
    """Return the row that goes through transformers and PEFT; its arithmetic is rawmerge's default."""
    merge = [sys.executable, "-m", "benchmarks.baseline_peft", str(base), str(adapter), str(output)]
    offline = {"HF_HUB_OFFLINE": "1"}
    return Row("PEFT load, merge, save, sync", _then_sync(merge), "float32", offline, copies_in_memory=2)


def choose_rows(checkpoint: Path, output: Path, *, with_float64: bool, with_peft: bool) -> Iterator[Row]:
    """Yield the rows of one benchmark, the reference first."""
    base, adapter = checkpoint / "base", checkpoint / "adapter"
    yield copy_row(base, output)
    yield rawmerge_row(base, adapter, output, "float32")
    if with_float64:
        yield rawmerge_row(base, adapter, output, "float64")
    if with_peft:
        yield peft_row(base, adapter, output)


def _then_sync(command: Sequence[str]) -> list[str]:
    return ["sh", "-c", f"{shlex.join(command)} && sync"]
