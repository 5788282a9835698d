"""Times a merge beside `cp -r` and PEFT, in alternating rounds: `python -m benchmarks.bench_merge`."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks import page_cache
from benchmarks.check_merge import WrongResultError, check_merge
from benchmarks.machine import describe_machine
from benchmarks.make_checkpoint import Recipe, make_checkpoint
from benchmarks.measure import CommandError, Cost, measure
from benchmarks.results import Results
from benchmarks.rows import Row, choose_rows
from benchmarks.shapes import SHAPES, CheckpointShape

#: More than an interpreter with torch, transformers and PEFT takes.
FIXED_MEMORY_BYTES: Final = 1 << 30


class NoSpaceError(Exception):
    """The output would not fit on the disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """One checkpoint to merge, and the state every run starts from.

    Attributes:
        shape: of the base.
        checkpoint: directory with base/ and adapter/.
        output: directory that every run makes anew.
        is_cold: whether runs start without the checkpoint in the page cache.
    """

    shape: CheckpointShape
    checkpoint: Path
    output: Path
    is_cold: bool

    def make_inputs(self) -> None:
        """Make the checkpoint unless it is there, and see that an output fits beside it."""
        make_checkpoint(self.checkpoint, Recipe(shape=self.shape, shard_count=self.shape.shards))
        self.clear()
        if shutil.disk_usage(self.checkpoint).free < 1.1 * self.shape.byte_count:
            raise NoSpaceError("the disk has no room for an output as large as the base")

    def clear(self) -> None:
        """Delete the output of the run before."""
        shutil.rmtree(self.output, ignore_errors=True)

    def prepare(self, row: Row) -> str:
        """Bring disk and memory into the state every run of `row` starts from; return the page cache's."""
        self.clear()
        page_cache.settle()
        state = (page_cache.chill if self.is_cold else page_cache.warm)([self.checkpoint])
        page_cache.touch_memory(row.copies_in_memory * self.shape.byte_count + FIXED_MEMORY_BYTES)
        return state

    def rehearse(self, row: Row) -> None:
        """Run `row` once untimed, and compare what it made with the formula, if it is to be checked.

        The copy is rehearsed too: whoever uses a part of the disk first may pay for those after it.
        """
        self.clear()
        measure(row.command, row.environment)
        if row.compute_dtype is not None:
            count = check_merge(self.checkpoint, self.output, self.shape, row.compute_dtype)
            tell(f"{row.name}: {count} tensors checked, all right")

    def time_rounds(self, rows: Sequence[Row], round_count: int) -> Results:
        """Time every row once per round, so that a slow minute of the machine falls on all of them."""
        costs: dict[str, list[Cost]] = {row.name: [] for row in rows}
        state = ""
        for number in range(1, round_count + 1):
            for row in rows:
                state = self.prepare(row)
                costs[row.name].append(measure(row.command, row.environment))
                tell(f"round {number}: {row.name}: {costs[row.name][-1].wall_seconds:.2f} s")
        machine = describe_machine(self.checkpoint)
        return Results(shape=self.shape, page_cache=state, machine=machine, costs=costs)


def tell(text: str) -> None:
    """Report progress, apart from the results on stdout."""
    print(text, file=sys.stderr, flush=True)


def run_bench(bench: Bench, rows: Sequence[Row], round_count: int) -> Results:
    """Rehearse every row, then time them all; leaves the inputs, not the outputs."""
    bench.make_inputs()
    try:
        for row in rows:
            bench.rehearse(row)
        return bench.time_rounds(rows, round_count)
    finally:
        bench.clear()


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_merge", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama_1b5")
    parser.add_argument(
        "--workdir",
        type=Path,
        default=Path(tempfile.gettempdir(), "rawmerge-bench"),
        help="a directory on the disk to measure; holds twice the base (default: in the temporary directory)",
    )
    parser.add_argument("--runs", type=int, default=5, help="rounds; every row runs once in each (default: 5)")
    parser.add_argument("--with-peft", action="store_true", help="add a row through PEFT; needs the model in memory")
    parser.add_argument("--with-float64", action="store_true", help="add a row with --compute-dtype float64")
    parser.add_argument("--cold", action="store_true", help="drop the page cache before each run (root: all of it)")
    parser.add_argument("--output", type=Path, help="also write every figure to this JSON file")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark that the command line asks for."""
    options = parse_options()
    workdir = options.workdir.resolve()
    bench = Bench(
        shape=SHAPES[options.shape],
        checkpoint=workdir / options.shape,
        output=workdir / f"{options.shape}-output",
        is_cold=options.cold,
    )
    rows = list(
        choose_rows(bench.checkpoint, bench.output, with_float64=options.with_float64, with_peft=options.with_peft)
    )
    try:
        results = run_bench(bench, rows, options.runs)
    except (CommandError, FileExistsError, NoSpaceError, WrongResultError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(results.as_markdown())
    if options.output:
        results.write_json(options.output)


if __name__ == "__main__":
    main()
