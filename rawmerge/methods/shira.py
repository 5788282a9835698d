"""SHiRA: W plus some numbers at fixed places.

Source: PEFT 0.21.2 `tuners/shira/layer.py` `ShiraLayer.update_layer` (how many), `Linear.get_delta_weight` (a sparse
tensor, added in float32 and rounded once); `tuners/shira/model.py` (Windows stores the places as float32).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

from rawmerge.errors import MergeError
from rawmerge.formats.kind_fields import KindFields, whole_number
from rawmerge.methods.interface import (
    AdapterKind,
    Method,
    PlannedUpdate,
    PreparedUpdate,
    Scratch,
    Setting,
    TargetModule,
    TileContext,
)

if TYPE_CHECKING:
    import torch

_INDEX_DTYPES: Final = ("I32", "I64", "F32")


class ShiraMethod:
    """Numbers added at places."""

    def prepare(
        self,
        settings: Mapping[str, Setting],  # noqa: ARG002  # a Method
        tensors: Mapping[str, torch.Tensor],
        context: TileContext,
    ) -> PreparedUpdate:
        """Return the update, places in the order of the base's elements.

        Raises:
            MergeError: a place is none of the base's, or stands twice.
        """
        rows, columns = _checked(tensors["indices"], (context.shape[0], context.shape[1]))
        order = (rows * context.shape[1] + columns).argsort()
        return PreparedShira(rows[order], columns[order], tensors["values"].to(context.compute_dtype)[order])


@dataclass(frozen=True, slots=True)
class PreparedShira:
    """Numbers and their places, which ascend.

    Attributes:
        rows: (n,) int64; columns: (n,) int64.
        values: (n,) in compute dtype.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    values: torch.Tensor

    def apply(self, tile: torch.Tensor, first_row: int, scratch: Scratch) -> None:  # noqa: ARG002  # a PreparedUpdate
        """Add the numbers of these rows to `tile` (rows, columns), in place."""
        import torch

        bounds = torch.tensor([first_row, first_row + len(tile)])
        start, stop = torch.searchsorted(self.rows, bounds).tolist()
        places = (self.rows[start:stop] - first_row, self.columns[start:stop])
        tile[places] += self.values[start:stop]


def _checked(indices: torch.Tensor, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return row and column of each place, int64."""
    import torch

    # NaN and infinity become numbers that no base has
    whole = indices.nan_to_num(-1.0, -1.0, -1.0).to(torch.int64) if indices.is_floating_point() else indices.long()
    if not torch.equal(whole.to(indices.dtype), indices):
        raise MergeError("'shira_indices': expected whole numbers, found fractions, NaN or infinity")
    rows, columns = whole
    for what, places, size in (("row", rows, shape[0]), ("column", columns, shape[1])):
        lowest, highest = int(places.min()), int(places.max())
        if lowest < 0 or highest >= size:
            raise MergeError(f"'shira_indices': expected {what}s from 0 to {size - 1}, found {lowest} to {highest}")
    if len((rows * shape[1] + columns).unique()) < len(rows):
        raise MergeError("'shira_indices': expected each place once, found one twice")
    return rows, columns


class ShiraKind(AdapterKind):
    """SHIRA, sparse high-rank adapters."""

    peft_type: ClassVar[str] = "SHIRA"
    title: ClassVar[str] = "SHiRA"
    formula: ClassVar[str] = "W + v at stored places"
    modules: ClassVar[str] = "Linear"
    parts: ClassVar[Mapping[str, str]] = {"shira_indices": "indices", "shira_weight": "values"}
    integers: ClassVar[tuple[str, ...]] = ("indices",)
    fields: ClassVar[KindFields] = KindFields(
        followed={"r": whole_number(32, 1)}, ignored=("mask_type", "random_seed", "init_weights")
    )
    methods: ClassVar[Mapping[str, Method]] = {"shira": ShiraMethod()}

    def plan(self, module: TargetModule) -> Iterable[PlannedUpdate]:
        """Yield the one update; r numbers for each row and column, as many as a LoRA of that rank has."""
        module.refuse_transposed()
        rows, columns = module.matrix_shape
        count = module.values["r"] * (rows + columns)
        module.expect("values", count)
        module.expect("indices", 2, count)
        if module.dtypes["indices"] not in _INDEX_DTYPES:
            module.refuse("indices", f"dtype {', '.join(_INDEX_DTYPES)}", f"{module.dtypes['indices']}")
        # rows, columns, their order and the places as one number, twice while sorting; numbers in compute dtype
        yield PlannedUpdate("shira", ("indices", "values"), working_bytes=count * (6 * 8 + 4))
