"""The one rounding at the end of a tile: compute dtype to storage dtype, checked, NaNs canonical."""

from __future__ import annotations

import numpy as np
import torch

#: Quiet NaN without payload. torch's own NaN differs between processors: 0xffff with AVX2, 0x7fc0 without.
_CANONICAL_NAN = {torch.bfloat16: 0x7FC0, torch.float16: 0x7E00, torch.float32: 0x7FC00000}
#: Bits of a float32 that are all zero where it lies on a tie of the dtype, and seldom elsewhere.
_LOW_BITS = {torch.bfloat16: 0x7FFF, torch.float16: 0x0FFF}
_COMPARED_ELEMENTS = 2**16
#: Ties that are rounded at a time, in some 50 bytes each; where nothing but the dtype changes, every element is one.
_TIES = 2**14
_SAME_SIZE_INT = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_CANONICAL_NAN[torch.float64] = 0x7FF8000000000000


def round_into(result: torch.Tensor, values: torch.Tensor) -> None:
    """Round `values` (float32 or float64) to the dtype of `result`, to nearest, ties to even, exactly once.

    Shapes: both the same. Devices: both on the same.
    """
    if values.dtype != torch.float64 or result.dtype not in _LOW_BITS:
        result.copy_(values)
    elif values.device.type == "cpu":
        _round_apart(result, values)
    else:
        round_through_odd(result, values)


def _round_apart(result: torch.Tensor, values: torch.Tensor) -> None:
    """Round float64 `values` as most of them can be, by way of float32; and the few others after them."""
    # torch goes through float32, which rounds twice; that is wrong only where float32 falls on a tie of the result
    nearest = values.float()
    result.copy_(nearest)
    bits = nearest.view(torch.int32).numpy().reshape(-1)
    ties = torch.from_numpy(np.flatnonzero((bits & _LOW_BITS[result.dtype]) == 0))
    for first in range(0, len(ties), _TIES):
        part = ties[first : first + _TIES]
        result.view(-1)[part] = _round_to_odd(values.view(-1)[part]).to(result.dtype)


def round_through_odd(result: torch.Tensor, values: torch.Tensor) -> None:
    """Round float64 `values` to the dtype of `result`, bfloat16 or float16: the same as `round_into`, all alike.

    That suits a device, which would have to be waited for to learn which values lie on ties.
    """
    result.copy_(_round_to_odd(values))


def _round_to_odd(values: torch.Tensor) -> torch.Tensor:
    """Return float64 `values` in float32, inexact ones with an odd last bit.

    An odd last bit keeps a near-tie from looking like a tie, so that the next rounding (to 11 bits or fewer) gives
    what rounding once would have given.
    Source: Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008.
    """
    nearest = values.float()
    exact = nearest.double()
    bits = nearest.view(torch.int32)
    needs_step = (exact != values) & ((bits & 1) == 0) & ~torch.isnan(values)
    step = torch.where(exact.abs() > values.abs(), -1, 1).to(torch.int32)
    # zero has no sign to step along: the smallest float32 of the value's own sign is the odd neighbour
    from_zero = torch.where(torch.signbit(values), torch.iinfo(torch.int32).min + 1, 1).to(torch.int32)
    stepped = torch.where(exact == 0, from_zero, bits + step)
    return torch.where(needs_step, stepped, bits).view(torch.float32)


def may_overflow(values: torch.Tensor, storage_dtype: torch.dtype) -> bool:
    """Whether any of `values` is NaN, infinite, or beyond the largest finite value of `storage_dtype`."""
    if values.numel() == 0:
        return False
    lowest, highest = (float(extreme) for extreme in torch.aminmax(values))  # NaN where there is any
    limit = torch.finfo(storage_dtype).max
    return not (lowest >= -limit and highest <= limit)


def differs(result: torch.Tensor, before: torch.Tensor, compute_dtype: torch.dtype) -> bool:
    """Whether an element of `result` is another than `before` would be stored as; NaN differs from everything.

    Rows are compared a few at a time, which takes little memory and, as a rule, ends with the first of them.
    """
    rows = max(1, _COMPARED_ELEMENTS // max(1, before.shape[1]))
    for first in range(0, len(result), rows):
        after, old = result[first : first + rows], before[first : first + rows]
        unchanged = torch.empty_like(after)
        round_into(unchanged, old.to(compute_dtype))
        if not torch.equal(after, unchanged):
            return True
    return False


def newly_non_finite(result: torch.Tensor, before: torch.Tensor) -> bool:
    """Whether `result` holds inf or NaN where `before` was finite."""
    return bool((~torch.isfinite(result) & torch.isfinite(before)).any())


def make_nans_canonical(result: torch.Tensor) -> None:
    """Give all NaNs in `result` the same bits, in place."""
    bits = result.view(_SAME_SIZE_INT[result.element_size()])
    bits.masked_fill_(torch.isnan(result), _CANONICAL_NAN[result.dtype])
