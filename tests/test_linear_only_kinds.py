"""Kinds that PEFT does not train on Conv1D: a weight stored (in, out) is refused, whatever the tensors are."""

from __future__ import annotations

import pytest

from rawmerge.methods import ADAPTER_KINDS
from rawmerge.methods.interface import ShapeMismatchError, TargetModule, UnmergeableError

KINDS = ("BEFT", "BONE", "C3A", "DELORA", "MISS", "ROAD", "SHIRA")


@pytest.mark.parametrize("name", KINDS)
def test_a_weight_stored_in_out_is_refused(name: str) -> None:
    module = TargetModule("h.0.c_fc", {"any": (2, 8)}, (8, 24), is_transposed=True)
    with pytest.raises(UnmergeableError, match="stored"):
        list(ADAPTER_KINDS[name].plan(module))


@pytest.mark.parametrize("name", KINDS)
def test_a_square_weight_of_unknown_layout_is_refused(name: str) -> None:
    module = TargetModule("h.0.c_proj", {"any": (2, 8)}, (8, 8), is_transposed=None)
    with pytest.raises(ShapeMismatchError):
        list(ADAPTER_KINDS[name].plan(module))
