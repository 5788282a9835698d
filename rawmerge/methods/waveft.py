"""WaveFT: W + s * the inverse wavelet transform of trained coefficients at random places of an (out, in) matrix.

Source: PEFT 0.21.2 `tuners/waveft/layer.py` `WaveFTLayer.update_layer` (places) and `get_delta_weight`,
`tuners/waveft/waverec2d.py` `waverec2d`, `tuners/waveft/model.py` `_calculate_proportional_parameters`. Each row of
the delta depends on few rows of coefficients, so that rows are computed apart.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from rawmerge.formats.kind_fields import Field, KindFields, finite_number, switch, whole_number
from rawmerge.methods.delta import row_delta
from rawmerge.methods.fourierft import FREQUENCY_PATTERN, allowed_counts, expect_spectrum, spectrum_settings
from rawmerge.methods.interface import (
    ROWS,
    WHOLE,
    AdapterKind,
    Method,
    PlannedUpdate,
    PreparedUpdate,
    Setting,
    TargetModule,
    TileContext,
    number,
)
from rawmerge.methods.lora import WHOLE_ELEMENTS
from rawmerge.methods.randomness import first_positions, matrix_of_linear, seed_field

if TYPE_CHECKING:
    import torch


@lru_cache(maxsize=1)
def wavelet_filters() -> Mapping[str, list[float]]:
    """Return the low-pass reconstruction filters of all wavelets that PEFT can merge, by name.

    PEFT accepts the names of more: it has no filters for most of those, and one for coif5 of another length than its
    padding is made for.
    """
    text = Path(__file__).with_name("wavelets.json").read_text(encoding="utf-8")
    filters: dict[str, list[float]] = json.loads(text)["filters"]
    return filters


@dataclass(frozen=True, slots=True)
class SparseMatrix:
    """A matrix of few values.

    Attributes:
        rows, columns: where they are, (count) each, int64; values: what they are, (count).
    """

    rows: torch.Tensor
    columns: torch.Tensor
    values: torch.Tensor

    def block(self, rows: range, columns: range) -> torch.Tensor:
        """Return a part, dense: (rows, columns)."""
        import torch

        inside = (self.rows >= rows.start) & (self.rows < rows.stop)
        inside &= (self.columns >= columns.start) & (self.columns < columns.stop)
        dense = torch.zeros(len(rows), len(columns), dtype=self.values.dtype)
        dense[self.rows[inside] - rows.start, self.columns[inside] - columns.start] = self.values[inside]
        return dense


@dataclass(frozen=True, slots=True)
class Axis:
    """How the coefficients of one dimension make its elements.

    Attributes:
        size: how many elements it has; length: of the filter, even.
    """

    size: int
    length: int

    @property
    def half(self) -> int:
        """How many coefficients each of the two bands has; in the spectrum one follows the other."""
        return (self.size + self.length - 1) // 2

    @property
    def offset(self) -> int:
        """Where in the padded spectrum its own first place is."""
        return (2 * self.half - self.size) // 2

    def coefficients(self, start: int, stop: int) -> range:
        """Return which coefficients of each band elements `start` to `stop` are made of."""
        return range(start // 2, min(self.half, (stop + self.length - 3) // 2 + 1))

    def crop(self, start: int, stop: int) -> slice:
        """Return where these elements are in what those coefficients make."""
        first = start + self.length - 2 - 2 * self.coefficients(start, stop).start
        return slice(first, first + stop - start)


class WaveftMethod:
    """The delta of one module."""

    def prepare(
        self, settings: Mapping[str, Setting], tensors: Mapping[str, torch.Tensor], context: TileContext
    ) -> PreparedUpdate:
        """Return the update."""
        is_transposed, spectrum = bool(settings["is_transposed"]), tensors["spectrum"].to(context.compute_dtype)
        outputs, inputs = context.shape[::-1] if is_transposed else context.shape
        positions = first_positions(len(spectrum), outputs * inputs, int(number(settings, "seed")))
        sparse = SparseMatrix(positions // inputs, positions % inputs, spectrum)
        family, scaling = str(settings["wavelet_family"]), number(settings, "scaling")
        block = _reconstruction(sparse, outputs, inputs, wavelet_filters()[family]) if family else sparse.block

        def product(start: int, stop: int) -> torch.Tensor:
            if is_transposed:
                return (block(range(outputs), range(start, stop)) * scaling).T
            return block(range(start, stop), range(inputs)) * scaling

        return row_delta(product, (context.shape[0], context.shape[1]))


def _reconstruction(
    sparse: SparseMatrix, outputs: int, inputs: int, low_pass: list[float]
) -> Callable[[range, range], torch.Tensor]:
    """Return what computes a part of the inverse transform of a sparse (outputs, inputs) matrix."""
    import torch

    length = len(low_pass)
    down, across = Axis(outputs, length), Axis(inputs, length)
    padded = SparseMatrix(sparse.rows + down.offset, sparse.columns + across.offset, sparse.values)
    low = torch.tensor(low_pass, dtype=sparse.values.dtype)
    high = torch.tensor([(-1) ** i * low_pass[length - 1 - i] for i in range(length)], dtype=sparse.values.dtype)
    pairs = ((low, low), (high, low), (low, high), (high, high))
    filters = torch.stack([torch.outer(first, second) for first, second in pairs]).unsqueeze(1)

    def block(rows: range, columns: range) -> torch.Tensor:
        used_rows, used_columns = (
            axis.coefficients(part.start, part.stop) for axis, part in ((down, rows), (across, columns))
        )
        quarters = [
            padded.block(_shifted(used_rows, top), _shifted(used_columns, left))
            for top in (0, down.half)
            for left in (0, across.half)
        ]
        made = torch.nn.functional.conv_transpose2d(torch.stack(quarters).unsqueeze(0), filters, stride=2)[0, 0]
        return made[down.crop(rows.start, rows.stop), across.crop(columns.start, columns.stop)]

    return block


def _shifted(part: range, by: int) -> range:
    return range(part.start + by, part.stop + by)


class WaveftKind(AdapterKind):
    """WAVEFT, sparse wavelet coefficients."""

    peft_type: ClassVar[str] = "WAVEFT"
    title: ClassVar[str] = "WaveFT"
    formula: ClassVar[str] = "W + s·idwt2(E), E sparse"
    bits: ClassVar[str] = "equal; above 2^18 elements, wavelets other than db1 differ by 1e-6 of the delta"
    parts: ClassVar[Mapping[str, str]] = {"waveft_spectrum": "spectrum"}
    fields: ClassVar[KindFields] = KindFields(
        followed={
            "n_frequency": whole_number(2592, 1),
            "n_frequency_pattern": FREQUENCY_PATTERN,
            "proportional_parameters": switch(False),
            "scaling": finite_number(25.0),
            "random_loc_seed": seed_field(777),
            "use_idwt": switch(True),
            "wavelet_family": Field(
                lambda value: isinstance(value, str) and value in wavelet_filters(),
                "a wavelet that PEFT can merge, one of db1 to db10, sym2 to sym10, coif1 to coif4",
                "db1",
            ),
        },
        ignored=("init_weights",),
    )
    methods: ClassVar[Mapping[str, Method]] = {"waveft": WaveftMethod()}

    def plan(self, module: TargetModule) -> Iterable[PlannedUpdate]:
        """Yield the one update."""
        shape = matrix_of_linear(module)
        is_proportional = module.values["proportional_parameters"]
        counts = {_proportional_count(module)} if is_proportional else allowed_counts(module.values)
        count = expect_spectrum(module, counts)
        family = module.values["wavelet_family"] if module.values["use_idwt"] else ""
        settings = {**spectrum_settings(module), "wavelet_family": family}
        # all places while they are drawn, or the places used and a tile's coefficients in the shape of a convolution
        working = max(4 * prod(shape), 32 * min(prod(shape), WHOLE_ELEMENTS)) + 56 * count
        # long filters make bits depend on how many threads convolve
        reach = ROWS if family in {"", "db1"} else WHOLE
        yield PlannedUpdate("waveft", ("spectrum",), settings, reach=reach, working_bytes=working)


def _proportional_count(module: TargetModule) -> int:
    """Return the module's share of all coefficients, which is that of its size."""
    sizes = [prod(peer.base_shape) for peer in module.peers]
    budget: int = module.values["n_frequency"] * len(sizes)
    return max(1, round(prod(module.base_shape) / sum(sizes) * budget))
