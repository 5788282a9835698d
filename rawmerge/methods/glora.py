"""GLoRA: W + (W * A + B), and for the bias b + (b * D + E + W @ C), each a matrix, a vector, one number or nothing.

Source: PEFT 0.21.2 `tuners/glora/layer.py`: the paths' `forward`, `GloraLayer.update_layer` and `merge`. Paths are
multiplied in float32, and everything else in the base's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeAlias

from rawmerge.errors import MergeError
from rawmerge.formats.kind_fields import KindFields, one_of, whole_number
from rawmerge.methods.delta import PreparedChange, row_delta, upcast
from rawmerge.methods.interface import (
    BASE_WEIGHT,
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
from rawmerge.methods.randomness import matrix_of_linear

if TYPE_CHECKING:
    import torch

    #: Rows of a path: given first and last, (rows, columns), (rows, 1) or one number.
    _Rows: TypeAlias = Callable[[int, int], torch.Tensor]

_ENDS: Final = ("Xd", "Xu", "X", "zeros")


class GloraWeightMethod:
    """The weight's update."""

    def prepare(
        self,
        settings: Mapping[str, Setting],  # noqa: ARG002  # a Method
        tensors: Mapping[str, torch.Tensor],
        context: TileContext,
    ) -> PreparedUpdate:
        """Return the update.

        Raises:
            MergeError: a path that is switched off holds something.
        """
        _check_zeros(tensors)
        own, dtype = upcast(tensors, context), context.rounding_dtype or context.compute_dtype
        scale, shift = (_rows_of(own, path, (context.shape[0], context.shape[1])) for path in "AB")

        def change(tile: torch.Tensor, first: int) -> torch.Tensor:
            stop = first + len(tile)
            # in float32 with a rounding after each step, as arithmetic in low dtypes is done
            scaled = tile.mul(scale(first, stop).to(dtype)).to(dtype)
            return tile + (scaled + shift(first, stop).to(dtype))

        return PreparedChange(change)


class GloraBiasMethod:
    """The bias's update."""

    def prepare(
        self,
        settings: Mapping[str, Setting],  # noqa: ARG002  # a Method
        tensors: Mapping[str, torch.Tensor],
        context: TileContext,
    ) -> PreparedUpdate:
        """Return the update; the weight is multiplied in the dtype in which PEFT does it."""
        own, dtype = upcast(tensors, context), context.rounding_dtype or context.compute_dtype
        scale, shift = (own[role].to(dtype).view(-1, 1) if (role := f"{path}.X") in own else None for path in "DE")
        product = None
        if BASE_WEIGHT in tensors:
            factor = own["C.X"] if "C.X" in own else own["C.Xd"] @ own["C.Xu"]
            product = tensors[BASE_WEIGHT].to(dtype) @ factor.to(dtype)

        def change(tile: torch.Tensor, first: int) -> torch.Tensor:
            before = tile.to(dtype)
            total = before * (0.0 if scale is None else _part(scale, first, len(tile)))
            for term in (shift, product):
                total = total if term is None else total + _part(term, first, len(tile))
            return before + total

        return PreparedChange(change)


def _check_zeros(tensors: Mapping[str, torch.Tensor]) -> None:
    for role, tensor in tensors.items():
        if role.endswith("zeros") and bool(tensor.any()):
            raise MergeError(f"'glora_{role}': expected zeros, for the config switches this path off, found others")


def _rows_of(own: Mapping[str, torch.Tensor], path: str, shape: tuple[int, int]) -> _Rows:
    """Return what yields rows of a path of the weight, in compute dtype."""
    if f"{path}.Xd" in own:
        left, right = own[f"{path}.Xd"], own[f"{path}.Xu"]
        return row_delta(lambda start, stop: left[start:stop] @ right, shape).rows
    whole = own[f"{path}.X"] if f"{path}.X" in own else own[f"{path}.zeros"].new_zeros(1)
    column = whole.view(-1, 1)
    return lambda start, stop: _part(column, start, stop - start)


def _part(column: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """Return (count, 1) of a column of numbers, or the one number that it is."""
    return column if len(column) == 1 else column[first : first + count]


class GloraKind(AdapterKind):
    """GLORA, generalised LoRA."""

    peft_type: ClassVar[str] = "GLORA"
    title: ClassVar[str] = "GLoRA"
    formula: ClassVar[str] = "W + W*A + B; the bias b + b*D + E + W@C"
    modules: ClassVar[str] = "Linear"
    bits: ClassVar[str] = "equal; with C in float32 ≤ 2⁻²¹: W@C depends on where PEFT's W lies in memory"
    parts: ClassVar[Mapping[str, str]] = {f"glora_{path}.{end}": f"{path}.{end}" for path in "ABCDE" for end in _ENDS}
    fields: ClassVar[KindFields] = KindFields(
        followed={
            "r": whole_number(8, 1),
            "config_A_B": one_of("lora", "vector", "constant", "none"),
            "config_C": one_of("lora", "vector", "none"),
            "config_D_E": one_of("constant", "vector", "none"),
        },
        ignored=("init_weights",),
    )
    methods: ClassVar[Mapping[str, Method]] = {"glora": GloraWeightMethod(), "glora_bias": GloraBiasMethod()}

    def delta_shape(self, shapes: Mapping[str, Shape], values: Mapping[str, Any]) -> Shape | None:  # noqa: ARG002
        """Return (out, in), as far as the paths of the weight tell."""
        left, right, vector, zeros = (shapes.get(f"A.{end}", ()) for end in _ENDS)
        if len(zeros) == 2:
            return zeros
        if len(left) == len(right) == 2:
            return (left[0], right[1])
        return (vector[0], -1) if len(vector) == 2 else None

    def plan(self, module: TargetModule) -> Iterable[PlannedUpdate]:
        """Yield the weight's update, which also checks that what is switched off is zero, and the bias's."""
        module.refuse_transposed()
        rows, columns = matrix_of_linear(module)
        paths = dict(_paths(module))
        for path, shapes in paths.items():
            for end, shape in shapes.items():
                module.expect(f"{path}.{end}", *shape)
        roles = [f"{path}.{end}" for path, shapes in paths.items() for end in shapes]
        own = [role for role in roles if role[0] in "AB" or role.endswith("zeros")]
        rank = module.values["r"]
        yield PlannedUpdate("glora", tuple(own), working_bytes=8 * rank * (rows + columns))
        beside = [role for role in roles if role not in own]
        if not beside:
            return
        working = 0
        if any(role.startswith("C") for role in beside):
            if module.is_stored_whole:
                hint = "C multiplies the weight that the adapter stores, too"
                raise UnmergeableError("a weight that is the base's own", "one that the adapter stores", hint)
            beside.append(BASE_WEIGHT)
            working = 4 * 3 * prod(module.base_shape)
        yield PlannedUpdate("glora_bias", tuple(beside), parameter="bias", working_bytes=working)


def _paths(module: TargetModule) -> Iterator[tuple[str, dict[str, Shape]]]:
    """Yield each path with the shapes that its tensors must have."""
    rank, (rows, columns), values = module.values["r"], module.matrix_shape, module.values
    for path in "AB":
        yield path, _shapes_of(values["config_A_B"], rank, (rows, columns), (rows, 1))
    has_bias = module.bias_shape is not None
    yield "C", _shapes_of(values["config_C"] if has_bias else "none", rank, (columns, 1), (columns, 1))
    for path in "DE":
        yield path, _shapes_of(values["config_D_E"] if has_bias else "none", rank, (rows,), (rows,))


def _shapes_of(way: str, rank: int, whole: Shape, vector: Shape) -> dict[str, Shape]:
    """Return end of name to shape of a path: as a matrix it has the shape `whole`."""
    if way == "lora":
        return {"Xd": (whole[0], rank), "Xu": (rank, whole[1])}
    return {"X": vector} if way == "vector" else {"X": (1,)} if way == "constant" else {"zeros": whole}
