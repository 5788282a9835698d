"""LoRA on fused experts, a parameter of three dimensions: W[e] + scaling * (lora_b[e] @ lora_a[e]), for each expert.

Source: PEFT 0.21.2 `tuners/lora/layer.py`: `ParamWrapper.get_delta_weight` and `ParamWrapper.merge`. Order is PEFT's:
product, then scaling, then the delta rounded to the base's dtype, then the sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from rawmerge.methods.interface import (
    ModuleFacts,
    Scratch,
    Setting,
    Shape,
    ShapeMismatchError,
    TileContext,
    number,
)
from rawmerge.methods.lora import WHOLE_ELEMENTS, check_gathered
from rawmerge.methods.movable import Movable

if TYPE_CHECKING:
    import torch

KIND: Final = "expert_lora"
#: torch's batched product of matrices with fewer multiplications than this has a kernel of its own (no FMA).
_NAIVE_BELOW: Final = 400
#: float32 elements in a cache line: where in a line an expert's matrix begins changes bits of low products.
_LINE_ELEMENTS: Final = 16


class ExpertLoraMethod:
    """PEFT's `target_parameters` on one tensor of all experts, or on the tensor of one."""

    def settings(self, shapes: Mapping[str, Shape], facts: ModuleFacts) -> Mapping[str, Setting]:
        """Return what `prepare` needs for all experts; for one of them, set `expert` to its number.

        Shapes: lora_a (experts * rank, X), lora_b (Y, rank * experts), base (experts, d1, d2). The delta of an
        expert is lora_b[e] @ lora_a[e] where (Y, X) is (d1, d2), and its transpose where it is (d2, d1).

        The settings are `scaling`, `experts`, `rank`, `expert` (-1 for all), `is_transposed`, and
        `grouped_by_expert`: whether lora_b's columns are ordered by expert, then rank (as older releases of Unsloth
        wrote them) instead of PEFT's rank, then expert.
        """
        shape_a, shape_b = shapes["lora_a"], shapes["lora_b"]
        for role in ("lora_a", "lora_b"):
            check_gathered(role, shapes[role])
            if len(shapes[role]) > 2:
                raise ShapeMismatchError(role, "a matrix", f"shape {list(shapes[role])}")
        if len(facts.base_shape) != 3:
            expected = "a base of three dimensions, (experts, rows, columns)"
            raise ShapeMismatchError("lora_b @ lora_a", expected, f"shape {list(facts.base_shape)}")
        experts = facts.base_shape[0]
        _check_rank(shape_a, shape_b, experts, facts.rank)
        return {
            "scaling": facts.scaling,
            "experts": experts,
            "rank": facts.rank,
            "expert": -1,
            "is_transposed": _is_transposed((shape_b[0], shape_a[1]), facts),
            "grouped_by_expert": False,
        }

    def prepare(
        self,
        settings: Mapping[str, Setting],
        tensors: Mapping[str, torch.Tensor],
        context: TileContext,
    ) -> PreparedExperts:
        """Return each expert's pair in compute dtype, exactly upcast from its storage dtype.

        Tensors: lora_b always holds all experts, (Y, rank * experts); lora_a does, (experts * rank, X), unless the
        setting `expert` names one: then it is that expert's rows, (rank, X).
        """
        experts, rank, expert = (int(number(settings, name)) for name in ("experts", "rank", "expert"))
        lora_a, lora_b = tensors["lora_a"].to(context.compute_dtype), tensors["lora_b"]
        if expert >= 0:
            lora_a = _moved(lora_a, expert * lora_a.numel())
        is_grouped = bool(settings["grouped_by_expert"])
        split_b = lora_b.view(len(lora_b), *((experts, rank) if is_grouped else (rank, experts)))
        b_of_experts = split_b.unbind(1 if is_grouped else 2)[max(expert, 0) :]
        a_of_experts = lora_a.view(-1, rank, lora_a.shape[1]).unbind()
        is_transposed = bool(settings["is_transposed"])
        return PreparedExperts(
            # a single expert's A comes with the columns of it and of all that follow
            factors=tuple(_factors(*pair, is_transposed) for pair in zip(a_of_experts, b_of_experts, strict=False)),
            first_expert=max(expert, 0),
            is_batched=experts > 1,
            scaling=number(settings, "scaling"),
            rounding_dtype=context.rounding_dtype,
        )


@dataclass(frozen=True, slots=True)
class PreparedExperts(Movable):
    """The pairs of one expert or of all, in compute dtype, as factors of a delta that lies as the base does.

    Attributes:
        factors: for each expert, left (d1, rank) and right (rank, d2).
        first_expert: number of the first of them.
        is_batched: whether PEFT computes them with torch.einsum, which it does for more than one expert.
        scaling: dimensionless.
        rounding_dtype: dtype to which the delta is rounded before it is added, or None.
    """

    factors: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    first_expert: int
    is_batched: bool
    scaling: float
    rounding_dtype: torch.dtype | None

    def apply(self, tile: torch.Tensor, first_row: int, scratch: Scratch) -> None:
        """Add the delta's rows to `tile` (rows, d2), in place; rows are those of (experts * d1, d2).

        Raises:
            ValueError: the tile holds rows of two experts.
        """
        height = self.factors[0][0].shape[0]
        place, start = divmod(first_row, height)
        if start + tile.shape[0] > height:
            raise ValueError(f"a tile of {tile.shape[0]} rows from {first_row} on crosses experts of {height} rows")
        delta = self._delta(place, start, start + tile.shape[0], scratch)
        delta.mul_(self.scaling)
        tile.add_(delta if self.rounding_dtype is None else delta.to(self.rounding_dtype))

    def _delta(self, place: int, start: int, stop: int, scratch: Scratch) -> torch.Tensor:
        """Return rows `start` to `stop` of one expert's unscaled delta, (rows, d2)."""
        import torch

        left, right = self.factors[place]
        rows, columns = left.shape[0], right.shape[1]
        if rows * columns > WHOLE_ELEMENTS:
            delta = scratch.tensor("delta", (stop - start, columns), right.dtype)
            return torch.mm(left[start:stop], right, out=delta)
        # low products have einsum's bits only as the same call on memory that lies the same way in its cache lines
        skipped = (self.first_expert + place) * rows * columns % _LINE_ELEMENTS
        memory = scratch.tensor("delta", (1, skipped + rows * columns), right.dtype)
        whole = memory[0, skipped:].view(rows, columns)
        if self.is_batched and rows * columns * left.shape[1] < _NAIVE_BELOW:
            torch.bmm(left[None], right[None], out=whole[None])
        else:
            torch.mm(left, right, out=whole)
        return whole[start:stop]


def _factors(lora_a: torch.Tensor, lora_b: torch.Tensor, is_transposed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return left and right factor of one expert's delta, from lora_a (rank, X) and the strided lora_b (Y, rank).

    The copy of lora_b is laid out as torch.einsum lays out its own: by rows of the factor that it is.
    """
    if is_transposed:
        return lora_a.T, lora_b.T.to(lora_a.dtype).contiguous()
    return lora_b.to(lora_a.dtype).contiguous(), lora_a


def _moved(matrix: torch.Tensor, first_element: int) -> torch.Tensor:
    """Return a matrix at the place in its cache line that it has as a part of a tensor, from `first_element` on."""
    skipped = first_element % _LINE_ELEMENTS
    if skipped == 0:
        return matrix
    return matrix.new_empty(skipped + matrix.numel())[skipped:].view(matrix.shape).copy_(matrix)


def _check_rank(shape_a: Shape, shape_b: Shape, experts: int, rank: int) -> None:
    if shape_a[0] != shape_b[1]:
        hint = "A and B come from different adapters, or one is transposed"
        raise ShapeMismatchError("lora_b", f"{shape_a[0]} columns like lora_a's rows", f"{shape_b[1]}", hint)
    if experts == 0 or shape_a[0] % experts:
        hint = "is this the base the adapter was trained on?"
        raise ShapeMismatchError("lora_a", f"rows for each of the base's {experts} experts", f"{shape_a[0]} rows", hint)
    if shape_a[0] // experts != rank:
        expected = f"rank {rank} as the config says"
        hint = "adapter_config.json belongs to another adapter, or its rank_pattern is wrong"
        raise ShapeMismatchError("lora_a", expected, f"rank {shape_a[0] // experts} for {experts} experts", hint)


def _is_transposed(product: Shape, facts: ModuleFacts) -> bool:
    """Return whether the delta of an expert is the transpose of `product`, the shape of lora_b[e] @ lora_a[e]."""
    experts, *expert_shape = facts.base_shape
    is_square = product[0] == product[1]
    fits = {False: list(product) == expert_shape, True: list(product[::-1]) == expert_shape}
    if experts == 1:  # PEFT adds the product of a plain pair
        fits[True] = is_square = False
    if not any(fits.values()):
        expected = f"the base's shape {list(facts.base_shape)}"
        found = f"a delta of {[experts, *product]}, or that of its transposes"
        raise ShapeMismatchError("lora_b @ lora_a", expected, found, "is this the base the adapter was trained on?")
    if not is_square:
        return fits[True]
    if facts.square_is_transposed is None:
        expected = "a known orientation of the experts' square matrices, (out, in) or (in, out)"
        hint = "adapter_config.json has no peft_version, and PEFT's versions differ; state the one that trained it"
        raise ShapeMismatchError("lora_b @ lora_a", expected, "either, which is undecidable", hint)
    return facts.square_is_transposed
