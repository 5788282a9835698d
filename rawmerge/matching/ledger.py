"""What becomes of every adapter tensor, gathered while an adapter is matched to a base."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from rawmerge.errors import Problem, ProblemCollector, quote
from rawmerge.formats.adapter_names import AdapterTensorName
from rawmerge.inputs.adapter import Adapter
from rawmerge.inputs.base_checkpoint import BaseCheckpoint
from rawmerge.inputs.tensor_source import TensorSource
from rawmerge.matching.places import Piece, Place
from rawmerge.merge_plan import AdapterUse, Update
from rawmerge.window import Window


@dataclass(frozen=True, slots=True)
class Addition:
    """A tensor that the base lacks.

    Attributes:
        source: where its values come from, the adapter or a base tensor that it was tied to.
        beside: the base tensor whose shard takes it, an empty string for the last shard.
        like: the base tensor whose dtype it gets, an empty string for the base's usual one.
    """

    source: TensorSource
    beside: str = ""
    like: str = ""


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of a disk tensor, and the first tensor of the pair that updates it."""

    piece: Piece
    subject: str
    is_all: bool

    def overlaps(self, other: _Part) -> bool:
        """Whether the two share an element; columns that alternate do not."""
        if self.is_all or other.is_all:
            return True
        one, two = self.piece, other.piece
        share_rows = one.row < two.row + two.rows and two.row < one.row + one.rows
        if not share_rows or one.columns < 0 or two.columns < 0:
            return share_rows
        if one.column_step > 1 and one.column_step == two.column_step:
            return (one.column - two.column) % one.column_step == 0
        ends = [piece.column + piece.columns * piece.column_step for piece in (one, two)]
        return one.column < ends[1] and two.column < ends[0]


@dataclass(slots=True)
class Ledger:
    """What the output takes from the adapter, and the account of each adapter tensor.

    Attributes:
        updates: output tensor to the updates that it gets, in order.
        replacements: base tensor to the adapter tensor that replaces it.
        overlays: base tensor to the adapter tensor that takes the place of its first rows.
        additions: tensors that the base lacks.
        columns: tensors that are cut in another matrix view than the default one, and its columns.
        cuts: rows of that view at which a product begins, beside those at which an update's window does.
        embeddings: tensors that an embedding pair updates.
        claims: disk tensor to the parts of it that pairs update.
        uses: the account; notes: what a user may want to know.
    """

    base: BaseCheckpoint
    adapter: Adapter
    problems: ProblemCollector = field(default_factory=ProblemCollector)
    updates: dict[str, list[Update]] = field(default_factory=lambda: defaultdict(list))
    replacements: dict[str, TensorSource] = field(default_factory=dict)
    overlays: dict[str, TensorSource] = field(default_factory=dict)
    additions: dict[str, Addition] = field(default_factory=dict)
    columns: dict[str, int] = field(default_factory=dict)
    cuts: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    embeddings: set[str] = field(default_factory=set)
    claims: dict[str, list[_Part]] = field(default_factory=lambda: defaultdict(list))
    uses: list[AdapterUse] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Return the shape that a tensor has before it is updated; of an overlaid one, that of the rows laid over."""
        for source in (self.overlays.get(name), self.replacements.get(name), self.base.tensors.get(name)):
            if source:
                return source.shape
        return self.additions[name].source.shape

    def place_shape(self, place: Place) -> tuple[int, ...]:
        """Return the shape that updates of this place meet."""
        is_known = place.is_whole and self.is_stored(place.name)
        return self.shape_of(place.name) if is_known else place.shape

    def is_stored(self, name: str) -> bool:
        """Return whether the adapter stores a tensor whole."""
        return name in self.overlays or name in self.replacements or name in self.additions

    def source(self, name: AdapterTensorName) -> TensorSource:
        """Return the adapter's tensor of that name."""
        return self.adapter.tensors[name.text]

    def account(self, names: Iterable[AdapterTensorName], use: str, place: Place | str, reason: str = "") -> None:
        """Record what became of adapter tensors."""
        tensors = [place] if isinstance(place, str) else list(dict.fromkeys(place.tensors))
        shown = tensors[0] if len(tensors) == 1 else ", ".join(dict.fromkeys(map(_without_expert, tensors)))
        self.uses.extend(AdapterUse(name.text, use, shown, len(tensors), reason) for name in names)

    def claim(self, place: Place, subject: str) -> Problem | None:
        """Note that a pair updates a place; return the problem where another pair updates a part of it."""
        for piece in place.pieces:
            part = _Part(piece, subject, place.is_whole)
            taken = self.claims[piece.tensor]
            if other := next((other for other in taken if other.subject != subject and other.overlaps(part)), None):
                expected, found = f"one pair for {quote(piece.tensor)}", f"another, {quote(other.subject)}"
                return Problem(subject, expected, found, "the file holds one module under two names")
            taken.append(part)
        return None

    def update_place(self, place: Place, update: Update) -> None:
        """Record an update of everything that a place holds."""
        if place.is_whole:
            overlay = self.overlays.get(place.name)
            window = Window(row=0, row_count=overlay.shape[0]) if overlay else None
            self.updates[place.name].append(replace(update, window=window))
        else:
            for piece in place.pieces:
                self.update_piece(place, piece, update, piece.at)

    def update_piece(self, place: Place, piece: Piece, update: Update, delta_row: int) -> None:
        """Record an update of some rows of a disk tensor; the delta's row `delta_row` goes to the first of them."""
        window = Window(piece.row, piece.rows, delta_row, piece.column, piece.column_step, piece.columns)
        self.updates[piece.tensor].append(replace(update, window=window))
        if place.view_columns and len(self.base.tensors[piece.tensor].shape) > 2:
            self.columns[piece.tensor] = place.view_columns


def _without_expert(name: str) -> str:
    """Return the name with its last number, an expert's, folded to `*`."""
    segments = name.split(".")
    last = max((place for place, segment in enumerate(segments) if segment.isdigit()), default=-1)
    return ".".join("*" if place == last else segment for place, segment in enumerate(segments))
