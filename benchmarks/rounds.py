"""Alternating rounds of several commands on one checkpoint, every run from the same state."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from benchmarks import page_cache
from benchmarks.baseline_peers import scratch_of
from benchmarks.check_merge import Formula, WrongResultError, check_merge
from benchmarks.machine import describe_machine
from benchmarks.make_checkpoint import make_checkpoint
from benchmarks.measure import CommandError, Cost, measure
from benchmarks.recipe import Recipe
from benchmarks.results import Results
from benchmarks.rows import Places, Row

#: More than an interpreter with torch, transformers and PEFT takes.
FIXED_MEMORY_BYTES: Final = 1 << 30

STATES: Final = ("warm", "cold")


class NoSpaceError(Exception):
    """The output would not fit on the disk."""


#: What a benchmark ends with when its machine or its tools are at fault, not its code.
BENCH_ERRORS: Final = (CommandError, FileExistsError, NoSpaceError, WrongResultError)


@dataclass(frozen=True, slots=True)
class Bench:
    """One checkpoint to merge.

    Attributes:
        recipe: what base and adapter are made from.
        workdir: directory on the disk that is measured.
    """

    recipe: Recipe
    workdir: Path

    @property
    def places(self) -> Places:
        """Where inputs and outputs lie."""
        return Places(self.workdir / self.recipe.name, self.workdir / f"{self.recipe.name}-output")

    def make_inputs(self, copies_on_disk: int = 1) -> bool:
        """Make the checkpoint unless it is there, see that an output fits beside it; return whether it was made.

        Raises:
            NoSpaceError: the disk has no room for so many copies of the base.
        """
        is_new = make_checkpoint(self.places.checkpoint, self.recipe)
        self.clear()
        if shutil.disk_usage(self.workdir).free < (0.1 + copies_on_disk) * self.recipe.base_bytes:
            raise NoSpaceError("the disk has no room for an output as large as the base")
        return is_new

    def clear(self) -> None:
        """Delete the output of the run before."""
        shutil.rmtree(self.places.output, ignore_errors=True)
        shutil.rmtree(scratch_of(self.places.output), ignore_errors=True)

    def remove_inputs(self) -> None:
        """Delete the checkpoint."""
        shutil.rmtree(self.places.checkpoint)

    def prepare(self, row: Row, state: str) -> str:
        """Bring disk and memory into the state every run of `row` starts from; return the page cache's."""
        self.clear()
        page_cache.settle()
        set_state = page_cache.chill if state == "cold" else page_cache.warm
        reached = set_state([self.places.checkpoint])
        page_cache.touch_memory(row.copies_in_memory * self.recipe.base_bytes + FIXED_MEMORY_BYTES)
        return reached

    def rehearse(self, row: Row) -> None:
        """Run `row` once untimed, and compare what it made with the formula, if it is to be checked.

        The copy is rehearsed too: whoever uses a part of the disk first may pay for those after it.

        Raises:
            CommandError: the command failed.
            WrongResultError: what it made is wrong.
        """
        self.clear()
        measure(row.command, row.environment)
        if row.compute_dtype is not None:
            places = self.places
            formula = Formula(row.compute_dtype, row.weights, is_once=row.is_once, is_exact=not row.is_foreign)
            count = check_merge(places.checkpoint, places.output, self.recipe, formula)
            tell(f"{row.name}: {count} tensors checked, all right")

    def time_rounds(self, rows: Sequence[Row], round_count: int, state: str) -> Results:
        """Time every row once per round, so that a slow minute of the machine falls on all of them."""
        costs: dict[str, list[Cost]] = {row.name: [] for row in rows}
        reached = ""
        for number in range(1, round_count + 1):
            for row in rows:
                reached = self.prepare(row, state)
                costs[row.name].append(measure(row.command, row.environment))
                tell(f"{state}, round {number}: {row.name}: {costs[row.name][-1].wall_seconds:.2f} s")
        machine = describe_machine(self.places.checkpoint)
        return Results(recipe=self.recipe, page_cache=reached, machine=machine, costs=costs)


def tell(text: str) -> None:
    """Report progress, apart from the results on stdout."""
    print(text, file=sys.stderr, flush=True)


def rehearse_all(bench: Bench, rows: Sequence[Row]) -> dict[str, str]:
    """Rehearse every row; return the other projects' rows that failed, with the reason.

    Raises:
        CommandError: one of our own rows failed.
        WrongResultError: one of our own rows made something wrong.
    """
    left_out = {}
    for row in rows:
        try:
            bench.rehearse(row)
        except (CommandError, WrongResultError, OSError) as error:
            if not row.is_foreign:
                raise
            left_out[row.name] = str(error).strip().splitlines()[-1]
            tell(f"{row.name}: left out: {error}")
    return left_out


def run_bench(bench: Bench, rows: Sequence[Row], round_count: int, states: Sequence[str] = STATES[:1]) -> list[Results]:
    """Rehearse every row, then time them all in each state; leaves the inputs, not the outputs."""
    bench.make_inputs(max(row.copies_on_disk for row in rows))
    try:
        left_out = rehearse_all(bench, rows)
        timed = [row for row in rows if row.name not in left_out]
        return [replace(bench.time_rounds(timed, round_count, state), left_out=left_out) for state in states]
    finally:
        bench.clear()
