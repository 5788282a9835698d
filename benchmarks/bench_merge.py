"""Times a merge beside `cp -r` and other tools, in alternating rounds: `python -m benchmarks.bench_merge`."""

from __future__ import annotations

import argparse
import sys

from benchmarks.recipe import add_recipe_options, parse_recipe
from benchmarks.result_files import add_place_options, signature, told_command, write_result
from benchmarks.results import Results
from benchmarks.rounds import BENCH_ERRORS, STATES, Bench, run_bench
from benchmarks.rows import choose_rows
from benchmarks.shapes import SHAPES


def parse_states(text: str) -> tuple[str, ...]:
    """Return the states in a list separated by commas."""
    states = tuple(text.split(","))
    if not set(states) <= set(STATES):
        raise argparse.ArgumentTypeError(f"expected some of {','.join(STATES)}, not {text}")
    return states


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_merge", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama_1b5")
    add_recipe_options(parser)
    add_place_options(parser)
    parser.add_argument("--runs", type=int, default=5, help="rounds; every row runs once in each (default: 5)")
    parser.add_argument("--with-peft", action="store_true", help="add a row through PEFT; needs the model in memory")
    parser.add_argument("--with-float64", action="store_true", help="add a row with --compute-dtype float64")
    parser.add_argument("--with-several", action="store_true", help="add rows with three adapters, in both orders")
    parser.add_argument(
        "--with-peers", action="store_true", help="add PEFT, a loop over whole shards, and all known tools installed"
    )
    states = parser.add_mutually_exclusive_group()
    states.add_argument(
        "--states", type=parse_states, default=STATES[:1], help="warm, cold, or warm,cold: a table each"
    )
    states.add_argument(
        "--cold", dest="states", action="store_const", const=("cold",), help="drop the page cache before each run"
    )
    return parser.parse_args()


def result_name(results: Results) -> str:
    """Return what the files of a result are called."""
    state = results.page_cache.partition(" ")[0]
    return f"merge-{results.recipe.name}" + ("" if state == "warm" else f"-{state}")


def main() -> None:
    """Run the benchmark that the command line asks for."""
    options = parse_options()
    bench = Bench(parse_recipe(options), options.workdir.resolve())
    rows = list(
        choose_rows(
            bench.places,
            with_float64=options.with_float64,
            with_peft=options.with_peft,
            with_peers=options.with_peers,
            with_several=options.with_several,
        )
    )
    try:
        every_result = run_bench(bench, rows, options.runs, options.states)
    except BENCH_ERRORS as error:
        sys.exit(f"{type(error).__name__}: {error}")
    command = told_command("bench_merge")
    for results in every_result:
        text = f"{results.as_markdown()}\n\n{signature(command, results.machine)}"
        print(text, end="\n\n")
        write_result(options.results, result_name(results), {"command": command, **results.as_value()}, text)


if __name__ == "__main__":
    main()
