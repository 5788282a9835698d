"""BD-LoRA: LoRA of which one factor is block diagonal, stored as its blocks one below the other.

The delta is W + s * B @ A of the full factors, rounded to the base's dtype first where PEFT's bits are wanted.

Source: PEFT 0.21.2 `tuners/lora/variants.py` `BdLoraLinearVariant`, `BlockDiagonalLinear`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from rawmerge.methods.interface import (
    PlannedUpdate,
    Setting,
    Shape,
    TargetModule,
    TileContext,
    UnmergeableError,
    number,
)
from rawmerge.methods.lora import PreparedLora

if TYPE_CHECKING:
    import torch

KIND: Final = "bdlora"


class BdLoraMethod:
    """The delta of a pair with blocks."""

    def prepare(
        self,
        settings: Mapping[str, Setting],
        tensors: Mapping[str, torch.Tensor],
        context: TileContext,
    ) -> PreparedLora:
        """Return the update, the blocks spread over a full factor."""
        own = {role: tensor.to(context.compute_dtype) for role, tensor in tensors.items()}
        blocks = str(settings["blocks"])
        own[blocks] = _block_diagonal(own[blocks], int(number(settings, "count")))
        return PreparedLora(
            lora_a=own["lora_a"],
            lora_b=own["lora_b"],
            scaling=number(settings, "scaling"),
            is_transposed=bool(settings["is_transposed"]),
            rounding_dtype=context.rounding_dtype,
        )


def _block_diagonal(stacked: torch.Tensor, count: int) -> torch.Tensor:
    """Return (rows, columns * count) of `count` blocks that lie one below the other in (rows, columns)."""
    rows, columns = stacked.shape
    full = stacked.new_zeros(rows, columns * count)
    for place, block in enumerate(stacked.chunk(count)):
        first = place * len(block)
        full[first : first + len(block), place * columns : (place + 1) * columns] = block
    return full


def block_role(path: str, values: Mapping[str, Any]) -> str:
    """Return which factor of a module is block diagonal, `lora_a` or `lora_b`; empty for none.

    Raises:
        UnmergeableError: the config says both, or neither where it must say one.
    """
    table = values["use_bdlora"]
    lists = {"lora_a": table.get("target_modules_bd_a"), "lora_b": table.get("target_modules_bd_b")}
    named = [role for role, patterns in lists.items() if any(pattern in path for pattern in patterns or ())]
    if len(named) > 1 or (not named and table.get("match_strict", True)):
        expected = "use_bdlora to name the module in one of target_modules_bd_a and target_modules_bd_b"
        raise UnmergeableError(expected, "in both" if named else "in none, with match_strict")
    return named[0] if named else ""


def block_count(values: Mapping[str, Any]) -> int:
    """Return how many blocks a factor has."""
    return int(values["use_bdlora"].get("nblocks", 1))


def full_shapes(module: TargetModule, shapes: Mapping[str, Shape]) -> Mapping[str, Shape]:
    """Return the shapes of a pair's full factors, given those of the stored ones.

    Raises:
        ShapeMismatchError: a factor cannot be cut into as many blocks.
        UnmergeableError: as `block_role`; PEFT does not train BD-LoRA on such a module.
    """
    role, count = block_role(module.path, module.values), block_count(module.values)
    if not role:
        return shapes
    if role not in shapes or len(module.base_shape) != 2:
        expected = "a linear weight, for BD-LoRA is of nothing else"
        raise UnmergeableError(expected, f"an embedding or convolution of shape {list(module.base_shape)}")
    shape = shapes[role]
    if len(shape) != 2 or 0 in shape or shape[0] % count:
        module.refuse(role, f"{count} blocks of the same height, one below the other", f"shape {list(shape)}")
    return {**shapes, role: (shape[0], shape[1] * count)}


def delta_shape(shape_a: Shape, shape_b: Shape, values: Mapping[str, Any]) -> Shape:
    """Return (out, in) of a stored pair's delta, -1 for what depends on which factor has blocks."""
    if shape_a[0] != shape_b[1] and shape_a[0] == shape_b[1] * block_count(values):
        return shape_b[0], shape_a[1]  # B is cut along the rank
    return shape_b[0], -1


def plan_bdlora(
    module: TargetModule, roles: tuple[str, ...], settings: Mapping[str, Setting]
) -> Iterator[PlannedUpdate]:
    """Yield the update of a module, given the roles and settings of its full pair.

    Raises:
        UnmergeableError: PEFT does not train BD-LoRA on such a module.
    """
    role, count = block_role(module.path, module.values), block_count(module.values)
    if settings["is_transposed"]:
        raise UnmergeableError("a weight stored (out, in)", "one stored (in, out)", "PEFT has no BD-LoRA of Conv1D")
    if role == "lora_b" and "lora_b_bias" in module.shapes:
        raise UnmergeableError("no bias beside a block diagonal lora_B", "one", "PEFT does not train it")
    own = {name: settings[name] for name in ("scaling", "is_transposed")}
    full = module.shapes[role][0] * module.shapes[role][1] * count
    yield PlannedUpdate(KIND, roles, {**own, "blocks": role, "count": count}, working_bytes=8 * full)
