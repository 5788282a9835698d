"""What each of rawmerge's means of speed is worth, by switching it off: `python -m benchmarks.mechanisms`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Final

from benchmarks.recipe import add_recipe_options, parse_recipe
from benchmarks.result_files import add_place_options, signature, told_command, write_result
from benchmarks.results import Results
from benchmarks.rounds import BENCH_ERRORS, Bench, run_bench
from benchmarks.rows import MERGE_ROW, REFERENCE_ROW, Places, Row
from benchmarks.shapes import SHAPES
from benchmarks.table import markdown_table, megabytes
from rawmerge.run_options import MECHANISMS

COLUMNS: Final = ("", "wall s", "/ cp", "/ rawmerge", "CPU s", "CPU / rawmerge", "peak RSS MB", "what is missing:")
WITHOUT_ALL: Final = "without all of them"
#: Mechanisms that act only where another does not, and are measured without both.
STANDS_IN: Final = {"early-import": "kernel"}


def choose_rows(places: Places) -> Iterator[Row]:
    """Yield the copy, rawmerge whole, rawmerge without each mechanism, and without all."""
    yield places.copy_row()
    yield places.rawmerge_row()
    for name in MECHANISMS:
        if other := STANDS_IN.get(name):
            yield places.rawmerge_row(f"without {other} and {name}", "--without", other, "--without", name)
        else:
            yield places.rawmerge_row(f"without {name}", "--without", name)
    yield places.rawmerge_row(WITHOUT_ALL, *(part for name in MECHANISMS for part in ("--without", name)))


def table_rows(results: Results) -> Iterator[Sequence[str]]:
    """Yield each row beside the copy and beside rawmerge whole."""
    whole = results.median(MERGE_ROW)
    for row_name in results.costs:
        median = results.median(row_name)
        yield (
            row_name,
            f"{median.wall_seconds:.2f}",
            f"{results.ratio(row_name):.2f}",
            f"{results.ratio(row_name, MERGE_ROW):.2f}",
            f"{median.cpu_seconds:.2f}",
            f"{median.cpu_seconds / whole.cpu_seconds:.2f}",
            megabytes(median.peak_rss_bytes),
            _what_is_missing(row_name),
        )


def _what_is_missing(row_name: str) -> str:
    names = row_name.removeprefix("without ").split(" and ")
    told = MECHANISMS.get(names[-1], "")
    return f"{told}; beside `without {names[0]}`" if len(names) > 1 else told


def as_markdown(results: Results) -> str:
    """Return the table and what it says."""
    head = (
        f"{results.title()}; ratios are medians of those to the `{REFERENCE_ROW}` and `{MERGE_ROW}` of the same round:"
    )
    return f"{head}\n\n{markdown_table(COLUMNS, table_rows(results))}"


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mechanisms", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama_1b5")
    add_recipe_options(parser)
    add_place_options(parser)
    parser.add_argument("--runs", type=int, default=5, help="rounds; every row runs once in each (default: 5)")
    parser.add_argument("--state", choices=("warm", "cold"), default="warm", help="of the page cache (default: warm)")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark that the command line asks for."""
    options = parse_options()
    bench = Bench(parse_recipe(options), options.workdir.resolve())
    try:
        (results,) = run_bench(bench, list(choose_rows(bench.places)), options.runs, (options.state,))
    except BENCH_ERRORS as error:
        sys.exit(f"{type(error).__name__}: {error}")
    command = told_command("mechanisms")
    text = f"{as_markdown(results)}\n\n{signature(command, results.machine)}"
    print(text)
    name = f"mechanisms-{bench.recipe.name}" + ("" if options.state == "warm" else "-cold")
    write_result(options.results, name, {"command": command, **results.as_value()}, text)


if __name__ == "__main__":
    main()
