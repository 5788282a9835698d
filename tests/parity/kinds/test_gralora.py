"""GraLoRA against PEFT, and against the formula in float64."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import rawmerge
from tests.parity import kind_oracle as kinds
from tests.parity import tiny_models as tiny

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity

RANK, ALPHA, HYBRID = 8, 5, 3
CONV1D: dict[str, Any] = {"model": tiny.gpt2, "targets": kinds.GPT2_TARGETS}


def case(blocks: int = 4, hybrid: int = 0, rank: int = RANK, **fields: Any) -> kinds.Case:
    targets = list(fields.get("targets", kinds.LLAMA_TARGETS))
    return kinds.Case(
        lambda: peft.GraloraConfig(r=rank, alpha=ALPHA, hybrid_r=hybrid, gralora_k=blocks, target_modules=targets),
        **fields,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hybrid", [0, HYBRID])
@pytest.mark.parametrize("fields", [{}, CONV1D], ids=["linear", "conv1d"])
def test_merge_is_bit_equal(tmp_path: Path, fields: dict[str, Any], hybrid: int, dtype: torch.dtype) -> None:
    kinds.check_merge(case(hybrid=hybrid, **fields), tmp_path, dtype)


def tall_llama() -> Any:
    """Sizes of which tiles of 64 rows are no part of a block's."""
    return tiny.llama(hidden_size=480, intermediate_size=960, num_hidden_layers=1)


@pytest.mark.parametrize("hybrid", [0, HYBRID])
@pytest.mark.parametrize(
    "fields",
    [{"model": tall_llama}, {"model": tiny.tall_gpt2, "targets": kinds.GPT2_TARGETS}],
    ids=["linear", "conv1d"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_several_tiles_are_bit_equal(
    tmp_path: Path, fields: dict[str, Any], hybrid: int, dtype: torch.dtype
) -> None:
    kinds.check_merge(case(hybrid=hybrid, rank=32, **fields), tmp_path, dtype)


@pytest.mark.parametrize("fields", [{}, CONV1D], ids=["linear", "conv1d"])
@pytest.mark.parametrize("blocks", [1, 4])
def test_float64_is_the_formula(tmp_path: Path, fields: dict[str, Any], blocks: int) -> None:
    def formula(name: str, weight: torch.Tensor, own: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        path = f"base_model.model.{name.removesuffix('.weight')}.gralora_"
        if f"{path}A" not in own:
            return None
        left, right, part = own[f"{path}A"], own[f"{path}B"], RANK // blocks
        rows = []
        for block in range(blocks):  # of outputs; each takes its share of every block of inputs' ranks
            shares = [left[n][:, block * part : (block + 1) * part] for n in range(blocks)]
            own_ranks = [right[block][n * part : (n + 1) * part] for n in range(blocks)]
            rows.append(torch.cat([(share @ ranks).T for share, ranks in zip(shares, own_ranks, strict=True)], dim=1))
        delta = torch.cat(rows) + own[f"{path}B_general.weight"] @ own[f"{path}A_general.weight"]
        delta *= ALPHA / (RANK + HYBRID)
        return weight + (delta.T if fields else delta)

    kinds.check_float64(case(blocks, HYBRID, **fields), tmp_path, formula)


@pytest.mark.parametrize("fields", [{}, CONV1D], ids=["linear", "conv1d"])
def test_damage_is_refused_by_name(tmp_path: Path, fields: dict[str, Any]) -> None:
    kinds.check_damage(case(hybrid=HYBRID, **fields), tmp_path)


@pytest.mark.parametrize(("field", "value"), [("r", 12), ("gralora_k", 2), ("gralora_k", 3), ("hybrid_r", 0)])
def test_a_config_of_another_adapter_is_refused(tmp_path: Path, field: str, value: int) -> None:
    base, adapter = kinds.write_case(case(hybrid=HYBRID), tmp_path, torch.float32)
    kinds.edit_config(adapter, **{field: value})
    with pytest.raises(rawmerge.RefusedError, match="gralora"):
        rawmerge.plan_merge(base, adapter)
