"""PSOFT against PEFT, and against the formula in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import rawmerge
from rawmerge.methods.psoft import _decomposed
from tests.parity import kind_oracle as kinds
from tests.parity import tiny_models as tiny

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def config(**fields: Any) -> Any:
    return peft.PsoftConfig(**{"r": 4, "psoft_alpha": 6, "target_modules": list(kinds.LLAMA_TARGETS), **fields})


CASES = {
    "plain": kinds.Case(config),
    "pissa": kinds.Case(lambda: config(ab_svd_init="pissa_init", psoft_mag_a=False)),
    "seeded": kinds.Case(lambda: config(psoft_svd="lowrank", psoft_svd_lowrank_niter=3, random_seed=7)),
    "free": kinds.Case(lambda: config(psoft_orth=False, psoft_mag_b=False)),
    "rank 1": kinds.Case(lambda: config(r=1)),
    **{
        f"series of {terms}": kinds.Case(partial(config, use_cayley_neumann=True, num_cayley_neumann_terms=terms))
        for terms in (1, 2, 3, 5)
    },
    "short series": kinds.Case(lambda: config(use_cayley_neumann=True, cayley_neumann_eps=0.3)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_merge_is_bit_equal(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    # MKL's thin products have other bits where a matrix lies at no multiple of 16 bytes, as PEFT's mapped weights may
    is_alignment_seen = name == "seeded" and dtype == torch.float32
    kinds.check_merge(replace(CASES[name], tolerance=2**-18 if is_alignment_seen else 0), tmp_path, dtype)


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (16, 16)])
def test_the_seeded_decomposition_is_torch_s(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        left, values, right = torch.svd_lowrank(weight, q=4, niter=3)
    ours = _decomposed(weight, 4, {"seed": 7, "iterations": 3})
    assert all(map(torch.equal, ours, (left, values, right.mH)))


@pytest.mark.parametrize("name", ["plain", "seeded"])
def test_float16_is_bit_equal(tmp_path: Path, name: str) -> None:
    kinds.check_merge(CASES[name], tmp_path, torch.float16)


@pytest.mark.parametrize("name", ["plain", "seeded"])
def test_a_weight_of_several_tiles_is_bit_equal(tmp_path: Path, name: str) -> None:
    kinds.check_merge(replace(CASES[name], model=tiny.tall_llama), tmp_path, torch.bfloat16)


@pytest.mark.parametrize("name", ["plain", "free"])
def test_float64_is_the_formula(tmp_path: Path, name: str) -> None:
    def formula(tensor: str, weight: torch.Tensor, own: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        path = f"base_model.model.{tensor.removesuffix('weight')}psoft_R"
        turn = own.get(f"{path}.weight")
        if turn is None:
            return None
        if name == "plain":
            skew = torch.zeros(4, 4, dtype=torch.float64)
            for place, (row, column) in enumerate((r, c) for r in range(4) for c in range(r + 1, 4)):
                skew[row, column], skew[column, row] = turn[place], -turn[place]
            turn = (torch.eye(4) + skew) @ torch.linalg.inv(torch.eye(4) - skew)
            turn = torch.diag(own[f"{path}.vector_b"]) @ turn
        turn = turn @ torch.diag(own[f"{path}.vector_a"])
        # the scaling cancels: s * U (S / s) (R - I) V; signs of U and V cancel only in pairs, so they must be torch's
        parts = torch.linalg.svd(weight.float(), full_matrices=False)
        left, values, right = (part.double() for part in parts)
        delta: torch.Tensor = left[:, :4] @ torch.diag(values[:4]) @ (turn - torch.eye(4)) @ right[:4]
        return weight + delta

    kinds.check_float64(CASES[name], tmp_path, formula)


def test_the_seeded_decomposition_s_stream_stays_the_same() -> None:
    drawn = torch.randn(2, 2, generator=torch.Generator().manual_seed(7))
    expected = torch.tensor([[-0.1468, 0.7861], [0.9468, -1.1143]])
    torch.testing.assert_close(drawn, expected, rtol=0, atol=5e-5)


def test_damage_is_refused_by_name(tmp_path: Path) -> None:
    kinds.check_damage(CASES["plain"], tmp_path)


@pytest.mark.parametrize(
    "fields", [{"r": 33}, {"psoft_alpha": 0}, {"psoft_svd": "randomised"}, {"cayley_neumann_eps": 2}]
)
def test_a_config_that_cannot_be_followed_is_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    base, adapter = kinds.write_case(CASES["plain"], tmp_path, torch.float32)
    kinds.edit_config(adapter, **fields)
    with pytest.raises(rawmerge.RefusedError, match=next(iter(fields))):
        rawmerge.plan_merge(base, adapter)
