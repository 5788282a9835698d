"""The figures of alternating rounds on one checkpoint, as Markdown and as a value for JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Final

from benchmarks.machine import Machine
from benchmarks.measure import Cost, median_cost, median_ratio
from benchmarks.recipe import Recipe
from benchmarks.rows import REFERENCE_ROW
from benchmarks.table import markdown_table, megabytes

COLUMNS: Final = (
    "",
    "wall s",
    "/ cp",
    "CPU s",
    "peak RSS MB",
    "storage read MB",
    "storage written MB",
    "calls read MB",
    "calls written MB",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """Everything measured in one benchmark.

    Attributes:
        recipe: of the checkpoint.
        page_cache: the state each run started from.
        machine: what it ran on.
        costs: row name to its costs, one per round; the same index is the same round.
        left_out: name of a row that could not be timed to the reason.
    """

    recipe: Recipe
    page_cache: str
    machine: Machine
    costs: Mapping[str, Sequence[Cost]]
    left_out: Mapping[str, str] = field(default_factory=dict)

    def ratio(self, row_name: str, reference: str = REFERENCE_ROW) -> float:
        """Return the median of this row's wall time over the reference's, round by round."""
        return median_ratio(self.costs[row_name], self.costs[reference])

    def median(self, row_name: str) -> Cost:
        """Return the median of each of the row's figures."""
        return median_cost(self.costs[row_name])

    def as_markdown(self) -> str:
        """Return the table, with a line above that says what was measured, and below, what could not be."""
        missing = "".join(f"\n\nNot timed: {name}: {reason}" for name, reason in self.left_out.items())
        return f"{self.title()}:\n\n{markdown_table(COLUMNS, self._table_rows())}{missing}"

    def as_value(self) -> dict[str, object]:
        """Return every single figure; no host name, no path of this machine."""
        ratios = {row_name: self.ratio(row_name) for row_name in self.costs}
        return asdict(self) | {"base_bytes": self.recipe.base_bytes, "ratios": ratios}

    def title(self) -> str:
        """Return what was measured, in words."""
        recipe = self.recipe
        shards = f"{recipe.shard_count} shard{'s' if recipe.shard_count > 1 else ''}"
        size = f"{recipe.base_bytes / 1e9:.2f} GB of {recipe.dtype} in {shards}, rank {recipe.rank}"
        round_count = len(self.costs[REFERENCE_ROW])
        return f"`{recipe.shape.name}`, {size}, page cache {self.page_cache}, medians of {round_count} rounds"

    def _table_rows(self) -> Iterator[Sequence[str]]:
        for row_name in self.costs:
            median = self.median(row_name)
            moved = (median.read_bytes, median.written_bytes, median.read_call_bytes, median.write_call_bytes)
            yield (
                row_name,
                f"{median.wall_seconds:.2f}",
                f"{self.ratio(row_name):.2f}",
                f"{median.cpu_seconds:.2f}",
                megabytes(median.peak_rss_bytes),
                *map(megabytes, moved),
            )
