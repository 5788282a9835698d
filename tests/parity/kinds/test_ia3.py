"""IA3 against PEFT, and against the formula in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import rawmerge
from tests.parity import kind_oracle as kinds
from tests.parity import peft_oracle as oracle
from tests.parity import tiny_models as tiny

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity


def config(targets: list[str], feedforward: list[str]) -> Any:
    return peft.IA3Config(target_modules=targets, feedforward_modules=feedforward)


PLAIN = kinds.Case(lambda: config(list(kinds.LLAMA_TARGETS), ["down_proj", "q_proj"]))
#: All of GPT-2's modules have biases, which change where outputs are scaled.
CONV1D = kinds.Case(lambda: config(list(kinds.GPT2_TARGETS), ["c_proj"]), model=tiny.gpt2, targets=kinds.GPT2_TARGETS)
BIASED = kinds.Case(lambda: config(["query", "dense"], ["dense"]), "AutoModel", tiny.bert, ["query", "dense"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [PLAIN, CONV1D, BIASED], ids=["linear", "conv1d", "biased"])
def test_merge_is_bit_equal(tmp_path: Path, case: kinds.Case, dtype: torch.dtype) -> None:
    kinds.check_merge(case, tmp_path, dtype)


@pytest.mark.parametrize("feedforward", [[], ["convolution"]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolutions_are_bit_equal(tmp_path: Path, feedforward: list[str], dtype: torch.dtype) -> None:
    def make() -> Any:
        return config(["convolution"], feedforward)

    auto = "AutoModelForImageClassification"
    kinds.check_merge(kinds.Case(make, auto, tiny.resnet, targets=["convolution"]), tmp_path, dtype)


def test_float64_is_the_formula(tmp_path: Path) -> None:
    def formula(name: str, weight: torch.Tensor, own: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        scale = own.get(f"base_model.model.{name.removesuffix('weight')}ia3_l")
        return None if scale is None else weight * scale

    kinds.check_float64(PLAIN, tmp_path, formula)


def test_damage_is_refused_by_name(tmp_path: Path) -> None:
    kinds.check_damage(PLAIN, tmp_path)


def test_damage_of_scales_of_outputs_and_biases_is_refused_by_name(tmp_path: Path) -> None:
    kinds.check_damage(kinds.Case(lambda: config(["query"], []), "AutoModel", tiny.bert, ["query"]), tmp_path)


def test_a_pattern_tells_feedforward_modules(tmp_path: Path) -> None:
    make = lambda: peft.IA3Config(  # noqa: E731
        target_modules=["convolution"], feedforward_modules=r".*layers\.1\.layer\.[01]\.convolution"
    )
    case = kinds.Case(make, "AutoModelForImageClassification", tiny.resnet, targets=["convolution"])
    kinds.check_merge(case, tmp_path, torch.bfloat16)


@pytest.mark.parametrize("case", [PLAIN, CONV1D], ids=["linear", "conv1d"])
def test_a_weight_of_several_tiles_is_bit_equal(tmp_path: Path, case: kinds.Case) -> None:
    tall = tiny.tall_llama if case is PLAIN else tiny.tall_gpt2
    kinds.check_merge(replace(case, model=tall), tmp_path, torch.bfloat16)


@pytest.mark.parametrize("feedforward", [[], ["first", "second"]])
def test_grouped_convolutions_are_bit_equal(tmp_path: Path, feedforward: list[str]) -> None:
    """Groups cut inputs, so that each group of rows has input channels of its own; biases change with outputs."""

    def build() -> torch.nn.Module:
        return tiny.plain(first=torch.nn.Conv2d(12, 18, 3, groups=3), second=torch.nn.Conv3d(18, 18, 2, groups=2))

    base = tiny.save_plain(build, tmp_path / "base.safetensors", torch.bfloat16)
    load = tiny.load_plain(build, base)
    wrapped = peft.get_peft_model(load(), config(["first", "second"], feedforward))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape))
    wrapped.save_pretrained(tmp_path / "adapter")
    expected = peft.PeftModel.from_pretrained(load(), tmp_path / "adapter").merge_and_unload().state_dict()
    rawmerge.merge_adapter(base, tmp_path / "adapter", tmp_path / "ours")
    ours = oracle.read_tensors(tmp_path / "ours")
    for name, tensor in expected.items():
        assert torch.equal(kinds.as_tensor(ours[name]), tensor.double()), name
        is_kept = torch.equal(tensor, load().state_dict()[name])
        assert is_kept == (name.endswith("bias") and bool(feedforward)), name


@pytest.mark.parametrize(
    ("feedforward", "said"),
    [
        (["k_proj"], "ia3_l"),
        ("(a", "feedforward_modules"),
        ("(a*)*b", "feedforward_modules"),
        (3, "feedforward_modules"),
    ],
)
def test_a_config_that_contradicts_the_shapes_or_cannot_be_used_is_refused(
    tmp_path: Path, feedforward: Any, said: str
) -> None:
    base, adapter = kinds.write_case(PLAIN, tmp_path, torch.float32)
    kinds.edit_config(adapter, feedforward_modules=feedforward)
    with pytest.raises(rawmerge.RefusedError, match=said):
        rawmerge.plan_merge(base, adapter)


def test_without_feedforward_modules_shapes_tell_of_linear_layers(tmp_path: Path) -> None:
    base, adapter = kinds.write_case(PLAIN, tmp_path, torch.float32)
    expected = kinds.peft_merge(PLAIN, base, adapter, tmp_path / "peft")
    kinds.edit_config(adapter, feedforward_modules=None)
    rawmerge.merge_adapter(base, adapter, tmp_path / "ours")
    oracle.assert_same_checkpoint(oracle.read_tensors(tmp_path / "ours"), expected)
