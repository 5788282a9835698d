"""HRA: inputs reflected by a chain of Householder reflections, W' = W @ (I - 2 u u.T) @ ...

Source: PEFT 0.21.2 `tuners/hra/layer.py`: `HRALinear.get_delta_weight` and `merge`, the same of `HRAConv2d`.
The chain is made as a matrix first, as PEFT does, for its roundings are part of the result's bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final

from rawmerge.formats.kind_fields import KindFields, switch, whole_number
from rawmerge.methods.delta import PreparedChange, upcast
from rawmerge.methods.interface import (
    AdapterKind,
    Method,
    PlannedUpdate,
    PreparedUpdate,
    Setting,
    Shape,
    TargetModule,
    TileContext,
    UnmergeableError,
)

if TYPE_CHECKING:
    import torch

#: Rows of the chain that are reflected at a time, so that the product of two vectors is never as large as the chain.
_ROWS: Final = 1024


class HraMethod:
    """The reflections of one module."""

    def prepare(
        self, settings: Mapping[str, Setting], tensors: Mapping[str, torch.Tensor], context: TileContext
    ) -> PreparedUpdate:
        """Return the update; the one tensor is (in, reflections)."""
        (vectors,) = upcast(tensors, context).values()
        matrix = _orthogonalised(vectors) if settings["is_orthogonalised"] else _chain(vectors)
        return PreparedChange(partial(_reflected, matrix))


def _reflected(matrix: torch.Tensor, tile: torch.Tensor, first: int) -> torch.Tensor:  # noqa: ARG001  # all rows alike
    return tile @ matrix


def _chain(vectors: torch.Tensor) -> torch.Tensor:
    """Return the product of the reflections, first to last, (in, in)."""
    import torch

    units = vectors / vectors.norm(dim=0)
    matrix = torch.eye(len(vectors), dtype=vectors.dtype)
    for index in range(units.shape[1]):
        unit = units[:, index].view(-1, 1)
        along = matrix @ unit * 2  # 2 * matrix @ unit, for doubling is exact
        for first in range(0, len(matrix), _ROWS):
            matrix[first : first + _ROWS].sub_(along[first : first + _ROWS] @ unit.t())
    return matrix


def _orthogonalised(vectors: torch.Tensor) -> torch.Tensor:
    """Return the reflection on the complement of the vectors' span, by Gram and Schmidt, (in, in)."""
    import torch

    units = [(vectors[:, 0] / vectors[:, 0].norm()).view(-1, 1)]
    for index in range(1, vectors.shape[1]):
        rest = vectors[:, index].view(-1, 1)
        for unit in units:
            rest = rest - (unit.t() @ rest) * unit
        units.append((rest / rest.norm()).view(-1, 1))
    basis = torch.cat(units, dim=1)
    return torch.eye(len(vectors), dtype=vectors.dtype).sub_(2 * basis @ basis.t())


class HraKind(AdapterKind):
    """HRA, Householder reflection adaptation."""

    peft_type: ClassVar[str] = "HRA"
    title: ClassVar[str] = "HRA"
    formula: ClassVar[str] = "W @ product of (I - 2uuᵀ)"
    modules: ClassVar[str] = "Linear, Conv2d"
    parts: ClassVar[Mapping[str, str]] = {"hra_u": "u"}
    fields: ClassVar[KindFields] = KindFields(
        followed={"r": whole_number(8, 1), "apply_GS": switch(False)}, ignored=("init_weights",)
    )
    methods: ClassVar[Mapping[str, Method]] = {"hra": HraMethod()}

    def delta_shape(self, shapes: Mapping[str, Shape], values: Mapping[str, Any]) -> Shape | None:  # noqa: ARG002
        """Return (-1, in); of convolutions (-1, in * kernel)."""
        shape = shapes.get("u", ())
        return (-1, shape[0]) if len(shape) == 2 else None

    def plan(self, module: TargetModule) -> Iterable[PlannedUpdate]:
        """Yield the one update."""
        module.refuse_transposed()
        if len(module.base_shape) not in {2, 4}:
            raise UnmergeableError("a linear or two-dimensional convolution weight", f"shape {list(module.base_shape)}")
        columns, rank = module.matrix_shape[1], module.values["r"]
        module.expect("u", columns, rank)
        # the matrix and a product as large, or some of its rows; and copies of the vectors
        working = 4 * (2 * columns * columns + 4 * columns * rank)
        yield PlannedUpdate("hra", ("u",), {"is_orthogonalised": module.values["apply_GS"]}, working_bytes=working)
