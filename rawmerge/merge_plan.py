"""The plan of a merge as a value: one step per output tensor, and all else the output will hold.

A plan is made from headers and configs alone, can be printed, saved as JSON, compared, and run by another process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from math import prod
from typing import Final, TypeAlias

from rawmerge.engine.tiles import Matrix, Stretch, elementwise_shape, matrix_shape
from rawmerge.errors import Problem
from rawmerge.formats.archive_layout import ArchiveLayout, archive_layout
from rawmerge.formats.shard_header import LENGTH_PREFIX, TensorEntry
from rawmerge.formats.shard_names import is_pickle
from rawmerge.formats.table_pickle import dtype_problems, length_problems
from rawmerge.inputs.tensor_source import TensorSource
from rawmerge.merge_options import MergeOptions
from rawmerge.methods.interface import ROWS
from rawmerge.methods.interface import Setting as Setting  # others take it from here
from rawmerge.output.side_files import LeftOut, SideFile
from rawmerge.window import Window


@dataclass(frozen=True, slots=True)
class Update:
    """What one adapter does to one tensor.

    Attributes:
        kind: a key of `rawmerge.methods.METHODS`.
        tensors: role to the adapter tensor that plays it.
        settings: the method's own numbers and switches.
        window: the part that it changes, None for the whole tensor.
        reach: how much of the base it must see to compute some rows, as in `rawmerge.methods.interface`.
        working_bytes: most memory it takes besides tiles and the adapter's tensors as stored, in bytes.
    """

    kind: str
    tensors: Mapping[str, TensorSource]
    settings: Mapping[str, Setting]
    window: Window | None = None
    reach: str = ROWS
    working_bytes: int = 0

    @property
    def rank(self) -> int:
        """The rank of a product of two factors, 0 where there is none."""
        ranks = [source.shape[0] for role, source in self.tensors.items() if role.endswith("_a") and source.shape]
        stated = self.settings.get("rank")
        return stated if isinstance(stated, int) and stated else min(ranks, default=0)


#: An update of this kind rounds to the output's dtype: what follows meets what a merge of its own would have written.
ROUNDING: Final = "rounding"
#: A setting of updates that are one of several in a sum: PEFT, which knows no such sum, has no say in its rounding.
SUMMED: Final = "is_summed"
#: One adds what several adapters' updates give together; its settings that end so are their windows.
COMBINATION: Final = "combination"
WINDOWS: Final = "/window"


@dataclass(frozen=True, slots=True)
class KeepTensor:
    """Copy a tensor's bytes, never decoded."""

    entry: TensorEntry
    source: TensorSource


@dataclass(frozen=True, slots=True)
class UpdateTensor:
    """Compute a tensor tile by tile: read, apply the updates in order, round once, write.

    Without updates this is a cast to the entry's dtype.

    Attributes:
        entry: the tensor in the output.
        source: its values before the updates: the base's, or stored whole by the adapter.
        base_dtype: the base's dtype of this tensor, which a source from the adapter need not share.
        updates: what is applied, in order.
        columns: columns of the matrix view in which it is cut and updated, 0 for the usual view: its first dimension
            by all others.
        cuts: rows of that view at which a product begins, beside those at which a window does.
        overlay: rows that stand in place of the source's first, such as a vocabulary smaller than the base's padded
            one; of any float dtype.
        held_dtype: the dtype in which values are merged and rounded, before they are cast to the entry's; empty where
            that is the same.
    """

    entry: TensorEntry
    source: TensorSource
    base_dtype: str
    updates: tuple[Update, ...]
    columns: int = 0
    cuts: tuple[int, ...] = ()
    overlay: TensorSource | None = None
    held_dtype: str = ""


@dataclass(frozen=True, slots=True)
class ReplaceTensor:
    """Take a tensor from the adapter instead of the base, rounded to the entry's dtype.

    Attributes:
        entry: the tensor in the output.
        source: the adapter's tensor.
        base: the base's, which is not used; None for a tensor that the base lacks.
        held_dtype: a dtype to which it is rounded before; empty for none.
    """

    entry: TensorEntry
    source: TensorSource
    base: TensorSource | None
    held_dtype: str = ""


def matrix_of(step: UpdateTensor | ReplaceTensor) -> Matrix:
    """Return the matrix view in which a tensor is computed, cut where products begin and end."""
    shape = step.source.shape
    if isinstance(step, ReplaceTensor) or not step.updates:
        rows, columns = elementwise_shape(shape)
        return Matrix(rows, columns, tuple(_pieces(rows, columns, (), ())))
    rows, columns = (prod(shape) // step.columns, step.columns) if step.columns else matrix_shape(shape)
    windows = [(place, at) for place, update in enumerate(step.updates) for at in _windows(update, rows)]
    return Matrix(rows, columns, tuple(_pieces(rows, columns, windows, step.cuts)))


def _windows(update: Update, rows: int) -> Iterator[Window]:
    """Yield the parts of a matrix of so many rows in which an update has products of its own."""
    yield update.window or Window(0, rows)
    yield from (Window(*at) for name, at in update.settings.items() if name.endswith(WINDOWS) and isinstance(at, tuple))


def _pieces(rows: int, columns: int, windows: Sequence[tuple[int, Window]], cuts: Iterable[int]) -> Iterator[Stretch]:
    edges = chain(cuts, *((window.row, window.row + window.row_count) for _, window in windows))
    for start, stop in pairwise(sorted({0, rows, *(edge for edge in edges if 0 < edge < rows)})):
        own = [(place, at) for place, at in windows if at.row < stop and start < at.row + at.row_count]
        widths = (len(range(columns)[at.columns(columns)]) for _, at in own)
        yield Stretch(start, stop - start, min(widths, default=columns), tuple(dict(own)))


Step: TypeAlias = KeepTensor | UpdateTensor | ReplaceTensor


@dataclass(frozen=True)  # without slots: what follows from a large table is kept, once it was asked for
class ShardPlan:
    """One output shard, by its name a safetensors file or one of `torch.save`: its header as the former, its steps."""

    name: str
    header_text: str
    steps: tuple[Step, ...]

    @cached_property
    def data_start(self) -> int:
        """Offset of the first tensor byte in a safetensors file."""
        return LENGTH_PREFIX.size + len(self.header_text.encode())

    @cached_property
    def layout(self) -> ArchiveLayout:
        """Where everything lies in a file of `torch.save`, the steps' tensors in their order."""
        return archive_layout([step.entry for step in self.steps])

    @property
    def byte_count(self) -> int:
        """Size of the whole file in bytes."""
        own = self.data_start + (self.steps[-1].entry.end if self.steps else 0)
        return self.layout.byte_count if is_pickle(self.name) else own

    def format_problems(self) -> list[Problem]:
        """Return why a file of `torch.save` could not hold these tensors; nothing for a safetensors file."""
        if not is_pickle(self.name):
            return []
        unknown = list(dtype_problems(step.entry for step in self.steps))
        return unknown or list(length_problems(self.name, self.layout.table, len(self.steps)))


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file that the plan was made from, and by what it is recognised at run time.

    Attributes:
        path: where it lies.
        name: its file name, recorded in the output.
        byte_count: its size; header_sha256: SHA-256 of its header text.
    """

    path: str
    name: str
    byte_count: int
    header_sha256: str


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A small text file of the output, such as the index or an edited config."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """What became of one adapter tensor.

    Attributes:
        name: the tensor in the adapter's file.
        use: `updates`, `replaces` or `adds` an output tensor, or `ignored`; reason: why it is, else empty.
        tensor_name: the output tensor; where there are several, their names with `*` for numbers; count: how many.
    """

    name: str
    use: str
    tensor_name: str
    count: int = 1
    reason: str = ""


@dataclass(frozen=True, slots=True)
class AdapterInput:
    """One adapter of a merge.

    Attributes:
        root: its directory.
        repo: `org/name@commit` of one from the hub, else empty.
        config_sha256: SHA-256 of `adapter_config.json`, empty where it has none.
        files: its tensor file.
        uses: every one of its tensors and what becomes of it.
        weight: by what its deltas are multiplied.
    """

    root: str
    repo: str
    config_sha256: str
    files: tuple[InputFile, ...]
    uses: tuple[AdapterUse, ...]
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class MergePlan:
    """Everything that a merge will write.

    Attributes:
        options: the choices that were made.
        base_root: the base's directory or file.
        base_repo: `org/name@commit` of a base from the hub, else empty.
        base_files: the base's shards.
        base_config_sha256: SHA-256 of `config.json`, empty where the base has none.
        adapters: what is merged, in order.
        shards: the output shards, in the order they are written.
        written_files: index and edited config.
        side_files: files copied from the base; left_out: files that are not, with the reasons.
        notes: what a user may want to know; never a lost delta.
        history: SHA-256 of the files of adapters that the base held already.
    """

    options: MergeOptions
    base_root: str
    base_repo: str
    base_files: tuple[InputFile, ...]
    base_config_sha256: str
    adapters: tuple[AdapterInput, ...]
    shards: tuple[ShardPlan, ...]
    written_files: tuple[WrittenFile, ...]
    side_files: tuple[SideFile, ...]
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]
    history: tuple[str, ...] = ()

    def steps(self) -> Iterator[Step]:
        """Yield every step, in the order in which tensors are written."""
        for shard in self.shards:
            yield from shard.steps

    @property
    def adapter_files(self) -> tuple[InputFile, ...]:
        """The tensor files of all adapters."""
        return tuple(file for adapter in self.adapters for file in adapter.files)

    @property
    def adapter_uses(self) -> tuple[AdapterUse, ...]:
        """Every tensor of all adapters and what becomes of it."""
        return tuple(use for adapter in self.adapters for use in adapter.uses)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all output tensors."""
        return sum(step.entry.byte_count for step in self.steps())

    @property
    def byte_count(self) -> int:
        """Bytes that the output takes, the merge record not counted."""
        small = sum(len(file.text.encode()) for file in self.written_files)
        return small + sum(file.byte_count for file in self.side_files) + sum(shard.byte_count for shard in self.shards)
