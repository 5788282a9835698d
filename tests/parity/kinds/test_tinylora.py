"""TinyLoRA against PEFT, and against the formula in float64."""

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

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:Specified to not"),
]


def config(**fields: Any) -> Any:
    return peft.TinyLoraConfig(**{"r": 3, "u": 5, "target_modules": list(kinds.LLAMA_TARGETS), **fields})


def untied_gpt2(**fields: Any) -> Any:
    """An embedding that is an output projection, too, would be untied."""
    return tiny.gpt2(tie_word_embeddings=False, **fields)


def conv1d(**fields: Any) -> kinds.Case:
    return kinds.Case(
        lambda: config(target_modules=[*kinds.GPT2_TARGETS, "wte"], **fields),
        model=untied_gpt2,
        targets=[*kinds.GPT2_TARGETS, "wte"],
    )


CASES = {
    "a vector each": kinds.Case(config),
    "some vectors": kinds.Case(lambda: config(weight_tying=0.6)),
    "one vector": kinds.Case(lambda: config(weight_tying=1.0)),
    "drawn": kinds.Case(lambda: config(save_projection=False, projection_seed=9, weight_tying=0.3)),
    "drawn, a rank above the outputs": kinds.Case(lambda: config(save_projection=False, r=40)),
    "embedding": kinds.Case(
        lambda: config(target_modules=["embed_tokens", "v_proj"], save_projection=False),
        targets=["embed_tokens", "v_proj"],
    ),
    "conv1d": conv1d(),
    "conv1d, drawn": conv1d(save_projection=False, weight_tying=0.5),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_merge_is_bit_equal(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    kinds.check_merge(CASES[name], tmp_path, dtype)


@pytest.mark.parametrize("name", ["a vector each", "conv1d, drawn"])
def test_a_weight_of_several_tiles_is_bit_equal(tmp_path: Path, name: str) -> None:
    tall = tiny.tall_llama if name == "a vector each" else lambda: untied_gpt2(n_embd=320, n_layer=1)
    kinds.check_merge(replace(CASES[name], model=tall), tmp_path, torch.bfloat16)


def test_layers_are_counted_by_number(tmp_path: Path) -> None:
    case = replace(CASES["drawn"], model=lambda: tiny.llama(num_hidden_layers=11, hidden_size=16, intermediate_size=24))
    kinds.check_merge(case, tmp_path, torch.float32)


def test_float64_is_the_formula(tmp_path: Path) -> None:
    def formula(name: str, weight: torch.Tensor, own: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        path = f"base_model.model.{name.removesuffix('weight')}tinylora_"
        if f"{path}A" not in own:
            return None
        # q, k, gate, down of each of two layers; round(8 * 0.4) = 3 vectors, two modules each but for the last
        layer = int(name.split(".")[2])
        place = 4 * layer + next(place for place, target in enumerate(kinds.LLAMA_TARGETS) if target in name)
        vector = own[f"base_model.tinylora_v.{min(place // 2, 2)}"]
        inner = sum(number * matrix for number, matrix in zip(vector, own[f"{path}P"], strict=True))
        delta: torch.Tensor = own[f"{path}B"] @ inner @ own[f"{path}A"]
        return weight + delta

    kinds.check_float64(CASES["some vectors"], tmp_path, formula)


def test_the_stream_of_random_matrices_stays_the_same() -> None:
    drawn = torch.normal(mean=0.0, std=1.0, size=(1, 2, 2), generator=torch.Generator().manual_seed(42))
    expected = torch.tensor([[[0.3367, 0.1288], [0.2345, 0.2303]]])
    torch.testing.assert_close(drawn, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", ["a vector each", "drawn"])
def test_damage_is_refused_by_name(tmp_path: Path, name: str) -> None:
    kinds.check_damage(CASES[name], tmp_path)


@pytest.mark.parametrize("name", ["a vector each", "drawn"])
def test_without_a_known_order_of_modules_nothing_is_guessed(tmp_path: Path, name: str) -> None:
    base, adapter = kinds.write_case(CASES[name], tmp_path, torch.float32)
    text = (base / "config.json").read_text()
    (base / "config.json").write_text(text.replace('"llama"', '"my_model"'))
    with pytest.raises(rawmerge.RefusedError, match="module order unknown"):
        rawmerge.plan_merge(base, adapter)


def test_one_vector_and_stored_matrices_need_no_order(tmp_path: Path) -> None:
    base, adapter = kinds.write_case(CASES["one vector"], tmp_path, torch.float32)
    text = (base / "config.json").read_text()
    (base / "config.json").write_text(text.replace('"llama"', '"my_model"'))
    assert rawmerge.plan_merge(base, adapter)
