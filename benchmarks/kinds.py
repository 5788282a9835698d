"""What an element costs with each kind of adapter, beside plain LoRA: `python -m benchmarks.kinds`."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from benchmarks import page_cache
from benchmarks.check_kind import check_kind
from benchmarks.check_merge import WrongResultError
from benchmarks.kind_cases import KIND_CASES, KindCase
from benchmarks.machine import describe_machine
from benchmarks.make_checkpoint import make_checkpoint
from benchmarks.measure import CommandError, measure
from benchmarks.recipe import plain_recipe
from benchmarks.result_files import add_place_options, signature, told_command, write_result
from benchmarks.rounds import BENCH_ERRORS, tell
from benchmarks.rows import OFFLINE, REFERENCE_ROW, Places
from benchmarks.shapes import SHAPES, CheckpointShape
from benchmarks.table import markdown_table, megabytes

COLUMNS: Final = ("kind", "ns / element", "/ LoRA", "CPU ns / element", "peak RSS MB", "reason:")

#: How many times the time of plain LoRA is called slow, and needs a reason.
SLOW: Final = 10
#: A kind that has taken so long gets no further round.
PATIENCE_SECONDS: Final = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class KindCost:
    """The medians of one kind's merges.

    Attributes:
        name: of the case.
        wall_seconds: of the merge, without the start of Python and torch.
        cpu_seconds: all threads.
        peak_rss_bytes: of the whole process.
        round_count: how many were timed.
        reason: why it costs more than plain LoRA.
    """

    name: str
    wall_seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    round_count: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class KindBench:
    """A base, and a folder of adapters for it.

    Attributes:
        shape: of the base.
        workdir: where both lie.
    """

    shape: CheckpointShape
    workdir: Path

    @property
    def places(self) -> Places:
        """Where the base lies and outputs go."""
        return Places(self.workdir / self.shape.name, self.workdir / f"{self.shape.name}-output")

    @property
    def base(self) -> Path:
        """The base."""
        return self.places.checkpoint / "base"

    def adapter(self, case: KindCase) -> Path:
        """Where the adapter lies."""
        return self.workdir / f"{self.shape.name}-kinds" / case.adapter_name

    def make_inputs(self, case: KindCase) -> None:
        """Have PEFT make the adapter, in a process of its own, unless it is there."""
        make_checkpoint(self.places.checkpoint, plain_recipe(self.shape))
        adapter = self.adapter(case)
        if not adapter.exists():
            shutil.rmtree(adapter.with_name(adapter.name + ".partial"), ignore_errors=True)
            make = [sys.executable, "-m", "benchmarks.kind_adapters", case.name, str(self.base), str(adapter)]
            measure(make, OFFLINE)

    def time_copy(self, round_count: int) -> KindCost:
        """Time the reference, a whole process that takes no time to start."""
        row = self.places.copy_row()
        costs = []
        for _ in range(round_count):
            self._prepare(self.places.checkpoint)
            costs.append(measure(row.command))
        return KindCost(
            name=REFERENCE_ROW,
            wall_seconds=statistics.median(cost.wall_seconds for cost in costs),
            cpu_seconds=statistics.median(cost.cpu_seconds for cost in costs),
            peak_rss_bytes=round(statistics.median(cost.peak_rss_bytes for cost in costs)),
            round_count=round_count,
        )

    def time_kind(self, case: KindCase, round_count: int) -> KindCost:
        """Merge once untimed and compare with PEFT's merge; then time the merge."""
        self._merge(case)
        check_kind(self.adapter(case), self.base, self.places.output)
        runs = [self._merge(case)]
        while len(runs) < round_count and sum(run[0] for run in runs) < PATIENCE_SECONDS:
            runs.append(self._merge(case))
        walls, cpus, peaks = zip(*runs, strict=True)
        cost = KindCost(
            name=case.name,
            wall_seconds=statistics.median(walls),
            cpu_seconds=statistics.median(cpus),
            peak_rss_bytes=round(statistics.median(peaks)),
            round_count=len(runs),
            reason=case.reason,
        )
        tell(f"{case.name}: {cost.wall_seconds:.2f} s")
        return cost

    def clear(self) -> None:
        """Delete the output."""
        shutil.rmtree(self.places.output, ignore_errors=True)

    def _merge(self, case: KindCase) -> tuple[float, float, int]:
        self._prepare(self.base, self.adapter(case))
        figures = self.workdir / "figures.json"
        places = [self.base, self.adapter(case), self.places.output, figures]
        timer = [sys.executable, "-m", "benchmarks.merge_timer", *map(str, places), json.dumps(dict(case.options))]
        cost = measure(timer)
        timed = json.loads(figures.read_text(encoding="utf-8"))
        figures.unlink()
        return timed["wall_seconds"], timed["cpu_seconds"], cost.peak_rss_bytes

    def _prepare(self, *directories: Path) -> None:
        self.clear()
        page_cache.settle()
        page_cache.warm(directories)


def table_rows(costs: Sequence[KindCost], element_count: int) -> Iterator[Sequence[str]]:
    """Yield one row for each kind; slow ones are marked, and their lack of a reason, too."""
    plain = next(cost for cost in costs if cost.name == KIND_CASES[0].name)
    for cost in costs:
        ratio = cost.wall_seconds / plain.wall_seconds
        is_slow = ratio > SLOW
        yield (
            cost.name,
            f"{cost.wall_seconds / element_count * 1e9:.2f}",
            f"**{ratio:.1f}**" if is_slow else f"{ratio:.1f}",
            f"{cost.cpu_seconds / element_count * 1e9:.2f}",
            megabytes(cost.peak_rss_bytes),
            cost.reason or ("**not known**" if is_slow else ""),
        )


def as_markdown(shape: CheckpointShape, costs: Sequence[KindCost], failed: Sequence[str]) -> str:
    """Return the table, with what it is about above, and what failed below."""
    count = shape.updated_element_count
    head = (
        f"`{shape.name}`, {count / 1e6:.0f} million elements changed, hidden size {shape.hidden}, bfloat16, "
        f"page cache warm, medians of up to {max(cost.round_count for cost in costs)} merges in processes that have "
        f"torch loaded; more than {SLOW} times plain LoRA is bold:"
    )
    lines = "".join(f"\n\nNot timed: {name}" for name in failed)
    return f"{head}\n\n{markdown_table(COLUMNS, table_rows(costs, count))}{lines}"


def time_all(bench: KindBench, cases: Sequence[KindCase], round_count: int) -> tuple[list[KindCost], list[str]]:
    """Time every case; one that fails is told and does not stop the others."""
    costs, failed = [], []
    for case in cases:
        try:
            bench.make_inputs(case)
            costs.append(bench.time_kind(case, round_count))
        except (CommandError, WrongResultError) as error:
            failed.append(f"{case.name}: {str(error).strip().splitlines()[-1]}")
            tell(f"{case.name}: {error}")
    return [bench.time_copy(round_count), *costs], failed


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kinds", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="two_layers")
    add_place_options(parser)
    parser.add_argument("--runs", type=int, default=3, help="merges timed of each kind (default: 3)")
    parser.add_argument("--kinds", help="beginnings of names, separated by commas (default: all); plain LoRA is always")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark that the command line asks for."""
    options = parse_options()
    wanted = tuple(options.kinds.split(",")) if options.kinds else ("",)
    cases = [case for case in KIND_CASES if case is KIND_CASES[0] or case.name.startswith(wanted)]
    bench = KindBench(SHAPES[options.shape], options.workdir.resolve())
    try:
        costs, failed = time_all(bench, cases, options.runs)
    except BENCH_ERRORS as error:
        sys.exit(f"{type(error).__name__}: {error}")
    finally:
        bench.clear()
    machine = describe_machine(bench.workdir)
    command = told_command("kinds")
    text = f"{as_markdown(bench.shape, costs, failed)}\n\n{signature(command, machine)}"
    print(text)
    value = {"command": command, "shape": asdict(bench.shape), "machine": asdict(machine), "failed": failed}
    write_result(
        options.results, f"kinds-{bench.shape.name}", value | {"costs": [asdict(cost) for cost in costs]}, text
    )
    if failed:
        sys.exit(f"{len(failed)} of {len(cases)} kinds were not timed")


if __name__ == "__main__":
    main()
