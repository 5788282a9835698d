"""C3A against PEFT, and against the formula in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import rawmerge
from tests.parity import kind_oracle as kinds
from tests.parity import tiny_models as tiny

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity


def config(size: int = 16, **fields: Any) -> Any:
    return peft.C3AConfig(block_size=size, target_modules=list(kinds.LLAMA_TARGETS), **fields)


PLAIN = kinds.Case(config)
PATTERNS = kinds.Case(lambda: config(16, block_size_pattern={"q_proj": 32, "layers.0.mlp.down_proj": 8}))


def odd() -> Any:
    """Sizes whose Fourier transforms are of no power of two."""
    return tiny.llama(hidden_size=60, intermediate_size=180, num_attention_heads=2, head_dim=30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [PLAIN, PATTERNS], ids=["plain", "patterns"])
def test_linear_is_bit_equal(tmp_path: Path, case: kinds.Case, dtype: torch.dtype) -> None:
    kinds.check_merge(case, tmp_path, dtype)


@pytest.mark.parametrize("size", [1, 3, 15, 30, 60])
def test_odd_blocks_are_bit_equal(tmp_path: Path, size: int) -> None:
    kinds.check_merge(kinds.Case(lambda: config(size), model=odd), tmp_path, torch.float32)


@pytest.mark.parametrize("size", [32, 160])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_of_several_tiles_is_bit_equal(tmp_path: Path, size: int, dtype: torch.dtype) -> None:
    def model() -> Any:
        return tiny.llama(hidden_size=320, intermediate_size=960, num_hidden_layers=1)

    kinds.check_merge(kinds.Case(lambda: config(size), model=model), tmp_path, dtype)


def test_float64_is_the_formula(tmp_path: Path) -> None:
    def formula(name: str, weight: torch.Tensor, own: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        kernel = own.get(f"base_model.model.{name.removesuffix('.weight')}.c3a_kernel")
        if kernel is None:
            return None
        size, inputs = kernel.shape[2], weight.shape[1]
        for block, row in enumerate(kernel):
            for place, numbers in enumerate(row):
                for shift in range(size):  # each row is the one above, moved by one
                    weight[block * size + shift, place * size : (place + 1) * size] += numbers.roll(shift) / inputs
        return weight

    kinds.check_float64(PLAIN, tmp_path, formula)


def test_damage_is_refused_by_name(tmp_path: Path) -> None:
    kinds.check_damage(PLAIN, tmp_path)


def test_blocks_of_a_size_that_the_config_does_not_state_are_refused(tmp_path: Path) -> None:
    base, adapter = kinds.write_case(replace(PLAIN, targets=()), tmp_path, torch.float32)
    kinds.edit_config(adapter, block_size=8)
    with pytest.raises(rawmerge.RefusedError, match=r"c3a_kernel.*block_size"):
        rawmerge.plan_merge(base, adapter)
