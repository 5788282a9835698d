"""How wall time and memory grow with one property of the merge: `python -m benchmarks.growth --over size`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from benchmarks.growth_plot import Curve, write_plot
from benchmarks.recipe import Recipe, add_recipe_options, parse_recipe, plain_recipe
from benchmarks.result_files import add_place_options, signature, told_command, write_result
from benchmarks.results import Results
from benchmarks.rounds import BENCH_ERRORS, Bench, rehearse_all
from benchmarks.rows import MERGE_ROW, REFERENCE_ROW
from benchmarks.shapes import SHAPES
from benchmarks.table import markdown_table, megabytes

COLUMNS: Final = ("cp s", "rawmerge s", "/ cp", "CPU s", "peak RSS MB")

#: Property to its usual values, the shape it is varied on, and the title of its axis.
AXES: Final[dict[str, tuple[tuple[str, ...], str, str]]] = {
    "size": (("llama_0b3", "llama_0b7", "llama_1b5", "llama_3b"), "", "base, GB"),
    "rank": (("8", "16", "32", "64", "128", "256"), "llama_0b7", "rank"),
    "shards": (("1", "2", "4", "8", "16", "40"), "llama_0b7", "shards"),
    "threads": (("1", "2", "4"), "llama_0b7", "threads"),
}


@dataclass(frozen=True, slots=True)
class Point:
    """One place on the axis.

    Attributes:
        label: its value, as the table has it.
        place: its value as a number.
        recipe: of the checkpoint.
        options: of rawmerge.
    """

    label: str
    place: float
    recipe: Recipe
    options: Sequence[str] = ()


def points(axis: str, values: Sequence[str], recipe: Recipe) -> Iterator[Point]:
    """Yield the points of a curve; all but what `axis` says stays as in `recipe`."""
    for value in values:
        if axis == "size":
            shape = SHAPES[value]
            sized = replace(recipe, shape=shape, shard_count=plain_recipe(shape).shard_count)
            yield Point(value, sized.base_bytes / 1e9, sized)
        elif axis == "rank":
            yield Point(value, int(value), replace(recipe, rank=int(value)))
        elif axis == "shards":
            yield Point(value, int(value), replace(recipe, shard_count=int(value)))
        else:
            yield Point(value, int(value), recipe, ("--threads", value))


def measure_point(point: Point, workdir: Path, round_count: int, *, keeps_inputs: bool) -> Results:
    """Return the costs of copy and merge at one point; a checkpoint made for it is deleted unless it is to be kept."""
    bench = Bench(point.recipe, workdir)
    rows = [bench.places.copy_row(), bench.places.rawmerge_row(MERGE_ROW, *point.options)]
    is_new = bench.make_inputs()
    try:
        rehearse_all(bench, rows)
        return bench.time_rounds(rows, round_count, "warm")
    finally:
        bench.clear()
        if is_new and not keeps_inputs:
            bench.remove_inputs()


def table_rows(curve: Sequence[tuple[Point, Results]]) -> Iterator[Sequence[str]]:
    """Yield one row for each point."""
    for point, results in curve:
        copied, merged = results.median(REFERENCE_ROW), results.median(MERGE_ROW)
        yield (
            point.label,
            f"{copied.wall_seconds:.2f}",
            f"{merged.wall_seconds:.2f}",
            f"{results.ratio(MERGE_ROW):.2f}",
            f"{merged.cpu_seconds:.2f}",
            megabytes(merged.peak_rss_bytes),
        )


def as_markdown(axis: str, name: str, curve: Sequence[tuple[Point, Results]]) -> str:
    """Return the table and the plot's place."""
    first = curve[0][1]
    constant = {
        "size": f"rank {first.recipe.rank}",
        "rank": f"`{first.recipe.shape.name}`",
        "shards": f"`{first.recipe.shape.name}`, rank {first.recipe.rank}",
        "threads": f"`{first.recipe.shape.name}`, rank {first.recipe.rank}",
    }[axis]
    round_count = len(first.costs[MERGE_ROW])
    head = f"{constant}, page cache {first.page_cache}, medians of {round_count} rounds at each point:"
    table = markdown_table((axis, *COLUMNS), table_rows(curve))
    return f"{head}\n\n{table}\n\n![wall time and memory over {axis}]({name}.svg)"


def plot_curve(axis: str, curve: Sequence[tuple[Point, Results]]) -> Curve:
    """Return what the plot shows."""
    return Curve(
        title=AXES[axis][2],
        is_log=axis != "size",
        labels=[point.label for point, _ in curve],
        places=[point.place for point, _ in curve],
        copy_seconds=[results.median(REFERENCE_ROW).wall_seconds for _, results in curve],
        merge_seconds=[results.median(MERGE_ROW).wall_seconds for _, results in curve],
        peak_megabytes=[results.median(MERGE_ROW).peak_rss_bytes / 1e6 for _, results in curve],
    )


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("--over", choices=AXES, required=True, help="the property that is varied")
    parser.add_argument("--values", help="its values, separated by commas; of size, names of shapes")
    parser.add_argument("--shape", choices=SHAPES, default="llama_0b7", help="for all but size (default: llama_0b7)")
    add_recipe_options(parser)
    add_place_options(parser)
    parser.add_argument("--runs", type=int, default=5, help="rounds at each point (default: 5)")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints that are made")
    return parser.parse_args()


def main() -> None:
    """Measure the curve that the command line asks for."""
    options = parse_options()
    axis: str = options.over
    recipe = parse_recipe(options)
    values = options.values.split(",") if options.values else AXES[axis][0]
    name = f"growth-{axis}" + ("" if axis == "size" else f"-{recipe.shape.name}")
    curve: list[tuple[Point, Results]] = []
    try:
        for point in points(axis, values, recipe):
            results = measure_point(point, options.workdir.resolve(), options.runs, keeps_inputs=options.keep)
            curve.append((point, results))
    except BENCH_ERRORS as error:
        sys.exit(f"{type(error).__name__}: {error}")
    command = told_command("growth")
    text = f"{as_markdown(axis, name, curve)}\n\n{signature(command, curve[0][1].machine)}"
    print(text)
    figures = [{"value": point.label, **results.as_value()} for point, results in curve]
    write_result(options.results, name, {"command": command, "over": axis, "points": figures}, text)
    write_plot(options.results / f"{name}.svg", plot_curve(axis, curve))


if __name__ == "__main__":
    main()
