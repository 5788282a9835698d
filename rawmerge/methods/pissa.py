"""PiSSA and OLoRA as they are trained: the base without the part of it that the pair began as.

PEFT repeats this when it loads such an adapter: W becomes (W - s * B0 @ A0), rounded to the base's dtype, where B0 and
A0 come from W itself: PiSSA's from its highest singular values, OLoRA's from its QR decomposition. The pair is added
to that as it always is. Adapters that PEFT has converted to plain LoRA say so in their config.

The residual is what training saw: it is computed in float32 and rounded to the base's dtype whatever the merge
computes in and writes, and only the pair's own delta follows float64 or another output dtype.

Source: PEFT 0.21.2 `tuners/lora/layer.py` `LoraLayer.pissa_init`, `olora_init`.
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

if TYPE_CHECKING:
    import torch

PISSA: Final = "pissa"
OLORA: Final = "olora"


class PissaMethod:
    """The base without its highest singular values' part."""

    def prepare(
        self,
        settings: Mapping[str, Setting],
        tensors: Mapping[str, torch.Tensor],  # noqa: ARG002  # a Method
        context: TileContext,
    ) -> PreparedUpdate:
        """Return the update that puts the residual in the base's place."""
        import torch

        rank, scaling = int(number(settings, "rank")), number(settings, "scaling")
        stored = context.whole().to(torch.float32)
        weight = stored.T if settings["is_transposed"] else stored
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        roots = torch.diag(torch.sqrt(values[:rank] / scaling))
        lora_a, lora_b = roots @ right[:rank], left[:, :rank] @ roots
        residual = (weight - scaling * lora_b @ lora_a).to(context.base_dtype)
        return whole_result(residual.T if settings["is_transposed"] else residual)


class OloraMethod:
    """The base without the first part of its QR decomposition."""

    def prepare(
        self,
        settings: Mapping[str, Setting],
        tensors: Mapping[str, torch.Tensor],  # noqa: ARG002  # a Method
        context: TileContext,
    ) -> PreparedUpdate:
        """Return the update that puts the residual in the base's place."""
        import torch

        rank, scaling = int(number(settings, "rank")), number(settings, "scaling")
        weight = context.whole().to(torch.float32)
        left, right = torch.linalg.qr(weight)
        lora_a, lora_b = right[:rank].contiguous(), left[:, :rank].contiguous()
        return whole_result((weight - scaling * lora_b @ lora_a).to(context.base_dtype))


def plan_residual(module: TargetModule, init: str) -> Iterator[PlannedUpdate]:
    """Yield what the initialisation did to the module's weight, to be done before the pair is added.

    Args:
        module: the module.
        init: `PISSA` or `OLORA`.

    Raises:
        UnmergeableError: PEFT does not initialise such a module so, or the decomposition has no such part.
    """
    if module.is_embedding or module.is_stored_whole:
        return  # PEFT leaves embeddings alone; what an adapter stores whole is the residual itself
    _check_trained(module, init)
    is_transposed = module.needs_transpose
    if init == OLORA and is_transposed and module.base_shape[0] != module.base_shape[1]:
        hint = "PEFT decomposes Conv1D's weight as it is stored, so its pair does not fit unless that is square"
        raise UnmergeableError("a weight stored (out, in)", f"one stored (in, out), {list(module.base_shape)}", hint)
    settings: dict[str, Setting] = {"rank": module.rank, "scaling": module.scaling}
    if init == PISSA:
        settings["is_transposed"] = is_transposed
    yield PlannedUpdate(init, (), settings, reach=WHOLE, working_bytes=decomposition_bytes(*module.base_shape))


def _check_trained(module: TargetModule, init: str) -> None:
    shape = module.base_shape
    if len(shape) != 2:
        raise UnmergeableError(f"a linear weight, for {init} is of nothing else", f"one of shape {list(shape)}")
    if module.base_dtype == "F64":
        raise UnmergeableError(f"a base of float32 or less, for {init} is of nothing else", "float64")
    if module.rank > min(shape):
        raise UnmergeableError(f"a rank of at most {min(shape)}, for {init} decomposes the weight", f"{module.rank}")
    if module.scaling <= 0:
        raise UnmergeableError(f"a scaling above 0, for {init} divides by it", f"{module.scaling}")
