"""Several adapters in one pass equal PEFT's merges one after the other, bit for bit, kinds mixed and weights given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import rawmerge
from tests.parity import peft_oracle as oracle
from tests.parity import tiny_models as tiny

peft = pytest.importorskip("peft")

pytestmark = [pytest.mark.parity, *oracle.QUIET]

LORA: dict[str, Any] = {"r": 6, "lora_alpha": 9, "target_modules": ["q_proj", "v_proj", "down_proj"]}
OTHER: dict[str, Any] = {"r": 4, "lora_alpha": 7, "target_modules": ["q_proj", "k_proj", "down_proj"]}
KINDS: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(init_lora_weights=False, **LORA),
    "other": lambda: peft.LoraConfig(init_lora_weights=False, use_rslora=True, **OTHER),
    "dora": lambda: peft.LoraConfig(init_lora_weights=False, use_dora=True, **OTHER),
    "mica": lambda: peft.LoraConfig(**{**OTHER, "init_lora_weights": "mica"}),
    "ia3": lambda: peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=["q_proj", "up_proj"], init_weights=False),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=8, target_modules=["q_proj", "o_proj"], init_weights=False),
}


@pytest.fixture(params=[torch.bfloat16, torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return oracle.save_base(tmp_path / "base", tiny.CAUSAL, tiny.llama(), request.param)


def saved(base: Path, folder: Path, kind: str, seed: int) -> Path:
    """Save an adapter with random values, other ones for each seed."""
    wrapped = peft.get_peft_model(oracle.load_pretrained(base, tiny.CAUSAL), KINDS[kind]())
    generator = torch.Generator().manual_seed(seed)
    for parameter in (parameter for parameter in wrapped.parameters() if parameter.requires_grad):
        values = torch.randn(parameter.shape, generator=generator) * 0.1
        parameter.data = (parameter.data.float() * (kind == "ia3") + values).to(parameter.dtype)
    wrapped.save_pretrained(folder)
    return folder


def merged_in_turn(base: Path, adapters: list[Path], folder: Path, weights: list[float]) -> dict[str, Any]:
    """Return what PEFT's merges are on disk, each into the result of the one before."""
    model: Any = oracle.load_pretrained(base, tiny.CAUSAL)
    for path, weight in zip(adapters, weights, strict=True):
        wrapped = peft.PeftModel.from_pretrained(model, path)
        for module in wrapped.modules():
            if weight != 1 and hasattr(module, "scale_layer"):
                module.scale_layer(weight)
        model = wrapped.merge_and_unload()
    model.save_pretrained(folder)
    return oracle.read_tensors(folder)


@pytest.mark.parametrize(
    "kinds",
    [
        ("lora", "other"),
        ("lora", "other", "lora"),
        ("lora", "dora"),
        ("dora", "lora"),
        ("lora", "ia3", "other"),
        ("mica", "lora", "mica"),
        ("oft", "loha", "lora"),
    ],
    ids="-".join,
)
@pytest.mark.parametrize("without", [(), ("kernel",)], ids=["kernel", "torch"])
def test_one_after_the_other(base: Path, tmp_path: Path, kinds: tuple[str, ...], without: tuple[str, ...]) -> None:
    paths = [saved(base, tmp_path / f"{place}", kind, place) for place, kind in enumerate(kinds)]
    expected = merged_in_turn(base, paths, tmp_path / "peft", [1.0] * len(paths))
    rawmerge.merge_adapter(base, paths, tmp_path / "out", without=without)
    oracle.assert_same_checkpoint(oracle.read_tensors(tmp_path / "out"), expected)


@pytest.mark.parametrize("weights", [(0.7, -0.3), (-1.0, 1.5)], ids=str)
def test_weights_are_scale_layers(base: Path, tmp_path: Path, weights: tuple[float, float]) -> None:
    paths = [saved(base, tmp_path / f"{place}", kind, place) for place, kind in enumerate(("lora", "other"))]
    expected = merged_in_turn(base, paths, tmp_path / "peft", list(weights))
    named = [f"{path}:{weight}" for path, weight in zip(paths, weights, strict=True)]
    rawmerge.merge_adapter(base, named, tmp_path / "out")
    oracle.assert_same_checkpoint(oracle.read_tensors(tmp_path / "out"), expected)


def test_once_is_pefts_exact_combination(tmp_path: Path) -> None:
    """Source: PEFT 0.21.2 `add_weighted_adapter`, `cat`: the only one of its combinations that is the sum of deltas."""
    base = oracle.save_base(tmp_path / "base", tiny.CAUSAL, tiny.llama(), torch.float32)
    paths = [saved(base, tmp_path / f"{place}", "lora", place) for place in (0, 1)]
    model = peft.PeftModel.from_pretrained(oracle.load_pretrained(base, tiny.CAUSAL), paths[0], adapter_name="a")
    model.load_adapter(paths[1], adapter_name="b")
    model.add_weighted_adapter(["a", "b"], [0.7, 0.4], "both", combination_type="cat")
    model.set_adapter("both")
    model.merge_and_unload(adapter_names=["both"]).save_pretrained(tmp_path / "peft")
    rawmerge.merge_adapter(base, [f"{paths[0]}:0.7", f"{paths[1]}:0.4"], tmp_path / "out", order="once")
    expected, found = (oracle.read_tensors(tmp_path / name) for name in ("peft", "out"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        one, other = (torch.frombuffer(bytearray(at.data), dtype=torch.float32) for at in (tensor, found[name]))
        assert torch.allclose(one, other, rtol=0, atol=2e-6), name
