"""KaSA: the base without its r lowest singular values, plus s * (B * diag) @ A, each rounded to the base's dtype.

The truncated base is what training saw: it is computed in float32 and rounded to the base's dtype whatever the merge
computes in and writes; the delta is rounded first only where PEFT's bits are wanted.

Source: PEFT 0.21.2 `tuners/lora/variants.py` `KasaLinearVariant`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final

from rawmerge.methods.delta import decomposition_bytes, whole_result
from rawmerge.methods.interface import (
    WHOLE,
    PlannedUpdate,
    PreparedUpdate,
    Setting,
    TargetModule,
    TileContext,
    UnmergeableError,
    number,
)
from rawmerge.methods.lora import PreparedLora

if TYPE_CHECKING:
    import torch

KIND: Final = "kasa"
TRUNCATION: Final = "kasa_truncation"
DIAGONAL: Final = "diagonal"


class KasaTruncationMethod:
    """The base without its lowest singular values."""

    def prepare(
        self,
        settings: Mapping[str, Setting],
        tensors: Mapping[str, torch.Tensor],  # noqa: ARG002  # a Method
        context: TileContext,
    ) -> PreparedUpdate:
        """Return the update that puts the truncated weight in the base's place."""
        import torch

        left, values, right = torch.linalg.svd(context.whole().to(torch.float32), full_matrices=False)
        kept = len(values) - int(number(settings, "rank"))
        return whole_result(((left[:, :kept] * values[:kept]) @ right[:kept]).to(context.base_dtype))


class KasaMethod:
    """The delta of three factors."""

    def prepare(
        self,
        settings: Mapping[str, Setting],
        tensors: Mapping[str, torch.Tensor],
        context: TileContext,
    ) -> PreparedLora:
        """Return the update, the diagonal multiplied into B."""
        own = {role: tensor.to(context.compute_dtype) for role, tensor in tensors.items()}
        return PreparedLora(
            lora_a=own["lora_a"],
            lora_b=own["lora_b"] * own[DIAGONAL],
            scaling=number(settings, "scaling"),
            is_transposed=False,
            rounding_dtype=context.rounding_dtype,
        )


def plan_kasa(module: TargetModule, roles: tuple[str, ...], settings: Mapping[str, Setting]) -> Iterator[PlannedUpdate]:
    """Yield the truncation and the delta of a module, given the roles and settings of its pair.

    Raises:
        MissingTensorError, ShapeMismatchError: there is no diagonal, or none of the rank.
        UnmergeableError: PEFT does not train KaSA on such a module.
    """
    shape, rank = module.base_shape, module.rank
    if module.is_embedding or len(shape) != 2 or settings["is_transposed"]:
        expected = "a linear weight stored (out, in), for KaSA is of nothing else"
        raise UnmergeableError(expected, f"an embedding, a convolution or Conv1D of shape {list(shape)}")
    if rank >= min(shape):
        raise UnmergeableError(f"a rank below {min(shape)}, for KaSA drops as many singular values", f"{rank}")
    module.expect(DIAGONAL, rank)
    if not module.is_stored_whole:  # what an adapter stores whole is truncated already
        yield PlannedUpdate(TRUNCATION, (), {"rank": rank}, reach=WHOLE, working_bytes=decomposition_bytes(*shape))
    factors = module.shapes["lora_b"]
    yield PlannedUpdate(
        KIND, (*roles, DIAGONAL), {"scaling": settings["scaling"]}, working_bytes=4 * factors[0] * factors[1]
    )
