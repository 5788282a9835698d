"""The figures of one benchmark as a Markdown table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from benchmarks.machine import Machine
from benchmarks.measure import Cost, median_cost, median_ratio
from benchmarks.rows import REFERENCE_ROW
from benchmarks.shapes import CheckpointShape

TABLE_HEAD: Final = (
    "| | wall s | / cp | CPU s | peak RSS MB |",
    "|---|---:|---:|---:|---:|",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """Everything measured in one benchmark.

    Attributes:
        shape: of the base checkpoint.
        page_cache: the state each run started from.
        machine: what it ran on.
        costs: row name to its costs, one per round; the same index is the same round.
    """

    shape: CheckpointShape
    page_cache: str
    machine: Machine
    costs: Mapping[str, Sequence[Cost]]

    def ratio(self, row_name: str) -> float:
        """Return the median of this row's wall time over the reference's, round by round."""
        return median_ratio(self.costs[row_name], self.costs[REFERENCE_ROW])

    def as_markdown(self) -> str:
        """Return the table with a line above that says what was measured, and below, on what."""
        return "\n".join([self._title(), "", *TABLE_HEAD, *self._table_rows(), "", str(self.machine)])

    def write_json(self, path: Path) -> None:
        """Write every single figure to `path`; no host name, no path of this machine."""
        value = asdict(self) | {"base_bytes": self.shape.byte_count, "ratios": self._ratios()}
        path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

    def _ratios(self) -> dict[str, float]:
        return {row_name: self.ratio(row_name) for row_name in self.costs}

    def _title(self) -> str:
        size = f"{self.shape.byte_count / 1e9:.2f} GB in {self.shape.shards} shards"
        round_count = len(self.costs[REFERENCE_ROW])
        return f"`{self.shape.name}`, {size}, page cache {self.page_cache}, medians of {round_count} rounds:"

    def _table_rows(self) -> Iterator[str]:
        for row_name, costs in self.costs.items():
            median = median_cost(costs)
            yield (
                f"| {row_name} | {median.wall_seconds:.2f} | {self.ratio(row_name):.2f} "
                f"| {median.cpu_seconds:.2f} | {median.peak_rss_bytes / 1e6:.0f} |"
            )
