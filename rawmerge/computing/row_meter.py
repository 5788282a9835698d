"""Measures what the rounding leaves of a delta, in the sampled rows of a tile. Importing it imports torch."""

from __future__ import annotations

from typing import Final, TypeAlias

import torch

from rawmerge.computing.rounding import round_into
from rawmerge.computing.survival import SUMS, SurvivalTally
from rawmerge.computing.tile_scratch import TileScratch
from rawmerge.dtypes import DTYPES
from rawmerge.native import DTYPE_CODES
from rawmerge.native.row_sums import MergedRows, RowSums

#: Elements that are looked at together: a few arrays of so many float64 stay in the processor's cache.
_ELEMENTS: Final = 2**14
#: An accelerator takes as long for few as for many.
_ELEMENTS_THERE: Final = 2**18

#: What the compiled kernel reads.
_CODES: Final = {getattr(torch, DTYPES[code].torch_name): code for code in DTYPE_CODES}

#: The same rows (rows, columns) three times, on one device: as the updates met them, in any float dtype; after the
#: updates, in compute dtype; as they are stored.
States: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class RowMeter:
    """Measures the tiles of one tensor, for any number of threads."""

    def __init__(self, tally: SurvivalTally, *, is_compiled: bool = False) -> None:
        """Measure nothing yet.

        Args:
            tally: where the sums go.
            is_compiled: whether the compiled kernel may make them where it knows the dtypes, in a tenth of the time.
        """
        self._tally = tally
        self._is_compiled = is_compiled

    def count(self, first_row: int, row_count: int) -> int:
        """Return how many of some rows are sampled."""
        return len(self._tally.sampled(first_row, row_count))

    def measure(self, first_row: int, states: States, among: range, scratch: TileScratch, stage: int = 0) -> None:
        """Put the sums of some rows into the tally: of those from `first_row` on that are `among` these."""
        start, stop = max(first_row, among.start), min(first_row + len(states[0]), among.stop)
        if start < stop:
            before, after, now = (each[start - first_row : stop - first_row] for each in states)
            if self._is_compiled and {before.dtype, now.dtype} <= _CODES.keys():
                self._merged((before, after, now)).measure(RowSums(self._tally.sums(stage), start, self._tally.stride))
            else:
                self.put(start, self.sums(start, (before, after, now), scratch), stage)

    def _merged(self, states: States) -> MergedRows:
        (before, after, now), buffers = states, [each.view(-1).view(torch.uint8).numpy().data for each in states]
        codes, is_double = (_CODES[before.dtype], _CODES[now.dtype]), after.dtype == torch.float64
        return MergedRows((after.shape[0], after.shape[1]), buffers[0], buffers[1], buffers[2], codes, is_double)

    def put(self, first_row: int, sums: torch.Tensor, stage: int = 0) -> None:
        """Put what `sums` gave for rows from `first_row` on into the tally; it lies in the processor's memory."""
        self._tally.put(first_row, sums.view(-1).numpy().data, stage)

    def sums(self, first_row: int, states: States, scratch: TileScratch) -> torch.Tensor:
        """Return float64 (sampled rows, `SUMS`) of rows from `first_row` on, on their device; Metal's on the CPU."""
        sampled = self._tally.sampled(first_row, len(states[0]))
        step = slice(sampled.start - first_row, None, self._tally.stride)
        before, after, now = (each[step] for each in states)
        if after.device.type == "mps":  # which has no float64
            before, after, now, scratch = before.cpu(), after.cpu(), now.cpu(), TileScratch()
        limit = _ELEMENTS if after.device.type == "cpu" else _ELEMENTS_THERE
        columns = after.shape[1]
        height = max(1, limit // max(1, columns))
        if columns <= limit and len(sampled) <= height:  # nearly always, without cutting anything
            return _sums((before, after, now), scratch).T.contiguous()
        sums = torch.zeros(SUMS, len(sampled), dtype=torch.float64, device=after.device)
        for first in range(0, len(sampled), height):
            for column in range(0, columns, limit):  # cut alike for any height: the order of sums is the same
                part = slice(first, first + height), slice(column, column + limit)
                sums[:, part[0]] += _sums((before[part], after[part], now[part]), scratch)
        return sums.T.contiguous()


def _sums(states: States, scratch: TileScratch) -> torch.Tensor:
    """Return float64 (`SUMS`, rows) of rows (rows, columns), made in memory that is there: that takes half the time."""
    before, after, now = states
    rows, columns = after.shape
    base = scratch.tensor("base", (rows, columns), after.dtype).copy_(before)
    stored = before
    if before.dtype != now.dtype:
        stored = scratch.tensor("unchanged", (rows, columns), now.dtype)
        round_into(stored, base)
    terms = scratch.tensor("terms", (SUMS * rows, columns), torch.float64).view(SUMS, rows, columns)
    touched, changed, delta, applied, error = terms
    torch.ne(applied.copy_(now), error.copy_(stored), out=changed)  # NaN is other than NaN
    torch.ne(delta.copy_(torch.sub(after, base, out=base)), 0, out=touched)
    torch.sub(applied, error, out=applied)
    torch.sub(applied, delta, out=error)
    terms[2:].square_()
    return terms.sum(2)
