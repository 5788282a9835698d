"""LoRA: W + scaling * (lora_b @ lora_a), on linear, transposed (Conv1D), embedding and convolution weights.

Source: PEFT 0.21.2 `tuners/lora/layer.py`: `Linear.get_delta_weight`, `Embedding.get_delta_weight`,
`_ConvNd.get_delta_weight` and the `merge` beside each. Order is PEFT's: product, then scaling, then the sum; the
caller rounds once.
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
from rawmerge.methods.movable import Movable

if TYPE_CHECKING:
    import torch

KIND: Final = "lora"
#: Up to this size a product is computed whole where a part of it is asked for: the bits of a low product's rows depend
#: on how it is cut.
WHOLE_ELEMENTS: Final = 2**18
PAIRS: Final = (("lora_a", "lora_b"), ("lora_embedding_a", "lora_embedding_b"))


class LoraMethod:
    """Plain LoRA and rsLoRA; the two differ in the scaling only."""

    def settings(self, shapes: Mapping[str, Shape], facts: ModuleFacts) -> Mapping[str, Setting]:
        """Return `scaling`, `is_transposed` (delta transposed) and `rounds_delta` (PEFT rounds the delta first).

        Shapes: lora_a (rank, in, *kernel), lora_b (out, rank, 1…), base (out, in, *kernel) or (in, out);
        lora_embedding_a (rank, rows), lora_embedding_b (dim, rank), base (rows, dim).
        """
        (role_a, shape_a), (role_b, shape_b) = sorted(shapes.items())
        is_embedding = role_a.startswith("lora_embedding")
        _check_dimensions(role_a, shape_a, role_b, shape_b, facts)
        _check_rank(role_a, shape_a, role_b, shape_b, facts.rank)
        delta_shape = (shape_b[0], *shape_a[1:])
        is_transposed = is_embedding or _is_transposed(delta_shape, facts)
        expected = tuple(reversed(delta_shape)) if is_transposed else delta_shape
        if expected != facts.base_shape:
            raise ShapeMismatchError(
                f"{role_b} @ {role_a}",
                f"the base's shape {list(facts.base_shape)}",
                f"a delta of {list(expected)}",
                _mismatch_hint(delta_shape, facts.base_shape),
            )
        rounds_delta = is_embedding or facts.rounds_delta
        return {"scaling": facts.scaling, "is_transposed": is_transposed, "rounds_delta": rounds_delta}

    def prepare(
        self,
        settings: Mapping[str, Setting],
        tensors: Mapping[str, torch.Tensor],
        context: TileContext,
    ) -> PreparedLora:
        """Return the pair in compute dtype, exactly upcast from its storage dtype."""
        (_, lora_a), (_, lora_b) = sorted(tensors.items())
        return PreparedLora(
            lora_a=lora_a.to(context.compute_dtype),
            lora_b=lora_b.to(context.compute_dtype),
            scaling=number(settings, "scaling"),
            is_transposed=bool(settings["is_transposed"]),
            rounding_dtype=context.rounding_dtype if settings["rounds_delta"] else None,
        )


@dataclass(frozen=True, slots=True)
class PreparedLora(Movable):
    """A LoRA pair in compute dtype.

    Attributes:
        lora_a: (rank, in, *kernel), or (rank, rows) of an embedding.
        lora_b: (out, rank, 1…), or (dim, rank) of an embedding.
        scaling: dimensionless.
        is_transposed: the delta is added transposed.
        rounding_dtype: dtype to which the delta is rounded before it is added, or None.
    """

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scaling: float
    is_transposed: bool
    rounding_dtype: torch.dtype | None

    def apply(self, tile: torch.Tensor, first_row: int, scratch: Scratch) -> None:
        """Add the delta's rows to `tile` (rows, columns), in place."""
        delta = self._delta(first_row, first_row + tile.shape[0], scratch)
        delta.mul_(self.scaling)
        tile.add_(delta if self.rounding_dtype is None else delta.to(self.rounding_dtype))

    def _delta(self, start: int, stop: int, scratch: Scratch) -> torch.Tensor:
        """Return rows `start` to `stop` of the unscaled delta, (rows, columns)."""
        if self.lora_a.dim() > 2:
            return self._convolution_delta(start, stop)
        rows, columns = self.lora_b.shape[0], self.lora_a.shape[1]
        if rows * columns <= WHOLE_ELEMENTS:
            whole = _product(self.lora_b, self.lora_a, scratch)
            return (whole.T if self.is_transposed else whole)[start:stop]
        if self.is_transposed:
            return _product(self.lora_b, self.lora_a[:, start:stop], scratch).T
        return _product(self.lora_b[start:stop], self.lora_a, scratch)

    def _convolution_delta(self, start: int, stop: int) -> torch.Tensor:
        # PEFT multiplies by convolving A with B; for small tensors its bits differ from those of a plain product
        from torch.nn import functional  # torch is not imported before a merge computes

        lora_b = self.lora_b[start:stop]
        if self.lora_a.shape[2:] == (1, 1):
            return lora_b.flatten(1) @ self.lora_a.flatten(1)
        convolve = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}[self.lora_a.dim()]
        return convolve(self.lora_a.transpose(0, 1), lora_b).transpose(0, 1).flatten(1)


def _product(lora_b: torch.Tensor, lora_a: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    import torch

    delta = scratch.tensor("delta", (lora_b.shape[0], lora_a.shape[1]), lora_a.dtype)
    return torch.mm(lora_b, lora_a, out=delta)


def check_gathered(role: str, shape: Shape) -> None:
    """Refuse a factor that is no matrix.

    Raises:
        ShapeMismatchError: it is empty, or has one dimension or none.
    """
    if 0 in shape or len(shape) < 2:
        hint = "an empty or flat factor comes from a ZeRO-3 or FSDP save that was not gathered; save it again"
        raise ShapeMismatchError(role, "a matrix", f"shape {list(shape)}", hint)


def _check_dimensions(role_a: str, shape_a: Shape, role_b: str, shape_b: Shape, facts: ModuleFacts) -> None:
    check_gathered(role_a, shape_a)
    check_gathered(role_b, shape_b)
    dimensions = len(facts.base_shape)
    if len(shape_a) != dimensions or not 2 <= dimensions <= 5:
        expected = f"{dimensions} dimensions like the base's {list(facts.base_shape)}"
        raise ShapeMismatchError(role_a, expected, f"shape {list(shape_a)}")
    if len(shape_b) != dimensions or set(shape_b[2:]) - {1}:
        expected = f"(out, rank{', 1' * (dimensions - 2)})"
        raise ShapeMismatchError(role_b, expected, f"shape {list(shape_b)}")


def _check_rank(role_a: str, shape_a: Shape, role_b: str, shape_b: Shape, rank: int) -> None:
    if shape_a[0] != shape_b[1]:
        hint = "A and B come from different adapters, or one is transposed"
        raise ShapeMismatchError(role_b, f"rank {shape_a[0]} like {role_a}", f"rank {shape_b[1]}", hint)
    if shape_a[0] != rank:
        hint = "adapter_config.json belongs to another adapter, or its rank_pattern is wrong"
        raise ShapeMismatchError(role_a, f"rank {rank} as the config says", f"rank {shape_a[0]}", hint)


def _is_transposed(delta_shape: Shape, facts: ModuleFacts) -> bool:
    if len(delta_shape) != 2 or delta_shape[0] != delta_shape[1]:
        return len(delta_shape) == 2 and delta_shape[::-1] == facts.base_shape
    if facts.square_is_transposed is None:
        hint = "a square weight does not show its layout; a config.json with transformers' model_type would tell it"
        raise ShapeMismatchError("lora_b @ lora_a", "a known layout, (out, in) or (in, out)", "either", hint)
    return facts.square_is_transposed


def _mismatch_hint(delta_shape: Shape, base_shape: Shape) -> str:
    if len(delta_shape) > 2 and delta_shape[1] != base_shape[1] and delta_shape[2:] == base_shape[2:]:
        return "a convolution with groups cannot take a LoRA delta in its weight"
    return "is this the base the adapter was trained on?"
