"""Stands where a merge writes a shard, and compares what would be written with a checkpoint that is there.

The checkpoint may be cut into shards otherwise and name its tensors in another order: they are compared by name.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from rawmerge.dtypes import DTYPES
from rawmerge.engine.page_edges import place_in
from rawmerge.inputs.tensor_source import OpenFiles, TensorSource
from rawmerge.merge_plan import KeepTensor, ReplaceTensor, ShardPlan, Step
from rawmerge.verifying.piece_sums import PieceSummers
from rawmerge.verifying.tensor_tally import TensorTally

#: Bytes that are read at a time.
_CHUNK_BYTES: Final = 2**18


@dataclass(frozen=True, slots=True)
class ComparedTensor:
    """A tensor that is compared.

    Attributes:
        start: where it would begin in the shard, in bytes.
        end: where it would end.
        found: where it is in the checkpoint.
        base: the base's values of the same elements; None where there are none.
        tally: what differs.
    """

    start: int
    end: int
    found: TensorSource
    base: TensorSource | None
    tally: TensorTally


class ComparedShard:
    """Takes what a shard's file would take, and writes nothing; what differs is counted in `tallies`."""

    def __init__(self, plan: ShardPlan, tensors: Mapping[str, TensorSource], summers: PieceSummers) -> None:
        """Find the shard's tensors.

        Args:
            plan: the shard that would be written.
            tensors: the checkpoint's, those of another dtype or shape left out.
            summers: what adds up differences, of all shards.
        """
        self._files = OpenFiles()
        self._data_start = plan.data_start
        steps = (step for step in plan.steps if step.entry.name in tensors and step.entry.byte_count)
        self._tensors = [_compared(step, plan.data_start, tensors[step.entry.name], summers) for step in steps]
        self._starts = [tensor.start for tensor in self._tensors]

    @property
    def tallies(self) -> Iterator[TensorTally]:
        """What differs, of every tensor."""
        return (tensor.tally for tensor in self._tensors)

    def write_header(self, text: str) -> None:
        """Take a header; tensors are compared by name, so it does not matter."""

    def write_at(self, offset: int, buffer: memoryview) -> None:
        """Compare bytes that would be written from `offset` on."""
        for tensor, first, count in self._parts(offset, len(buffer)):
            at = tensor.start + first - offset
            self._compare(tensor, first, buffer[at : at + count])

    def write_placed(self, offset: int, byte_count: int, pages: memoryview) -> None:
        """Compare bytes that lie in pages of memory as they would lie in pages of the file."""
        self.write_at(offset, place_in(pages, offset, byte_count))

    def copy_from(self, files: OpenFiles, path: str, source_offset: int, offset: int, byte_count: int) -> None:
        """Compare with a byte range of another file."""
        for done in range(0, byte_count, _CHUNK_BYTES):
            part = memoryview(bytearray(min(_CHUNK_BYTES, byte_count - done)))
            files.read_into(path, source_offset + done, part)
            self.write_at(offset + done, part)

    def clone(self, _: OpenFiles, __: str, /) -> bool:
        """Say that nothing can be cloned."""
        return False

    def flush(self) -> None:
        """Wait for nothing: nothing is written."""

    def finish(self, *, gives_up_pages: bool = False) -> None:  # noqa: ARG002  # there are none
        """Close what was opened."""
        self.close()

    def close(self) -> None:
        """Close what was opened; safe to call again."""
        self._files.close()

    def _parts(self, offset: int, byte_count: int) -> Iterator[tuple[ComparedTensor, int, int]]:
        """Yield (tensor, first byte in it, how many) of a range of the shard, a bounded number of bytes at a time."""
        end = offset + byte_count
        index = max(0, bisect_right(self._starts, offset) - 1)
        while index < len(self._tensors) and self._tensors[index].start < end:
            tensor = self._tensors[index]
            first, stop = max(offset, tensor.start), min(end, tensor.end)
            for start in range(first, stop, _CHUNK_BYTES):
                yield tensor, start - tensor.start, min(_CHUNK_BYTES, stop - start)
            index += 1

    def _compare(self, tensor: ComparedTensor, first: int, expected: memoryview) -> None:
        raw = bytearray(len(expected))
        found = memoryview(raw)
        self._files.read_into(tensor.found.path, tensor.found.offset + first, found)
        if raw == expected:  # a bytearray is compared as memory; a memoryview would be element by element
            return
        dtype = DTYPES[tensor.found.dtype]
        item = dtype.bits // 8
        if not dtype.is_mergeable or first % item or len(expected) % item:
            tensor.tally.add_bytes(expected, found, first)
            return
        base, base_dtype = tensor.base, tensor.base.dtype if tensor.base else tensor.found.dtype
        before = self._read_base(base, first // item, len(expected) // item) if base else None
        tensor.tally.add(expected, found, before, base_dtype)

    def _read_base(self, base: TensorSource, first: int, count: int) -> memoryview:
        item = DTYPES[base.dtype].bits // 8
        values = memoryview(bytearray(count * item))
        self._files.read_into(base.path, base.offset + first * item, values)
        return values


def is_changed(step: Step) -> bool:
    """Whether the adapter changes or replaces a tensor; else it has the base's values, cast at most."""
    return not isinstance(step, KeepTensor) and (
        isinstance(step, ReplaceTensor) or bool(step.updates) or step.overlay is not None
    )


def _compared(step: Step, data_start: int, found: TensorSource, summers: PieceSummers) -> ComparedTensor:
    entry = step.entry
    count = entry.byte_count * 8 // DTYPES[entry.dtype].bits
    tally = TensorTally(entry.name, entry.dtype, count, is_updated=is_changed(step), summers=summers)
    return ComparedTensor(data_start + entry.start, data_start + entry.end, found, _base_of(step), tally)


def _base_of(step: Step) -> TensorSource | None:
    """Return the base's values where they have the output's shape."""
    base = step.base if isinstance(step, ReplaceTensor) else step.source
    if base is None or isinstance(step, KeepTensor) or base.shape != step.entry.shape:
        return None
    return base if DTYPES[base.dtype].is_mergeable else None
