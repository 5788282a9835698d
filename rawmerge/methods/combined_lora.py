"""One LoRA made of several, factor by factor: W + lora_b @ lora_a, of factors that are combined first.

Source: PEFT 0.21.2 `tuners/lora/model.py`: `add_weighted_adapter` with the types `cat`, `linear`, `ties` and
`magnitude_prune`, and the functions of `utils/merge_utils.py` that it calls with factors; the result is merged as any
LoRA. `cat` fills a new adapter of the base's dtype, which rounds the factors; the others take its place.
PEFT's scaling of the new adapter is 1, but √rank where the first adapter has `use_rslora`, whose field it inherits:
that is a fault, and not repeated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from rawmerge.methods.interface import Setting, TileContext, number
from rawmerge.methods.lora import PreparedLora

if TYPE_CHECKING:
    import torch

#: What plans call it.
KIND: Final = "combined_lora"
#: Types that PEFT calls so behind `peft-`.
CAT: Final = "peft-cat"
_PRUNING: Final = ("peft-ties", "peft-magnitude")
_TIES: Final = "peft-ties"


class CombinedLoraMethod:
    """Pairs `0/lora_a`, `0/lora_b`, `1/lora_a` and so on; settings `0/weight` and `0/scaling` of each.

    Other settings: `combine` (`peft-cat`, `peft-linear`, `peft-ties` or `peft-magnitude`), `density`, `majority_sign`,
    `rank` of the result (of `peft-cat` only), and `is_transposed` and `rounds_delta` as of any pair.
    """

    def prepare(
        self, settings: Mapping[str, Setting], tensors: Mapping[str, torch.Tensor], context: TileContext
    ) -> PreparedLora:
        """Return the pair, combined in compute dtype; factors are those of `rawmerge.methods.lora`."""
        places = sorted({int(name.partition("/")[0]) for name in tensors})
        pairs = [_pair(tensors, place, context.compute_dtype) for place in places]
        factors = [(number(settings, f"{place}/weight"), number(settings, f"{place}/scaling")) for place in places]
        is_rounded = bool(settings["rounds_delta"])
        if settings["combine"] == CAT:
            lora_a, lora_b = _concatenated(pairs, factors, int(number(settings, "rank")))
            is_rounded = True  # as PEFT rounds any delta of factors of the base's dtype
            if context.rounding_dtype is not None:
                lora_a, lora_b = (
                    each.to(context.rounding_dtype).to(context.compute_dtype) for each in (lora_a, lora_b)
                )
        else:
            lora_a, lora_b = _mixed(pairs, factors, settings)
        return PreparedLora(
            lora_a=lora_a,
            lora_b=lora_b,
            scaling=1.0,
            is_transposed=bool(settings["is_transposed"]),
            rounding_dtype=context.rounding_dtype if is_rounded else None,
        )


_Pair = tuple["torch.Tensor", "torch.Tensor"]


def _pair(tensors: Mapping[str, torch.Tensor], place: int, dtype: torch.dtype) -> _Pair:
    own = sorted(name for name in tensors if name.startswith(f"{place}/"))
    lora_a, lora_b = (tensors[name].to(dtype) for name in own)
    return lora_a, lora_b


def _concatenated(pairs: Sequence[_Pair], factors: Sequence[tuple[float, float]], rank: int) -> _Pair:
    """Return all factors side by side, (rank, in, …) and (out, rank, …); the rest of the rank is zeros, as in PEFT."""
    import torch

    lora_a = torch.cat([pair[0] * weight * scaling for pair, (weight, scaling) in zip(pairs, factors, strict=True)])
    lora_b = torch.cat([pair[1] for pair in pairs], dim=1)
    missing = rank - len(lora_a)
    if missing <= 0:
        return lora_a, lora_b
    zeros_a = lora_a.new_zeros(missing, *lora_a.shape[1:])
    zeros_b = lora_b.new_zeros(lora_b.shape[0], missing, *lora_b.shape[2:])
    return torch.cat([lora_a, zeros_a]), torch.cat([lora_b, zeros_b], dim=1)


def _mixed(pairs: Sequence[_Pair], factors: Sequence[tuple[float, float]], settings: Mapping[str, Setting]) -> _Pair:
    """Return the mix of all lora_a and that of all lora_b: half of each weight goes to either, its sign to lora_a."""
    products = [weight * scaling for weight, scaling in factors]
    roots = [math.sqrt(abs(product)) for product in products]
    signed = [root if product >= 0 else -root for root, product in zip(roots, products, strict=True)]
    lora_a, lora_b = zip(*pairs, strict=True)
    return _combined(lora_a, signed, settings), _combined(lora_b, roots, settings)


def _combined(
    tensors: Sequence[torch.Tensor], weights: Sequence[float], settings: Mapping[str, Setting]
) -> torch.Tensor:
    """Return PEFT's `task_arithmetic`, `magnitude_prune` or `ties` of tensors of one shape."""
    import torch

    how, density = settings["combine"], number(settings, "density")
    if how in _PRUNING and density < 1:
        tensors = [_pruned(tensor, density) for tensor in tensors]
    stack = torch.stack(list(tensors))
    column = torch.tensor(weights, dtype=stack.dtype).view(-1, *[1] * (stack.dim() - 1))
    if how != _TIES:
        return (stack * column).sum(dim=0)
    votes = stack.sum(dim=0) if settings["majority_sign"] == "total" else stack.sign().sum(dim=0)
    agrees = stack.sign() == torch.where(votes >= 0, 1, -1)
    return (stack * column * agrees).sum(dim=0) / torch.clamp(agrees.sum(dim=0), min=1.0)


def _pruned(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """Return a tensor with its largest elements only; of equal ones at the edge, those that torch's `topk` takes."""
    import torch

    mask = torch.zeros_like(tensor).reshape(-1)
    mask[torch.topk(tensor.abs().reshape(-1), k=int(density * tensor.numel())).indices] = 1
    return tensor * mask.reshape(tensor.shape)
