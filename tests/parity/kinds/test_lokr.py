"""LoKr against PEFT, and against the formula in float64."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import rawmerge
from tests.parity import kind_oracle as kinds
from tests.parity import peft_oracle as oracle
from tests.parity import tiny_models as tiny

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity

RANK, ALPHA = 3, 5


def config(**fields: Any) -> Any:
    return peft.LoKrConfig(**{"target_modules": list(kinds.LLAMA_TARGETS), "r": RANK, "alpha": ALPHA, **fields})


#: w1 whole and w2 a product; both products; both whole; w1 wider than w2 is high; another factor.
PLAIN = kinds.Case(config)
BOTH = kinds.Case(lambda: config(decompose_both=True, r=2, decompose_factor=8))
FULL = kinds.Case(lambda: config(r=16, alpha=7))
FACTOR = kinds.Case(lambda: config(decompose_factor=4))
PATTERNS = kinds.Case(lambda: config(rank_pattern={"q_proj": 2}, alpha_pattern={"layers.0.self_attn.q_proj": 7}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [PLAIN, BOTH, FULL], ids=["plain", "both", "full"])
def test_linear_is_bit_equal(tmp_path: Path, case: kinds.Case, dtype: torch.dtype) -> None:
    kinds.check_merge(case, tmp_path, dtype)


@pytest.mark.parametrize("case", [FACTOR, PATTERNS], ids=["factor", "patterns"])
def test_options_are_followed(tmp_path: Path, case: kinds.Case) -> None:
    kinds.check_merge(case, tmp_path, torch.bfloat16)


@pytest.mark.parametrize("factor", [-1, 3, 1])
def test_a_weight_of_several_tiles_is_bit_equal(tmp_path: Path, factor: int) -> None:
    case = kinds.Case(lambda: config(decompose_factor=factor), model=tiny.tall_llama)
    kinds.check_merge(case, tmp_path, torch.bfloat16)


@pytest.mark.parametrize("fields", [{"r": 2}, {"r": 2, "use_effective_conv2d": True}, {"r": 99}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolutions_are_bit_equal(tmp_path: Path, fields: dict[str, Any], dtype: torch.dtype) -> None:
    case = kinds.Case(
        lambda: config(target_modules=["convolution"], **fields),
        "AutoModelForImageClassification",
        tiny.resnet,
        targets=["convolution"],
    )
    kinds.check_merge(case, tmp_path, dtype)


@pytest.mark.parametrize("fields", [{"r": 1}, {"r": 99}])
def test_one_dimensional_convolutions_are_bit_equal(tmp_path: Path, fields: dict[str, Any]) -> None:
    def build() -> torch.nn.Module:
        return tiny.plain(first=torch.nn.Conv1d(12, 18, 5), second=torch.nn.Conv1d(18, 10, 1))

    base = tiny.save_plain(build, tmp_path / "base.safetensors", torch.bfloat16)
    load = tiny.load_plain(build, base)
    wrapped = peft.get_peft_model(load(), config(target_modules=["first", "second"], **fields))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    wrapped.save_pretrained(tmp_path / "adapter")
    expected = peft.PeftModel.from_pretrained(load(), tmp_path / "adapter").merge_and_unload().state_dict()
    rawmerge.merge_adapter(base, tmp_path / "adapter", tmp_path / "ours")
    ours = oracle.read_tensors(tmp_path / "ours")
    for name, tensor in expected.items():
        assert torch.equal(kinds.as_tensor(ours[name]), tensor.double()), name
    assert not torch.equal(expected["first.weight"], load().state_dict()["first.weight"])


def test_kernels_of_one_dimension_are_the_formula(tmp_path: Path) -> None:
    """PEFT saves these, but its own merge of them stops: torch.kron cannot view w2 as it lies."""
    weight, shapes = torch.randn(18, 12, 5), {"w1": (3, 2), "w2_a": (2, 6), "w2_b": (2, 6), "t2": (2, 2, 5, 1)}
    own = {role: torch.randn(shape) * 0.3 for role, shape in shapes.items()}
    save_file({"first.weight": weight}, tmp_path / "base.safetensors")
    config(target_modules=["first"], r=2, use_effective_conv2d=True).save_pretrained(tmp_path / "adapter")
    named = {f"base_model.model.first.lokr_{role}": tensor for role, tensor in own.items()}
    save_file(named, tmp_path / "adapter" / kinds.WEIGHTS)
    rawmerge.merge_adapter(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "ours")
    ours = kinds.as_tensor(oracle.read_tensors(tmp_path / "ours")["first.weight"])
    for row, column, tap in ((0, 0, 0), (7, 5, 1), (17, 11, 4), (6, 6, 3)):
        second = sum(
            own["t2"][i, j, tap, 0] * own["w2_a"][i, row % 6] * own["w2_b"][j, column % 6]
            for i in range(2)
            for j in range(2)
        )
        delta = own["w1"][row // 6, column // 6] * second * ALPHA / 2
        assert float(ours[row, column, tap]) == pytest.approx(float(weight[row, column, tap] + delta), rel=1e-5)


@pytest.mark.parametrize("case", [PLAIN, BOTH], ids=["plain", "both"])
def test_float64_is_the_formula(tmp_path: Path, case: kinds.Case) -> None:
    def formula(name: str, weight: torch.Tensor, own: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        path = f"base_model.model.{name.removesuffix('weight')}lokr_"
        if not any(key.startswith(path) for key in own):
            return None
        factors = [_factor(own, f"{path}{which}") for which in ("w1", "w2")]
        (out_1, in_1), (out_2, in_2) = factors[0].shape, factors[1].shape
        delta = torch.empty(out_1, out_2, in_1, in_2, dtype=torch.float64)
        for row in range(out_1):
            for column in range(in_1):
                delta[row, :, column] = factors[0][row, column] * factors[1]
        scaling: float = case.make_config().alpha / case.make_config().r
        return weight + delta.reshape(weight.shape) * scaling

    kinds.check_float64(case, tmp_path, formula)


def _factor(own: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    return own[name] if name in own else torch.einsum("ir,rj->ij", own[f"{name}_a"], own[f"{name}_b"])


@pytest.mark.parametrize("case", [PLAIN, BOTH, FULL], ids=["plain", "both", "full"])
def test_damage_is_refused_by_name(tmp_path: Path, case: kinds.Case) -> None:
    kinds.check_damage(case, tmp_path)


def test_damage_of_kernels_is_refused_by_name(tmp_path: Path) -> None:
    case = kinds.Case(
        lambda: config(target_modules=["layers.0.layer.1.convolution"], r=2, use_effective_conv2d=True),
        "AutoModelForImageClassification",
        tiny.resnet,
    )
    kinds.check_damage(case, tmp_path)
